"""docs/recipes.md: its diffs applied to the loops in tests/recipes, its code run as it stands there."""

import copy
import math
import re
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard

from helpers.cases import IGNORE, loss_and_gradients, magnitudes, plain
from helpers.model import BAG, DIM, VOCABULARY, Model, batch, leaves, normal, tokens
from helpers.numerics import assert_accurate
from helpers.processes import in_processes, needs_gloo
from tst_ext import (
    SuperpositionSchedule,
    check_setup,
    document_offsets,
    fold_inputs,
    fold_labels,
    linear_multi_hot_cross_entropy,
    reference,
)
from tst_ext.nn import BagEmbedding

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## "))


def block(title, language="python"):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[title], re.DOTALL | re.MULTILINE)
    return text


def run_block(title, **names):
    """The names that the section's code defines, itself executed with `names`."""
    exec(block(title), names)
    return types.SimpleNamespace(**names)


# ---- the diffs ------------------------------------------------------------------------------------------------------

LOOPS = {"nanogpt_style": "A loop like nanoGPT's", "nanochat_style": "A loop like nanochat's"}


def apply(diff, source):
    for hunk in re.split(r"^@@ .* @@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, f"expected once:\n{old}"
        source = source.replace(old, new)
    return source


def load(source):
    module = types.ModuleType("loop")
    exec(source, module.__dict__)
    return module


def recipe(name):
    """Return the loop before and after."""
    source = (TESTS / "recipes" / f"{name}.py").read_text(encoding="utf-8")
    return source, apply(block(LOOPS[name], "diff"), source)


def in_float64(match):
    return {"torch.bfloat16": "torch.float64", "float": "double"}[match[0]]


@pytest.fixture(params=LOOPS)
def sources(request):
    """The loop before and after. In float64, so that two ways of adding up are told from two losses."""
    torch.set_default_dtype(torch.float64)
    yield tuple(re.sub(r"torch\.bfloat16|(?<=\.)float(?=\(\))", in_float64, s) for s in recipe(request.param))
    torch.set_default_dtype(torch.float32)


# Rounding, 1e-16 an operation, leaves 4e-15 after ten steps of AdamW; another loss, another order of the
# tokens or a lost optimiser state moves the losses by a thousandth and more.
equal = partial(pytest.approx, rel=1e-12)


class TestLoops:
    def test_both_phases(self, sources):
        loop = load(sources[1])
        batches = []
        loop.model.register_forward_pre_hook(lambda module, inputs: batches.append(inputs))
        losses = loop.train()
        calls = len(batches) // len(losses)  # micro-batches a step
        for ids, labels in batches[: 3 * calls]:
            assert ids.shape[1:] == labels.shape[1:] == (16, 4)
            assert torch.equal(labels[:, :-1], ids[:, 1:])  # each bag's labels are the next bag, none its own
            assert (labels[:, -1] != -1).sum(1).tolist() == [1] * len(ids)
        for ids, labels in batches[3 * calls :]:
            assert ids.shape[1:] == labels.shape[1:] == (16,)
            assert torch.equal(labels[:, :-1], ids[:, 1:])
        # The mistakes that are made here give log(V) / s and s log(V).
        assert losses[0] == pytest.approx(math.log(loop.vocab_size), rel=0.1)
        assert losses[-1] < losses[3]

    def test_bag_size_1_is_the_loop_as_it_was(self, sources):
        assert sources[1].count("bag_size=4") == 1
        before, after = (
            load(source).train() for source in (sources[0], sources[1].replace("bag_size=4", "bag_size=1"))
        )
        assert after == equal(before)

    @pytest.mark.parametrize("reset", [False, True])
    def test_after_the_switch_it_is_the_loop_as_it_was(self, sources, reset):
        loop, before = load(sources[1]), load(sources[0])
        switch, steps, saved = loop.schedule.switch_step, [], []

        def save(*_):
            steps.append(None)
            if len(steps) == switch:
                state = [part.state_dict() for part in (loop.model, loop.optimizer)]
                saved.append((torch.get_rng_state(), copy.deepcopy(state)))

        loop.optimizer.register_step_post_hook(save)
        losses = loop.train()

        ((random, state),) = saved
        torch.set_rng_state(random)
        for part, values in zip((before.model, before.optimizer), state, strict=True):
            if not reset or part is before.model:
                part.load_state_dict(values)
        if hasattr(before, "data_loader"):
            B, T = before.device_batch_size, before.sequence_len
            before.train_loader = before.data_loader(B, T, position=switch * before.grad_accum_steps * B * 4 * T)
        expected = before.train(switch)
        if reset:  # what the other case would miss if it could
            assert abs(losses[-1] - expected[-1]) > 1e-3
        else:
            assert losses[switch:] == equal(expected)

    def test_validation_is_next_token_in_the_superposition_phase(self, sources):
        before, after = load(sources[0]), load(sources[1])
        ids = torch.arange(32).view(2, 16)
        losses = []
        for loop in (before, after):
            result = loop.model(ids, ids + 1)
            losses.append((result[1] if isinstance(result, tuple) else result).item())
        assert losses[1] == equal(losses[0])


class TestMasterWeights:
    """nanochat's dtypes: bfloat16 hidden states meet a float32 head."""

    @pytest.fixture
    def loop(self):
        return load(recipe("nanochat_style")[1])

    @staticmethod
    def as_nanochat(hidden, weight, bias, labels, **options):
        return reference.multi_hot_cross_entropy(F.linear(hidden, weight).float(), labels, **options)

    @pytest.mark.parametrize("s", [4, 1])
    def test_loss_and_gradient(self, loop, s):
        calls, op = [], loop.linear_multi_hot_cross_entropy

        def record(hidden, weight, labels, **options):
            calls.append(hidden.detach())
            return op(hidden, weight, labels, **options)

        loop.linear_multi_hot_cross_entropy = record
        torch.nn.init.normal_(loop.model.lm_head.weight, std=0.5)  # logits that the softcap of 15 bends
        ids, labels = batch_of_step(s, vocabulary=loop.vocab_size)
        labels[:, -1] = -1
        if s > 1:
            ids, labels = fold_inputs(ids, s), fold_labels(labels, s, shifted=True, ignore_index=-1)
        loss = loop.model(ids, labels)
        loss.backward()
        (hidden,) = calls
        options = dict(logit_softcap=15, ignore_index=-1)
        master = loop.model.lm_head.weight
        assert hidden.dtype == torch.bfloat16 and master.dtype == master.grad.dtype == loss.dtype == torch.float32
        assert not master.grad[loop.vocab_size :].any()

        # bfloat16 numbers are multiplied, so the reference begins with the weight that was cast.
        hidden, labels = hidden.flatten(0, 1), labels.reshape(-1, s)
        weight = master[: loop.vocab_size].detach().bfloat16()
        exact = loss_and_gradients(plain, hidden.double(), weight.double(), None, labels, **options)
        native = loss_and_gradients(self.as_nanochat, hidden, weight, None, labels, **options)
        sizes = magnitudes(hidden.double(), weight.double(), None, labels, 1.0, options)
        terms = max(*hidden.shape, *weight.shape)
        assert_accurate(loss, exact[0], native[0], terms, sizes[0])
        assert_accurate(master.grad[: loop.vocab_size], exact[2], native[2], terms, sizes[2])

    def test_both_phases_learn(self, loop):
        losses = loop.train()
        assert losses[0] == pytest.approx(math.log(loop.vocab_size), rel=0.1)
        assert losses[-1] < losses[3] and losses[2] < losses[0]
        floats = {name: p.dtype for name, p in loop.model.named_parameters()}
        assert {name for name, dtype in floats.items() if dtype == torch.bfloat16} == {
            "wte.weight",
            "value_embeds.1.weight",
        }

    def test_without_the_cast_the_op_refuses(self, loop):
        source = recipe("nanochat_style")[1]
        assert source.count("[:vocab_size].to(x.dtype)") == 1
        model = load(source.replace("[:vocab_size].to(x.dtype)", "[:vocab_size]")).model
        with pytest.raises(TypeError, match="weight: expected hidden's dtype torch.bfloat16, got torch.float32"):
            model(*batch_of_step(1, vocabulary=60))

    def test_check_setup(self, loop):
        report = check_setup(
            loop.model, next(loop.train_loader), ignore_index=-1, vocab_size=loop.vocab_size, tied=False
        )
        assert all(check.passed for check in report.checks)


# ---- the other recipes ----------------------------------------------------------------------------------------------


def double_model():
    return Model(dtype=torch.float64)


def batch_of_step(s, rows=slice(None), vocabulary=VOCABULARY):
    """ids and labels `[4, 2 s]` of one step, the rows of one rank."""
    ids = tokens(4, 2 * s + 1, seed=s) % vocabulary
    return ids[rows, :-1], ids[rows, 1:]


def assert_same(actual, expected):
    assert_accurate(actual, expected, expected, 4 * VOCABULARY)


def test_validation():
    model = double_model()
    batches = [batch_of_step(4), batch_of_step(4)]
    loss = run_block("Validation", torch=torch).validate(model, batches)
    exact = []
    for ids, labels in batches:
        logits = model.head(torch.relu(model.body(model.embedding(ids))))
        exact.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert not loss.requires_grad
    assert_same(loss, torch.stack(exact).mean())


def test_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = double_model()
    compile = partial(torch.compile, backend=counter)
    compiled = run_block("torch.compile", torch=types.SimpleNamespace(compile=compile), model=model).compiled
    for s in (BAG, BAG, 1, 1):
        ids, labels = batch_of_step(s)
        if s > 1:
            ids, labels = fold_inputs(ids, s), fold_labels(labels, s, shifted=True)
        assert_same(compiled(ids, labels), model(ids, labels))
    assert counter.frame_count == 2


def test_documents():
    lengths = [[5, 4, 7], [1, 6, 9]]  # tokens of document k are k, but its last one, 0
    ids = torch.tensor([[n for k, n in enumerate(row, 1) for n in [k] * (n - 1) + [0]] for row in lengths])
    labels = torch.cat((ids[:, 1:], torch.zeros(2, 1, dtype=torch.long)), 1)
    names = dict(document_offsets=document_offsets, fold_inputs=fold_inputs, fold_labels=fold_labels)
    recipe = run_block(
        "Bags that end with their document", **names, ids=ids, labels=labels, eos_token_id=0, s=4, model=double_model()
    )
    assert recipe.bags.shape == recipe.bag_labels.shape == (2, 4, 4)
    bags = zip(recipe.bags.flatten(0, 1).tolist(), recipe.bag_labels.flatten(0, 1).tolist(), strict=True)
    for inputs, targets in bags:
        document = set(inputs) - {0, IGNORE}
        assert len(document) <= 1 and set(targets) - {0, IGNORE} <= document
    assert (recipe.bag_labels != IGNORE).any() and recipe.loss.isfinite()


class TestCheckSetup:
    TITLE = "Check a loop before you train"

    def run(self, **names):
        torch.manual_seed(0)
        ids = torch.randint(64, (4, 25))
        names = dict(ids=ids[:, :-1], labels=ids[:, 1:], s=4, fold_inputs=fold_inputs, fold_labels=fold_labels) | names
        loop = load((TESTS / "recipes" / "nanogpt_style.py").read_text(encoding="utf-8"))

        class Untied(torch.nn.Module):  # the loop's layers, with a head of its own
            def __init__(self):
                super().__init__()
                self.wte = BagEmbedding(64, loop.n_embd)
                self.block = loop.model.h.layers[0]
                self.head = torch.nn.Linear(loop.n_embd, 64, bias=False)
                torch.nn.init.normal_(self.wte.weight, std=0.02)
                torch.nn.init.normal_(self.head.weight, std=0.02)

            def forward(self, ids, labels):
                x = self.wte(ids)
                mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
                x = F.rms_norm(self.block(x, mask), x.shape[-1:])
                return linear_multi_hot_cross_entropy(x, self.head.weight, labels)

        return run_block(self.TITLE, check_setup=check_setup, model=Untied(), **names)

    def test_the_code(self, capsys):
        self.run()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 9 and all(line.startswith("ok ") for line in lines)

    def test_the_report_of_the_page(self):
        def leak(labels, s, shifted):
            return labels.unflatten(1, (-1, s))

        with pytest.raises(ValueError) as error:
            self.run(fold_labels=leak)
        page = " ".join(block(self.TITLE, "text").split())
        assert re.sub(r"\d\.\d{3}, expected", "0, expected", " ".join(str(error.value).split())) == re.sub(
            r"\d\.\d{3}, expected", "0, expected", f"check_setup: {page}"
        )


def check_ranks(rank):
    ids, labels = batch(rows=8)
    mine = slice(4 * rank, 4 * rank + 4)
    model = torch.nn.parallel.DistributedDataParallel(double_model())
    parts = list(zip(ids[mine].split(1), labels[mine].split(1), strict=True))
    run_block("One exact loss over micro-batches and ranks", dist=dist).backward(model, parts)
    whole = double_model()
    whole(ids, labels, normalizer=(labels != IGNORE).sum()).backward()
    for mine, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert_same(mine.grad, expected.grad)


def check_switch(rank):
    schedule = SuperpositionSchedule(5, ratio=0.4, bag_size=BAG)
    names = dict(fold_inputs=fold_inputs, fold_labels=fold_labels)
    train = run_block("The switch under DDP and FSDP2", **names).train
    trained = []
    for model, rows in (
        (torch.nn.parallel.DistributedDataParallel(double_model()), slice(2 * rank, 2 * rank + 2)),
        (double_model(), slice(None)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        train(model, optimizer, schedule, partial(batch_of_step, rows=rows))
        trained.append(list(model.parameters()))
    for mine, expected, initial in zip(*trained, double_model().parameters(), strict=True):
        assert_same(mine - initial, expected - initial)


class ModelWithMTP(Model):
    def __init__(self):
        super().__init__(dtype=torch.float64)
        self.mtp = torch.nn.Linear(DIM, DIM, dtype=torch.float64)
        torch.nn.init.eye_(self.mtp.weight)
        torch.nn.init.zeros_(self.mtp.bias)

    def forward(self, ids, labels, later=None):
        x = torch.relu(self.body(self.embedding(ids)))
        loss = self.head(x, labels)
        return loss if later is None else loss + 0.3 * self.head(self.mtp(x), later)


def run_mtp(source, wrap, rows):
    """Return the parameters after training, and the head's weight after each step."""
    names = dict(fold_inputs=fold_inputs, fold_labels=fold_labels, torch=torch)
    names |= dict(DistributedDataParallel=torch.nn.parallel.DistributedDataParallel)
    exec(source, names)
    plain_model = ModelWithMTP()
    model = (wrap or names["wrap"])(plain_model)
    schedule, heads = SuperpositionSchedule(5, ratio=0.4, bag_size=BAG), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)  # decays what has a gradient, if only of zeros
    optimizer.register_step_post_hook(lambda *_: heads.append(whole(plain_model.mtp.weight)))
    names["train"](model, optimizer, schedule, partial(batch_of_step, rows=rows))
    return [whole(p) for p in plain_model.parameters()], heads


def whole(parameter):
    full = getattr(parameter, "full_tensor", lambda: parameter)()
    return full.detach().clone()


def fully_shard_each(model):
    fully_shard(model.mtp)
    return fully_shard(model)


def test_labels_of_a_head_for_the_bag_after_the_next():
    names = dict(fold_inputs=fold_inputs, fold_labels=fold_labels, torch=torch)
    exec(block("A head of one phase under DDP"), names)
    calls = []

    class Recorded(ModelWithMTP):
        def forward(self, *inputs):
            calls.append(inputs)
            return super().forward(*inputs)

    model = Recorded()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    numbers = torch.arange(4 * 4 * BAG + 1) % VOCABULARY  # four bags, so that there are bags after the next
    next_batch = lambda s: (numbers[: 4 * s].view(1, -1), numbers[1 : 4 * s + 1].view(1, -1))  # noqa: E731
    names["train"](model, optimizer, SuperpositionSchedule(2, ratio=0.5, bag_size=BAG), next_batch)
    (ids, _, later), (*_, nothing) = calls
    assert torch.equal(later[:, :2], ids[:, 2:]) and nothing is None
    # The last bag but one is trained on the one token that is known beyond the sequence, the last on none.
    assert later[0, 2:].tolist() == [[numbers[4 * BAG], *[IGNORE] * (BAG - 1)], [IGNORE] * BAG]


def test_labels_of_that_head_stay_in_their_document():
    line = "later[(labels == -100).all(-1)] = -100"
    assert f"`{line}`" in SECTIONS["A head of one phase under DDP"]
    lengths = torch.tensor([3, 7, 12, 2, 1, 9, 4, 10])
    ids = torch.arange(1, 9).repeat_interleave(lengths).view(2, 24)  # the tokens of document k are k
    folds = dict(cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), num_bags=12)
    bags, labels = fold_inputs(ids, 3, **folds), fold_labels(ids, 3, shifted=False, **folds)
    later = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), dim=1)
    document = bags[..., :1].expand_as(later)
    crosses = (later != IGNORE) & (later != document)
    assert crosses.any()
    exec(line, dict(later=later, labels=labels))
    assert not ((later != IGNORE) & (later != document)).any()
    assert (later != IGNORE).sum() == (lengths - 6).clamp_min(0).sum()  # all but two bags of each document


def check_head_of_one_phase(rank):
    source = block("A head of one phase under DDP")
    mine, alone = slice(2 * rank, 2 * rank + 2), slice(None)
    ddp = torch.nn.parallel.DistributedDataParallel
    expected, heads = run_mtp(source, lambda model: model, alone)
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[-1])  # trained in the first phase alone
    for wrap in (None, fully_shard, fully_shard_each):
        for p, q in zip(run_mtp(source, wrap, mine)[0], expected, strict=True):
            assert_same(p, q)
    for options in ({}, {"static_graph": True}):
        with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
            run_mtp(source, partial(ddp, **options), mine)
    # The head in both phases.
    both = re.sub(r"^    (        (?:end|later) = torch)", r"\1", source, flags=re.MULTILINE)
    assert both != source
    expected, heads = run_mtp(both, lambda model: model, alone)
    assert not torch.equal(heads[1], heads[-1])
    for p, q in zip(run_mtp(both, ddp, mine)[0], expected, strict=True):
        assert_same(p, q)


def check_divided_head(rank):
    head = torch.nn.Linear(DIM, VOCABULARY, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    (hidden,) = leaves(normal(7, DIM, dtype=torch.float64))
    labels = tokens(7, BAG, ignored=0.2)
    names = dict(head=head, hidden=hidden, labels=labels, rank=rank, world=2, V=VOCABULARY, group=dist.group.WORLD)
    names |= dict(linear_multi_hot_cross_entropy=linear_multi_hot_cross_entropy)
    loss = run_block("A head divided over the vocabulary", **names).loss
    whole = linear_multi_hot_cross_entropy(hidden, head.weight, labels)
    assert_same(loss, whole)
    for mine, expected in zip(*(torch.autograd.grad(each, hidden) for each in (loss, whole)), strict=True):
        assert_same(mine, expected)


def check_all(rank):
    check_ranks(rank)
    check_switch(rank)
    check_head_of_one_phase(rank)
    check_divided_head(rank)


@needs_gloo
def test_ranks(tmp_path):
    in_processes(2, check_all, tmp_path)
