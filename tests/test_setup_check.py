"""check_setup: right loops pass at every bag size, and each common mistake is named."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from helpers.cases import IGNORE, generator, zipf_ids
from helpers.processes import needs_gloo
from tst_ext import check_setup, fold_inputs, fold_labels, linear_multi_hot_cross_entropy
from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy

V, DIM, BAGS = 101, 16, 6
LINES = ["batch", "labels", "next bag", "loss", "gradients", "label positions", "bag slots", "causal", "tied"]


def text(s, rows=4, seed=0):
    """Draw ids and shifted labels `[rows, BAGS s]`, as frequent as words are, so that tokens repeat."""
    windows = zipf_ids((rows, BAGS * s + 1), V, seed)
    return windows[:, :-1], windows[:, 1:]


def bags(s, ignore_index=IGNORE):
    ids, labels = text(s)
    return fold_inputs(ids, s), fold_labels(labels, s, shifted=True, ignore_index=ignore_index)


class GPT(nn.Module):
    """Compute the loss of a loop: `model(ids, labels)`."""

    def __init__(self, tied=False, dropout=0.0, **options):
        super().__init__()
        torch.manual_seed(0)
        self.wte = BagEmbedding(V, DIM, padding_idx=IGNORE)
        self.wpe = nn.Embedding(200, DIM)  # more rows than the vocabulary has, as of models of characters
        self.block = nn.TransformerEncoderLayer(DIM, 2, 4 * DIM, dropout, batch_first=True, norm_first=True)
        self.head = LinearMultiHotCrossEntropy(DIM, V, **options)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.block.linear2.weight)  # as nanochat's: no gradient reaches what is before it
        nn.init.zeros_(self.block.self_attn.out_proj.weight)
        if tied:
            self.head.weight = self.wte.weight

    def hidden(self, ids, causal=True):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return F.rms_norm(self.block(x, mask if causal else torch.zeros_like(mask)), (DIM,))

    def forward(self, ids, labels):
        return self.head(self.hidden(ids), labels)


class Returns(GPT):
    """Return `result(model, ids, labels)`, which breaks the model or its loss in one place."""

    def __init__(self, result, **options):
        super().__init__(**options)
        self.result = result

    def forward(self, ids, labels):
        return self.result(self, ids, labels)


def statuses(report):
    assert [check.name for check in report.checks] == LINES
    return {check.name: check.passed for check in report.checks}


def failures(*arguments, **options):
    """Return the checks that failed, with their messages."""
    with pytest.raises(ValueError, match="^check_setup:\n") as error:
        check_setup(*arguments, **options)
    lines = [line.removeprefix("FAILED").strip() for line in str(error.value).splitlines() if line.startswith("FAILED")]
    return dict(line.split(": ", 1) for line in lines)


class TestRightLoopsPass:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("s", range(1, 9))
    def test_every_bag_size(self, s, tied):
        report = check_setup(GPT(tied), bags(s), tied=tied)
        assert statuses(report) == dict.fromkeys(LINES, True), report
        first = 4 * BAGS
        counts = ", ".join(map(str, [first] + [first - 4] * (s - 1)))
        assert report.checks[1].message == f"labels at positions 1 to {s}: {counts} of {first} bags"

    @pytest.mark.parametrize("s", [1, 3, 8])
    def test_mce_alt(self, s):
        report = check_setup(GPT(objective="mce_alt"), bags(s), tied=False, objective="mce_alt")
        assert all(statuses(report).values())
        labels = bags(s)[1].flatten(0, 1).tolist()
        distinct = [len(set(bag) - {IGNORE}) for bag in labels if set(bag) != {IGNORE}]
        expected = math.log(V) - sum(map(math.log, distinct)) / len(distinct)
        assert f"(log(V / distinct labels) = {expected:.3f})" in report.checks[3].message

    def test_unshifted_labels(self):
        ids, _ = text(4)
        batch = fold_inputs(ids, 4), fold_labels(ids, 4, shifted=False)
        assert all(statuses(check_setup(GPT(), batch, tied=False)).values())

    def test_documents_and_padding(self):
        ids, labels = text(4, rows=8)
        ends = torch.arange(0, ids.numel() + 1, 12)  # 12 tokens each: three bags in every two sequences' share
        folds = dict(cu_seqlens=ends, num_bags=BAGS)
        batch = fold_inputs(ids, 4, **folds), fold_labels(labels, 4, shifted=True, **folds)
        assert all(statuses(check_setup(GPT(), batch, tied=False)).values())
        ids[:2, 10:] = labels[:2, 9:] = IGNORE
        assert all(statuses(check_setup(GPT(), bags_of(ids, labels, 4), tied=False)).values())

    def test_empty_slots_inside_the_vocabulary(self):
        model = GPT()
        model.wte = BagEmbedding(V, DIM, padding_idx=0)
        nn.init.normal_(model.wte.weight, std=0.02)
        ids, labels = (torch.where(t == 0, 1, t) for t in text(4))
        ids[:, 3::4] = 0  # bags of three; the row of 0 gets no gradient
        labels[:, 2::4] = IGNORE
        batch = fold_inputs(ids, 4), fold_labels(labels, 4, shifted=True)
        wrong = failures(model, batch, tied=False)
        assert list(wrong) == ["labels"] and "got none at position 4 of 4" in wrong["labels"]
        ids[0, 3], labels[0, 2] = 1, 1
        ids[0, 7], labels[0, 6] = 1, 1
        assert all(statuses(check_setup(model, bags_of(ids, labels, 4), tied=False)).values())

    def test_a_model_that_reads_shift_labels(self):
        class Model(GPT):
            def forward(self, input_ids, labels, shift_labels):
                return super().forward(input_ids, shift_labels)

        ids, labels = bags(4)
        batch = dict(input_ids=ids, labels=labels, shift_labels=labels)
        assert all(statuses(check_setup(Model(), batch, tied=False)).values())

    def test_under_autocast(self):
        """It keeps casts of the weights, which would hide the noise here and show it afterwards."""
        model = GPT()
        with torch.autocast("cpu", torch.bfloat16):
            before = model(*bags(4))
            assert all(statuses(check_setup(model, bags(4), tied=False)).values())
            assert model(*bags(4)) == before

    def test_dropout_changes_nothing(self):
        assert all(statuses(check_setup(GPT(dropout=0.2), bags(4), tied=False)).values())

    def test_tokens_that_repeat_are_no_leak(self):
        ids = torch.arange(4 * 6 * 4).view(4, 24) % 2  # every bag has the tokens of every other
        batch = fold_inputs(ids, 4), fold_labels(ids, 4, shifted=False)
        report = check_setup(GPT(), batch, tied=False)
        assert report.checks[2].passed

    @pytest.mark.parametrize(
        "result",
        [
            lambda loss: (None, loss),
            lambda loss: (torch.ones(2, 3), loss),
            lambda loss: {"loss": loss},
            lambda loss: SimpleNamespace(loss=loss, logits=None),
        ],
        ids=["nanogpt", "logits", "dict", "object"],
    )
    def test_what_a_model_returns(self, result):
        model = Returns(lambda m, ids, labels: result(m.head(m.hidden(ids), labels)))
        assert all(statuses(check_setup(model, bags(2), tied=False)).values())

    def test_a_method_and_a_partial(self):
        model = GPT()
        for call in (model.forward, partial(model)):
            assert all(statuses(check_setup(call, bags(2), tied=False)).values())

    def test_a_function_leaves_its_parameters_unchecked(self):
        model = GPT()
        result = statuses(check_setup(lambda ids, labels: model(ids, labels), bags(2), vocab_size=V))
        assert {name for name, passed in result.items() if passed is None} == {"gradients", "tied"}

    def test_a_balancing_loss_is_not_taken_for_a_leak(self):
        """A router's loss depends on the tokens of all bags."""
        model = Returns(
            lambda m, ids, labels: m.head(m.hidden(ids), labels) + 0.1 * m.hidden(ids).mean(1).square().mean()
        )
        assert statuses(check_setup(model, bags(4), tied=False))["causal"]

    def test_tying_that_is_not_declared_is_reported(self):
        report = check_setup(GPT(tied=True), bags(2))
        assert report.checks[-1] == ("tied", None, "wte and head share one Parameter")
        assert "not checked  tied: wte and head share one Parameter" in str(report).splitlines()
        assert "ok           batch: bags and labels (4, 6, 2), V = 101" in str(report).splitlines()


def bags_of(ids, labels, s):
    return fold_inputs(ids, s), fold_labels(labels, s, shifted=True)


class TestLabels:
    """Mistakes in what the loop gives the model."""

    @pytest.mark.parametrize("s", [2, 4, 8])
    def test_the_leak(self, s):
        """Labels that are shifted by one and then reshaped: s - 1 of s are tokens of their own bag."""
        ids, labels = text(s)
        wrong = failures(GPT(), (fold_inputs(ids, s), labels.unflatten(1, (-1, s))))
        assert list(wrong) == ["next bag"]
        assert f"{s} tokens ahead, got tokens 1 ahead, so {s - 1} of {s} labels are in the bag" in wrong["next bag"]

    def test_labels_that_are_the_tokens_of_their_own_bag(self):
        ids, _ = text(4)
        wrong = failures(GPT(), (fold_inputs(ids, 4), fold_inputs(ids, 4)))
        assert "got tokens 0 ahead, so all labels are in the bag" in wrong["next bag"]

    @pytest.mark.parametrize("shifted", [False, True])
    def test_the_other_value_of_shifted(self, shifted):
        ids, labels = text(4)
        labels = fold_labels(labels if not shifted else ids, 4, shifted=shifted)
        wrong = failures(GPT(), (fold_inputs(ids, 4), labels))["next bag"]
        assert (
            "got tokens 3 ahead, so 1 of 4 labels are" if shifted else "got tokens 5 ahead: labels shifted"
        ) in wrong

    def test_labels_of_other_sequences(self):
        ids, labels = bags(4)
        wrong = failures(GPT(), (ids, labels.roll(1, 0)))["next bag"]
        assert "fold ids and labels of the same sequence" in wrong

    def test_inputs_that_are_altered_are_not_judged(self):
        ids, labels = bags(4)
        altered = torch.where(torch.rand(ids.shape, generator=generator()) < 0.1, 0, ids)
        assert statuses(check_setup(GPT(), (altered, labels), tied=False))["next bag"] is None

    @pytest.mark.parametrize("shape", [(4, 24), (4, 6)], ids=["tokens", "one per bag"])
    def test_labels_that_were_never_bagged(self, shape):
        ids, labels = text(4)
        wrong = failures(GPT(), (fold_inputs(ids, 4), labels[:, : shape[1]]))
        assert list(wrong) == ["batch"]
        assert f"expected the shape of the bags, (4, 6, 4), got shape {shape}; they were never bagged" in wrong["batch"]

    def test_tokens_that_were_never_bagged(self):
        assert "fold_inputs(ids, s) makes them" in failures(GPT(), text(4))["batch"]

    def test_one_label_for_the_whole_bag(self):
        ids, labels = bags(4)
        wrong = failures(GPT(), (ids, labels[..., :1].expand_as(labels).contiguous()))
        assert "got one label 4 times in every bag" in wrong["labels"]

    def test_a_position_without_labels(self):
        ids, labels = bags(4)
        labels[..., 2:] = IGNORE
        wrong = failures(GPT(), (ids, labels))
        assert list(wrong) == ["labels"] and "got none at positions 3, 4 of 4" in wrong["labels"]

    def test_no_labels(self):
        ids, labels = bags(4)
        assert "all are ignore_index = -100" in failures(GPT(), (ids, torch.full_like(labels, IGNORE)))["labels"]

    def test_another_ignore_index(self):
        wrong = failures(GPT(), bags(4, ignore_index=-1))
        assert list(wrong) == ["batch"]
        assert "[0, 101) or ignore_index = -100, got -1 (12 such places): pass ignore_index=-1 here" in wrong["batch"]

    def test_another_ignore_index_of_the_loss(self):
        wrong = failures(GPT(), bags(4, ignore_index=-1), ignore_index=-1)
        assert list(wrong) == ["loss"]
        assert "model(bags, labels) raised IndexError: labels[0, 5, 1] = -1 is out of range" in wrong["loss"]

    def test_filler_that_is_a_token(self):
        wrong = failures(GPT(), bags(4, ignore_index=0))
        assert (
            "expected ignore_index = -100 past the end of a sequence, got 0 in the last bag of all" in wrong["labels"]
        )

    def test_a_token_outside_the_vocabulary(self):
        ids, labels = bags(4)
        ids[1, 2, 3] = V
        assert failures(GPT(), (ids, labels))["batch"] == "bags: expected ids in [0, 101), got 101 (1 such places)"


class TestLoss:
    """Mistakes in the head and the loss."""

    def cross_entropy(self, m, ids, labels):
        return F.cross_entropy(F.linear(m.hidden(ids), m.head.weight).flatten(0, 1), labels, ignore_index=IGNORE)

    def test_silent_truncation(self):
        """A kernel of one label per row reads the first N of N s labels, and its user divides by all of them."""

        def result(m, ids, labels):
            rows = labels.flatten(0, 1).flatten()[: ids.shape[0] * ids.shape[1]]
            return self.cross_entropy(m, ids, rows) / labels.shape[-1]

        wrong = failures(Returns(result), bags(4))
        assert "log(V) / s: the loss reads one label of 4" in wrong["loss"]

    def test_one_label_of_each_bag(self):
        model = Returns(lambda m, ids, labels: self.cross_entropy(m, ids, labels[..., 0].flatten()))
        wrong = failures(model, bags(4))
        assert list(wrong) == ["label positions"]  # its loss is log V
        assert "those at positions 2, 3, 4 of 4 do not change it" in wrong["label positions"]

    @pytest.mark.parametrize(
        "options, factor, words",
        [
            (dict(normalizer=4 * BAGS), 21 / 6, "4 times as much: divide by the number of labels, not of bags"),
            (dict(normalizer=1), 84, "a sum over labels"),
            (dict(reduction="sum"), 21, "a sum over bags"),
            (dict(normalizer=1000), 0.084, "the divisor is no count of labels"),
        ],
    )
    def test_normalizer(self, options, factor, words):
        wrong = failures(GPT(**options), bags(4))["loss"]
        assert words in wrong
        assert float(wrong.split(",")[0]) == pytest.approx(factor * math.log(V), rel=0.02)

    def test_another_objective(self):
        assert "pass objective='mce_alt'" in failures(GPT(objective="mce_alt"), bags(8))["loss"]
        assert "pass objective='mce'" in failures(GPT(), bags(8), objective="mce_alt")["loss"]

    def test_weights_that_are_not_fresh(self):
        model = GPT()
        with torch.no_grad():
            model.head.weight.mul_(12)
        assert "or the fresh logits are large; or the weights are not fresh" in failures(model, bags(4))["loss"]

    def test_a_loss_that_is_not_finite(self):
        model = Returns(lambda m, ids, labels: m.head.weight.sum() * math.nan)
        assert failures(model, bags(4))["loss"] == "expected a finite loss, got nan"

    def test_a_loss_per_row(self):
        assert "raised TypeError: expected a 0-d loss" in failures(GPT(reduction="none"), bags(4))["loss"]

    def test_without_a_vocabulary_the_loss_is_not_judged(self):
        model = GPT()
        report = check_setup(lambda ids, labels: model(ids, labels), bags(4))
        assert report.checks[3].passed is None and report.checks[3].message.endswith("pass vocab_size=")

    def test_a_loss_in_16_bits_is_too_coarse(self):
        model = Returns(lambda m, ids, labels: m.head(m.hidden(ids), labels).bfloat16())
        result = statuses(check_setup(model, bags(4), tied=False))
        assert {name for name, passed in result.items() if passed is None} == {"label positions", "bag slots", "causal"}


class TestModel:
    """Mistakes between the ends."""

    def test_a_frozen_embedding(self):
        model = GPT()
        model.wte.weight.requires_grad_(False)
        wrong = failures(model, bags(4))
        assert list(wrong) == ["gradients"] and "wte.weight: it is frozen" in wrong["gradients"]

    def test_an_unused_parameter(self):
        model = GPT()
        model.mtp = nn.Linear(DIM, DIM, bias=False)
        assert "mtp.weight: no gradient (unused" in failures(model, bags(4))["gradients"]

    def test_a_parameter_whose_gradient_is_zero_or_not_finite(self):
        class Gate(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, gate):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad, torch.tensor([self.value])

        model = Returns(lambda m, ids, labels: m.head(Gate.apply(m.hidden(ids), m.gate), labels))
        model.gate = nn.Parameter(torch.zeros(1))
        for self.value, words in ((0.0, "a gradient of zeros"), (math.inf, "a gradient that is not finite")):
            assert f"gate: {words}" in failures(model, bags(4))["gradients"]

    def test_a_backward_pass_that_cannot_be_run_is_reported(self):
        def result(m, ids, labels):
            x = m.wte(ids) + m.wpe(torch.arange(BAGS))
            mask = nn.Transformer.generate_square_subsequent_mask(BAGS)
            x = checkpoint(m.block, x, mask, use_reentrant=True)  # refuses autograd.grad
            return m.head(F.rms_norm(x, (DIM,)), labels)

        report = check_setup(Returns(result), bags(4), tied=False)
        assert statuses(report) == dict.fromkeys(LINES, True) | {"gradients": None}
        assert report.checks[4].message.startswith("backward raised RuntimeError: When use_reentrant=True")

    def test_a_detached_body(self):
        model = Returns(lambda m, ids, labels: m.head(m.hidden(ids).detach(), labels))
        wrong = failures(model, bags(4))["gradients"]
        assert "wte.weight, wpe.weight, block.self_attn.in_proj_weight" in wrong and "head.weight" not in wrong
        assert "and 9 more: no gradient (unused, or detached on the way)" in wrong  # of 14

    @pytest.mark.parametrize("tied", [False, True])
    def test_tokens_that_are_not_read(self, tied):
        model = Returns(lambda m, ids, labels: m.head(m.hidden(ids[..., :2]), labels), tied=tied)
        wrong = failures(model, bags(4), tied=tied)
        assert "tokens at positions 3, 4 of 4 do not change the loss" in wrong["bag slots"]
        # The gradient of a tied weight is the head's too, in every row.
        assert tied or "wte.weight: no gradient for tokens" in wrong["gradients"]

    def test_a_model_that_is_not_causal(self):
        model = Returns(lambda m, ids, labels: m.head(m.hidden(ids, causal=False), labels))
        wrong = failures(model, bags(4))
        assert list(wrong) == ["causal"] and "make the attention causal over bags" in wrong["causal"]

    @pytest.mark.parametrize("first", [0, BAGS - 2])
    def test_one_bag_that_sees_the_next(self, first):
        """The mask is wrong in one place, at the beginning of a sequence or at its end."""

        def result(m, ids, labels):
            x = m.wte(ids) + m.wpe(torch.arange(BAGS))
            mask = nn.Transformer.generate_square_subsequent_mask(BAGS)
            mask[first, first + 1] = 0
            return m.head(F.rms_norm(m.block(x, mask), (DIM,)), labels)

        assert list(failures(Returns(result), bags(4))) == ["causal"]

    def test_the_noise_finds_a_leak_behind_projections_of_zeros(self):
        """Every block is the identity in a fresh model of this kind."""
        model = Returns(lambda m, ids, labels: m.head(m.hidden(ids, causal=False), labels))
        ids, labels = bags(4)
        other = ids.clone()
        other[:, -1] = 0
        labels[:, -1] = IGNORE
        assert model(ids, labels) == model(other, labels)
        assert "causal" in failures(model, bags(4))


class TestTied:
    def test_declared_but_not_shared(self):
        wrong = failures(GPT(tied=False), bags(4), tied=True)
        assert wrong == {"tied": "expected a head that shares wte.weight (tied), got one with a weight of its own"}

    def test_shared_but_declared_not_to_be(self):
        wrong = failures(GPT(tied=True), bags(4), tied=False)
        assert wrong == {"tied": "expected weights of their own (untied), but wte and head share one"}

    def test_two_parameters_over_one_memory(self):
        model = GPT()
        model.head.weight = nn.Parameter(model.wte.weight.data)
        wrong = failures(model, bags(4), tied=True)["tied"]
        assert "got two over one memory" in wrong and "assign wte.weight itself to head.weight" in wrong
        assert "expected weights of their own" in failures(model, bags(4), tied=False)["tied"]

    def test_a_head_that_is_no_module(self):
        def result(m, ids, labels):
            return linear_multi_hot_cross_entropy(m.hidden(ids), m.wte.weight, labels)

        model = Returns(result)
        del model.head
        assert statuses(check_setup(model, bags(4), tied=True))["tied"]
        assert "the loss uses wte.weight as its head" in failures(model, bags(4), tied=False)["tied"]

    def test_declared_by_a_configuration(self):
        model = GPT()
        model.config = SimpleNamespace(tie_word_embeddings=True, vocab_size=V)
        assert list(failures(model, bags(4))) == ["tied"]
        assert statuses(check_setup(model, bags(4), tied=False))["tied"]


class TestNoTrace:
    @pytest.mark.parametrize("broken", [False, True])
    def test_everything_is_as_it_was(self, broken):
        model = GPT(dropout=0.2)
        model.register_buffer("calls", torch.zeros(()))
        model.register_buffer("expanded", torch.zeros(1).expand(3))
        model.register_forward_pre_hook(lambda m, _: [m.calls.add_(1)] and None)
        model.block.eval()
        model.table = nn.Parameter(torch.arange(3), requires_grad=False)  # no noise fits integers
        model.wte.weight.grad = gradient = torch.ones(V, DIM)
        stepped = []
        model.head.weight.register_post_accumulate_grad_hook(stepped.append)  # an optimiser in the backward pass
        if broken:
            model.extra = nn.Linear(1, 1)
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        training = [module.training for module in model.modules()]
        with torch.no_grad():  # as a caller may be in
            failures(model, bags(4)) if broken else check_setup(model, bags(4))
            assert not torch.is_grad_enabled()
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before) and model.calls == 0
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.modules()] == training
        assert model.wte.weight.grad is gradient and (gradient == 1).all()
        assert model.head.weight.grad is None and stepped == []
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["table"]


@needs_gloo
class TestWrapped:
    @pytest.fixture(autouse=True)
    def group(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def test_ddp_still_trains_afterwards(self):
        model = nn.parallel.DistributedDataParallel(GPT(tied=True))
        assert check_setup(model, bags(2)) == check_setup(model.module, bags(2))
        for _ in range(2):
            model(*bags(2)).backward()

    def test_sharded_parameters_are_refused(self):
        model = fully_shard(GPT(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match="model: expected whole parameters, got DTensors: .* before fully_shard"):
            check_setup(model, bags(2))


class TestArguments:
    @pytest.mark.parametrize("batch", [None, torch.ones(2, 3, 4), (torch.ones(2),), {"ids": torch.ones(2)}, ([1], [2])])
    def test_another_kind_of_batch(self, batch):
        with pytest.raises(TypeError, match="batch: expected .bags, labels. or a dict with input_ids and labels, got"):
            check_setup(GPT(), batch)

    def test_more_than_a_pair(self):
        with pytest.raises(TypeError, match="got 3 things"):
            check_setup(GPT(), (*bags(4), None))

    def test_options(self):
        with pytest.raises(ValueError, match="objective: expected 'mce' or 'mce_alt', got 'bce'"):
            check_setup(GPT(), bags(4), objective="bce")
        with pytest.raises(ValueError, match="vocab_size: expected an integer >= 1, got 0"):
            check_setup(GPT(), bags(4), vocab_size=0)
        with pytest.raises(ValueError, match="ignore_index: expected an integer of 64 bits, got None"):
            check_setup(GPT(), bags(4), ignore_index=None)

    def test_floats(self):
        ids, labels = bags(4)
        assert failures(GPT(), (ids.float(), labels)) == {"batch": "bags: expected int64 or int32, got torch.float32"}


class TestHuggingFace:
    @pytest.fixture
    def hf(self):
        pytest.importorskip("transformers")
        from helpers import hf_cases
        from tst_ext.integrations import hf

        def model(family, **options):
            built = hf_cases.build(family)
            built.init_weights()
            with torch.no_grad():  # build() has made its logits large
                built.get_output_embeddings().weight.normal_(std=0.02)
            return hf.superpose(built, **options)

        return SimpleNamespace(model=model, fold_batch=hf.fold_batch, tokens=hf_cases.tokens)

    @pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2", "opt"])
    def test_families(self, hf, family):
        ids = hf.tokens(4, 22)
        mask = torch.ones_like(ids)
        mask[0, 15:] = 0
        labels = torch.where(mask == 1, ids, IGNORE)
        batch = hf.fold_batch(dict(input_ids=ids, labels=labels, attention_mask=mask), 4)
        assert all(statuses(check_setup(hf.model(family), batch)).values())

    @pytest.mark.parametrize("s", [1, 2, 8])
    def test_bag_sizes_and_mce_alt(self, hf, s):
        ids = hf.tokens(4, 40)
        batch = hf.fold_batch(dict(input_ids=ids, labels=ids), s, "mce_alt")
        report = check_setup(hf.model("llama", objective="mce_alt"), batch, objective="mce_alt")
        assert all(statuses(report).values())

    def test_the_configuration_declares_what_the_model_must_share(self, hf):
        ids = hf.tokens(4, 24)
        batch = hf.fold_batch(dict(input_ids=ids, labels=ids), 4)
        model = hf.model("llama_tied")
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        assert list(failures(model, batch)) == ["tied"]

    def test_labels_shifted_already(self, hf):
        ids = hf.tokens(4, 25)
        batch = hf.fold_batch(dict(input_ids=ids[:, :-1], labels=ids[:, 1:]), 4)
        assert "got tokens 5 ahead" in failures(hf.model("llama"), batch)["next bag"]
