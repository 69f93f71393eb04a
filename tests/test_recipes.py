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
from torch.nn.attention.flex_attention import create_mask

from helpers.cases import IGNORE, loss_and_gradients, magnitudes, plain
from helpers.model import BAG, DIM, VOCABULARY, Model, batch, leaves, normal, tokens
from helpers.numerics import assert_accurate
from helpers.processes import in_processes, needs_gloo
from tst_ext import (
    SuperpositionSchedule,
    bag_positions,
    check_setup,
    cu_bags,
    document_offsets,
    fold_inputs,
    fold_labels,
    linear_multi_hot_cross_entropy,
    position_weights,
    reference,
    slide_labels,
)
from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy

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


class Attention(torch.nn.Module):
    """A layer of one head. Bags see the earlier ones that the mask `[B, l, l]` shows, without a mask all."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(DIM, 3 * DIM, dtype=torch.float64)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class Packed(torch.nn.Module):
    """A model of packed documents, with positions. Its loss is a sum, so that those of parts add up."""

    def __init__(self):
        super().__init__()
        self.embedding = BagEmbedding(VOCABULARY, DIM, padding_idx=IGNORE, dtype=torch.float64)
        self.position = torch.nn.Embedding(20, DIM, dtype=torch.float64)
        self.attention = Attention()
        self.head = LinearMultiHotCrossEntropy(DIM, VOCABULARY, reduction="sum", dtype=torch.float64)
        initialise(self)

    def forward(self, bags, labels, positions, mask):
        return self.head(self.attention(self.embedding(bags) + self.position(positions), mask), labels)


def initialise(model):
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=seed))


FOLDS = dict(fold_inputs=fold_inputs, fold_labels=fold_labels, bag_positions=bag_positions)


class TestDocuments:
    TITLE = "Bags that end with their document"
    S, L = 3, 30

    def run(self):
        """The page's code, on sequences with documents that are shorter than a bag, and longer than what is left."""
        ids = tokens(2, self.L + 1).clamp_min(1)
        for row, ends in enumerate(([1, 6, 20], [10, 11, 12, 17])):
            ids[row, ends] = 0
        names = dict(**FOLDS, document_offsets=document_offsets, eos_token_id=0, s=self.S, model=Packed())
        return run_block(self.TITLE, **names, ids=ids[:, :-1], labels=ids[:, 1:])

    def test_a_packed_batch_is_its_documents_apart(self):
        recipe = self.run()
        apart, dropped = [], 0
        for row in recipe.ids:
            ends = [*(i + 1 for i, token in enumerate(row.tolist()) if token == 0), self.L]
            left = self.L // self.S
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                document = row[begin:end]
                alone = dict(cu_seqlens=torch.tensor([0, end - begin]))
                bags = fold_inputs(document, self.S, **alone)[None, :left]
                labels = fold_labels(document, self.S, shifted=False, **alone)[None, :left]
                dropped += -(-len(document) // self.S) - bags.shape[1]
                left -= bags.shape[1]
                apart.append(recipe.model(bags, labels, torch.arange(bags.shape[1])[None], None))
        assert len(apart) == 9 and dropped == 3
        assert_same(recipe.loss, sum(apart))
        parameters = tuple(recipe.model.parameters())
        for packed, expected in zip(
            torch.autograd.grad(recipe.loss, parameters), torch.autograd.grad(sum(apart), parameters), strict=True
        ):
            assert_same(packed, expected)

    def test_flex_and_variable_length_attention_see_the_same(self):
        recipe = self.run()
        condition = "(q >= k) & (document[b, q] == document[b, k])"
        assert f"`{condition}`" in SECTIONS[self.TITLE]
        shown = eval(f"lambda b, h, q, k: {condition}", dict(document=recipe.document))
        length = self.L // self.S
        assert torch.equal(create_mask(shown, 2, None, length, length, device="cpu")[:, 0], recipe.mask)
        offsets = cu_bags(recipe.positions)
        ones = [torch.ones(n, n).tril() for n in offsets.diff().tolist()]
        assert torch.equal(torch.block_diag(*ones), torch.block_diag(*recipe.mask).float())


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


MTP = "Multi-token prediction"


def multi_token(title, reduction="mean"):
    """Return a model of the section, and the code of the page that trains it."""
    names = dict(**FOLDS, nn=torch.nn, F=F, torch=torch)
    exec(block(MTP), names)
    exec(block("Parallel heads"), names)
    depths = [names["Depth"](DIM, Attention()) if title == MTP else names["ParallelHead"](DIM) for _ in range(2)]
    model = names["MultiToken" if title == MTP else "Parallel"](
        BagEmbedding(VOCABULARY, DIM, padding_idx=IGNORE),
        Attention(),
        LinearMultiHotCrossEntropy(DIM, VOCABULARY, reduction=reduction),
        depths,
    ).double()
    initialise(model)
    return model, names["train"]


def documents_of_step(s, rows=slice(None)):
    """ids and labels `[4, 6 s]` and the documents, which are the same in each sequence; the rows of one rank."""
    ids = tokens(4, 6 * s + 1, seed=s)[rows]
    ends = torch.arange(len(ids))[:, None] * 6 * s + torch.tensor([4 * s - 1, 6 * s])
    return ids[:, :-1], ids[:, 1:], F.pad(ends.flatten(), (1, 0))


multi_token_titles = pytest.mark.parametrize("title", [MTP, "Parallel heads"])


@multi_token_titles
def test_multi_token_prediction_is_that_of_documents_apart(title):
    model, train = multi_token(title, reduction="sum")
    ids, lengths = tokens(1, 24), [9, 3, 6, 6]

    def loss(ids, lengths):
        """Of the first step of the page's loop."""
        results = []

        def record(*arguments, **options):
            loss = model(*arguments, **options)
            results.append((loss, *torch.autograd.grad(loss, tuple(model.parameters()), retain_graph=True)))
            return loss

        batch = ids, F.pad(ids[:, 1:], (0, 1)), F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        train(record, optimizer, SuperpositionSchedule(2, 0.5, BAG), lambda s: batch, depths=2)
        return results[0]

    together, *parts = loss(ids, lengths), *(loss(part, [part.shape[1]]) for part in ids.split(lengths, dim=1))
    for packed, *apart in zip(together, *parts, strict=True):
        assert_same(packed, sum(apart))


@multi_token_titles
def test_no_depth_reads_its_labels(title):
    model, _ = multi_token(title)
    ids = torch.arange(5).repeat_interleave(BAG)[None]  # the tokens of bag j are j
    bags, nothing = fold_inputs(ids, BAG), torch.full((1, 5, BAG), IGNORE)
    for k in (1, 2):
        later = [nothing, nothing]
        later[k - 1] = fold_labels(ids, BAG, shifted=False, offset=k).index_fill(1, torch.arange(1, 5), IGNORE)
        assert later[k - 1][0, 0].tolist() == [k + 1] * BAG
        (gradient,) = torch.autograd.grad(model(bags, nothing, *later), model.embedding.weight)
        assert gradient.any(1).nonzero().flatten().tolist() == (list(range(k + 1)) if title == MTP else [0])


@multi_token_titles
def test_validation_is_free_of_later_tokens(title):
    model, _ = multi_token(title)
    ids, labels, _ = documents_of_step(2)
    loss = run_block("Validation", torch=torch).validate(model, [(ids, labels)])
    for parameter in model.depths.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    logits = model.head(model.trunk(model.embedding(ids)))
    assert_same(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert_same(model(ids, labels), loss)


def run_multi_token(title, wrap, rows, one_phase=False):
    """Return the parameters after training, and a weight of the last depth after each step."""
    model, train = multi_token(title)
    wrapped, weights = wrap(model), []

    def call(bags, labels, *later, mask):
        skip = one_phase and labels.shape[-1] == 1
        return wrapped(bags, labels, *(() if skip else later), mask=mask)

    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, weight_decay=0.1)  # of what has a gradient, if only of zeros
    optimizer.register_step_post_hook(lambda *_: weights.append(whole(next(model.depths[-1].parameters()))))
    schedule = SuperpositionSchedule(4, ratio=0.5, bag_size=BAG)
    train(call, optimizer, schedule, partial(documents_of_step, rows=rows), depths=2)
    return [whole(p) for p in model.parameters()], weights


def whole(parameter):
    full = getattr(parameter, "full_tensor", lambda: parameter)()
    return full.detach().clone()


def fully_shard_each(model):
    for depth in model.depths:
        fully_shard(depth)
    return fully_shard(model)


def check_multi_token_prediction(rank):
    mine, alone = slice(2 * rank, 2 * rank + 2), slice(None)
    ddp = torch.nn.parallel.DistributedDataParallel
    for title in (MTP, "Parallel heads"):
        expected, weights = run_multi_token(title, lambda model: model, alone)
        assert not torch.equal(weights[-2], weights[-1])  # trained in the second phase too
        for wrap in (ddp, fully_shard_each):
            for p, q in zip(run_multi_token(title, wrap, mine)[0], expected, strict=True):
                assert_same(p, q)
    # In one phase alone.
    expected, weights = run_multi_token(MTP, lambda model: model, alone, one_phase=True)
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[-1])
    for wrap in (partial(ddp, find_unused_parameters=True), fully_shard_each):
        for p, q in zip(run_multi_token(MTP, wrap, mine, one_phase=True)[0], expected, strict=True):
            assert_same(p, q)
    for options in ({}, {"static_graph": True}):
        with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
            run_multi_token(MTP, partial(ddp, **options), mine, one_phase=True)


@multi_token_titles
def test_a_depth_without_labels_has_gradients_of_zeros(title):
    model, _ = multi_token(title)
    ids, labels, _ = documents_of_step(2)
    model(ids, labels, *[torch.full_like(labels, IGNORE)] * 2).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.depths.parameters())


def test_a_depth_learns_no_label_whose_bag_it_cannot_read():  # as num_bags leaves them
    model, _ = multi_token(MTP)
    ids, labels, _ = documents_of_step(2)
    later = [labels, labels.flip(1)]
    cut = [torch.cat((t[:, :-k], torch.full_like(t[:, -k:], IGNORE)), 1) for k, t in enumerate(later, 1)]
    assert torch.equal(model(ids, labels, *later), model(ids, labels, *cut))


def test_output_only():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, steps, calls = double_model(), 5, []
    compiled = torch.compile(model, backend=counter, dynamic=False)

    def record(ids, labels, **options):
        calls.append((ids, labels, options["position_weights"], compiled(ids, labels, **options)))
        return calls[-1][3]

    names = dict(position_weights=position_weights, slide_labels=slide_labels, torch=torch)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run_block("Output-only superposition", **names).train(record, optimizer, steps, BAG, partial(documents_of_step, 2))
    assert counter.frame_count == 1
    for step, (ids, labels, weights, loss) in enumerate(calls):
        assert weights.tolist() == pytest.approx([1, 1 - step / 4, 1 - step / 4])
        assert_same(loss, model(ids, labels, position_weights=weights))
    logits = model.head(torch.relu(model.body(model.embedding(ids)))).flatten(0, 1)
    assert_same(loss, F.cross_entropy(logits, labels[..., 0].flatten()))  # the last step is an ordinary one
    valid = labels[0] != IGNORE  # of a document of 7 tokens and one of 5
    assert valid.sum(1).tolist() == [3, 3, 3, 3, 2, 1, 0, 3, 3, 2, 1, 0][: len(valid)]


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
    check_multi_token_prediction(rank)
    check_divided_head(rank)


@needs_gloo
def test_ranks(tmp_path):
    in_processes(2, check_all, tmp_path)
