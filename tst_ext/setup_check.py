"""Check the model and a batch of a training loop before it trains: `check_setup`."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import nn as torch_nn

from ._checks import INTEGER, check_integer
from .nn import BagEmbedding, LinearMultiHotCrossEntropy

__all__ = ["Check", "SetupReport", "check_setup"]

LINEAR = (torch_nn.Linear, LinearMultiHotCrossEntropy)  # the types of a head

# A mistake in the divisor is a factor of 2 or more, or of 1/2 or less. The loss of fresh weights is log V + var z / 2,
# below log V (Jensen) by no more than the noise of its labels, std z / sqrt(labels), which is 3 % of log V = 4.2 for 32
# labels and std z = 0.7. Above, var z / 2 is 1.6 for GPT-2's initialisation at d = 8192, and the parts of the loss that
# are not of the next bag add to it: sqrt(2) is the middle, by ratio, between none of this and a factor of 2.
LEAST, MOST = 0.9, 2**0.5
# GPT-2's initialisation. Fresh models often have projections of zeros, through which no gradient and no token passes.
NOISE = 0.02
# Without a leak the two losses are equal bit by bit, unless other rows change the order of additions, as with
# routed experts. A mask that lets one later bag through moves the loss of a bag by 0.006 of what its own tokens do
# among 256 bags, by 0.08 among 32.
ROUNDING = 1e-3

Result = tuple[bool | None, str]  # of a check: whether it passed, and why


class Check(NamedTuple):
    """Hold one line of a report."""

    name: str
    passed: bool | None  # None: it could not be checked
    message: str


class SetupReport(NamedTuple):
    """Hold the checks that `check_setup` made; `str(report)` has a line for each."""

    checks: tuple[Check, ...]

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "not checked"}
        return "\n".join(f"{words[passed]:<11}  {name}: {message}" for name, passed, message in self.checks)


def check_setup(
    model: Callable[..., Any],
    batch: tuple[Tensor, Tensor] | Mapping[str, Any],
    *,
    objective: str = "mce",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    tied: bool | None = None,
) -> SetupReport:
    """Tell a training loop for bags apart from its common mistakes, by one batch and a fresh model.

    Call it once, before the first step, on the model before DDP, `fully_shard` or `torch.compile`. It checks

    - batch: bags and labels have one shape `[B, l, s]`, and ids are in `[0, V)`;
    - labels: each position of the bags has labels, not one label s times, and the last bag none made of filler;
    - next bag: the labels of bag j are the tokens of bag j + 1, found by comparing labels and tokens at every offset
      from 0 to 2 s over the whole batch, so that tokens which repeat by nature are no leak;
    - loss: as of fresh weights, between 0.9 and 1.4 times log V ("mce_alt": the mean of log(V / distinct labels));
    - gradients: every parameter that requires one gets a finite gradient that is not 0, and so does the row of every
      token that occurs in a bag with labels;
    - label positions, bag slots: the labels and the tokens at each position of the bags change the loss;
    - causal: later bags do not change the loss of earlier ones;
    - tied: embedding and head share one Parameter, or no memory, as declared.

    From gradients on, parameters have noise of 0.02 added, because layers that begin as zeros hide what is behind them.
    Afterwards parameters, buffers, gradients, training flags and random state (CPU and CUDA) are what they were. It
    takes up to 2 s + 14 forward passes, one backward pass, and memory for a copy of the parameters and their gradients.

    Args:
        model: `model(*batch)`, or `model(**batch)` for a dict. It returns the loss: a 0-d tensor, a tuple with one (of
            several the first), or an object or dict with `loss`. Of a callable that is no `nn.Module`, nor a method of
            one, parameters cannot be checked.
        batch: what the loop gives the model in the superposition phase: `(bags, labels)`, int64 or int32, each
            `[B, l, s]`, or a dict with `input_ids` and `labels`, as `tst_ext.integrations.hf.fold_batch` makes. Ids
            below 0, and the `padding_idx` of a `BagEmbedding`, are empty slots. Give at least 2 sequences of 4 bags.
        objective: the loss, "mce" or "mce_alt".
        ignore_index: the label that the loss skips.
        vocab_size: V. By default `model.config.vocab_size`, or else the rows of the embedding.
        tied: whether embedding and head share their weight. By default `model.config.tie_word_embeddings`.

    Returns:
        A report with a line per check. What cannot be determined is "not checked", and the line says why.

    Raises:
        TypeError: the batch is of another kind, or a parameter is a DTensor.
        ValueError: a check failed. The message is the report, and says for each failure what was expected, what came
            and what to do.

    It cannot tell: a divisor that is wrong by less than a factor of 1.4; which rows of a tied embedding the input
    reaches; a loss that reads later bags on purpose, as some multi-token prediction modules do, which fails "causal";
    experts that the batch does not reach, which fail "gradients". Weights of 0 for a position fail "label positions" in
    the loss, "bag slots" in the embedding.
    """
    if objective not in ("mce", "mce_alt"):
        raise ValueError(f"objective: expected 'mce' or 'mce_alt', got {objective!r}")
    check_integer("ignore_index", ignore_index)
    if vocab_size is not None:
        check_integer("vocab_size", vocab_size, 1)
    setup = _Setup(model, batch, ignore_index, vocab_size)
    checks = [Check("batch", *setup.check_batch())]
    raised = None
    if checks[0].passed:
        checks += [Check("labels", *setup.check_labels()), Check("next bag", *setup.check_next_bag())]
        with _restored(setup.module):
            try:
                checks.append(Check("loss", *setup.check_loss(objective)))
            except Exception as error:
                raised = error
                checks.append(Check("loss", False, f"{setup.call} raised {type(error).__name__}: {error}"))
            else:
                _add_noise(setup.module)
                checks += setup.check_noisy(tied)
    report = SetupReport(tuple(checks))
    if any(check.passed is False for check in checks):
        raise ValueError(f"check_setup:\n{report}") from raised
    return report


class _Setup:
    """Hold the model and the batch of a loop, and check them."""

    def __init__(self, model: Any, batch: Any, ignore_index: int, vocab_size: int | None) -> None:
        if isinstance(model, torch_nn.parallel.DistributedDataParallel):
            model = model.module  # whose configuration and names the checks use
        self.model, self.batch, self.ignore_index = model, batch, ignore_index
        keys: tuple[Any, Any] = ("input_ids", "labels") if isinstance(batch, Mapping) else (0, 1)
        known = keys[0] in batch and keys[1] in batch if isinstance(batch, Mapping) else isinstance(batch, tuple | list)
        if not known or len(batch) < 2 or not all(isinstance(batch[key], Tensor) for key in keys):
            raise TypeError(f"batch: expected (bags, labels) or a dict with input_ids and labels, got {_kind(batch)}")
        if not isinstance(batch, Mapping) and len(batch) != 2:
            raise TypeError(f"batch: expected (bags, labels), got {len(batch)} things")
        self.call = "model(**batch)" if isinstance(batch, Mapping) else "model(bags, labels)"
        self.ids, self.labels = (batch[key] for key in keys)
        self.module = _module_of(model)
        config: Any = getattr(self.module, "config", None)
        get_text_config = getattr(config, "get_text_config", None)  # of transformers
        self.config = config if get_text_config is None else get_text_config()
        parameters = [] if self.module is None else list(self.module.parameters())
        if any(hasattr(p, "placements") for p in parameters):  # a DTensor
            raise TypeError("model: expected whole parameters, got DTensors: call check_setup before fully_shard")
        self.cuda = sorted({t.device.index for t in (*parameters, self.ids) if t.device.type == "cuda"})
        self.tables = _tables(self.module)
        rows = {table.num_embeddings for table in self.tables.values()}
        known_size = vocab_size or getattr(self.config, "vocab_size", None)
        self.vocab_size: int | None = known_size or (rows.pop() if len(rows) == 1 else None)

    def loss(self, ids: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Compute the model's loss, of other ids or labels where they are given. Random numbers are the same always."""
        ids, labels = self.ids if ids is None else ids, self.labels if labels is None else labels
        with torch.enable_grad(), torch.random.fork_rng(self.cuda):
            if not isinstance(self.batch, Mapping):
                return _loss_of(self.model(ids, labels))
            batch = dict(self.batch, input_ids=ids, labels=labels)
            shifted = batch.get("shift_labels")
            if isinstance(shifted, Tensor) and shifted.shape == labels.shape:  # a model may read these instead
                batch["shift_labels"] = labels
            return _loss_of(self.model(**batch))

    # ---- the batch alone ---------------------------------------------------------------------------------------------

    def check_batch(self) -> Result:
        ids, labels = self.ids, self.labels
        for name, tensor in (("bags", ids), ("labels", labels)):
            if tensor.dtype not in INTEGER:
                return False, f"{name}: expected int64 or int32, got {tensor.dtype}"
        if ids.dim() != 3 or not ids.numel():
            hint = "; fold_inputs(ids, s) makes them" if ids.dim() == 2 else ""
            return False, f"bags: expected [B, l, s], none of them 0, got shape {tuple(ids.shape)}{hint}"
        if labels.shape != ids.shape:
            got = f"got shape {tuple(labels.shape)}"
            why = "they were never bagged: use fold_labels(labels, s, shifted=...)"
            hint = f"; {why}" if labels.dim() == 2 else ""
            return False, f"labels: expected the shape of the bags, {tuple(ids.shape)}, {got}{hint}"
        self.valid = labels != self.ignore_index
        self.filled = ids >= 0
        for table in self.tables.values():
            padding = getattr(table, "bag_padding_idx", None)
            if padding is not None:
                self.filled &= ids != padding
        most = math.inf if self.vocab_size is None else self.vocab_size
        for name, wrong in (
            ("bags", ids[self.filled & (ids >= most)]),
            ("labels", labels[self.valid & ((labels < 0) | (labels >= most))]),
        ):
            if wrong.numel():
                first, count = int(wrong[0]), wrong.numel()
                wanted = "ids >= 0" if self.vocab_size is None else f"ids in [0, {self.vocab_size})"
                what = f"{name}: expected {wanted}"
                if name == "labels":
                    what += f" or ignore_index = {self.ignore_index}"
                what += f", got {first} ({count} such places)"
                if name == "labels" and first < 0:
                    what += f": pass ignore_index={first} here and to the loss, or fill with {self.ignore_index}"
                return False, what
        return True, f"bags and labels {tuple(ids.shape)}" + (f", V = {self.vocab_size}" if self.vocab_size else "")

    def check_labels(self) -> Result:
        sequences, bags, s = self.ids.shape
        counts = self.valid.sum((0, 1)).tolist()
        found = f"labels at positions 1 to {s}: {', '.join(map(str, counts))} of {sequences * bags} bags"
        if not any(counts):
            return False, f"expected labels, but all are ignore_index = {self.ignore_index}"
        empty = [i + 1 for i, count in enumerate(counts) if count == 0]
        if empty and bags > 1:
            return False, (
                f"expected labels at every position of the bags, got none at {_numbers(empty)} of {s}: "
                "fold_labels gives all tokens of the next bag"
            )
        if s > 1 and self.valid.all(-1).any() and (self.filled & (self.ids != self.ids[..., :1])).any():
            full = self.labels[self.valid.all(-1)]
            if len(full) > 1 and (full == full[:, :1]).all():
                return False, f"expected the s = {s} tokens of the next bag, got one label {s} times in every bag"
            last = self.labels[:, -1, 1:]
            if self.valid[:, -1, 1:].all() and last.numel() > 3 and (last == last[0, 0]).all():
                return False, (
                    f"expected ignore_index = {self.ignore_index} past the end of a sequence, got {int(last[0, 0])} in "
                    f"the last bag of all: pass ignore_index={self.ignore_index} to fold_labels"
                )
        return True, found

    def check_next_bag(self) -> Result:
        s = self.ids.shape[2]
        ids, filled = self.ids.flatten(1), self.filled.flatten(1)
        labels, valid = self.labels.flatten(1), self.valid.flatten(1)
        equal: dict[int, float] = {}
        for k in range(min(2 * s + 1, ids.shape[1])):
            both = valid[:, : ids.shape[1] - k] & filled[:, k:]
            if both.any():
                equal[k] = (labels[:, : ids.shape[1] - k] == ids[:, k:])[both].double().mean().item()
        if s not in equal:
            return None, "no bag with labels has a next bag: give sequences of several bags"
        if equal[s] == 1:
            return True, "the labels of each bag are the tokens of the next"
        best = max(equal, key=lambda k: equal[k])
        if equal[best] == 1:
            # labels[t] is ids[t + best], and should be ids[t + s].
            came = f"expected labels that are the tokens of the next bag, {s} tokens ahead, got tokens {best} ahead"
            if best > s:
                return False, f"{came}: labels shifted already were shifted again; use fold_labels(..., shifted=True)"
            seen = "all labels are" if best == 0 else f"{s - best} of {s} labels are"
            fix = "fold_labels(..., shifted=True) for labels[t] = ids[t + 1], shifted=False for labels[t] = ids[t]"
            return False, f"{came}, so {seen} in the bag that is trained on them; use {fix}"
        if best == s and equal[s] > 0.5:
            return None, f"{equal[s]:.0%} of the labels are the tokens of the next bag, as with inputs that are altered"
        return False, (
            f"expected labels that are the tokens of the next bag, got {equal[s]:.0%} that are (at an offset of {best} "
            f"tokens {equal[best]:.0%}): fold ids and labels of the same sequence"
        )

    # ---- the loss of fresh weights -----------------------------------------------------------------------------------

    def check_loss(self, objective: str) -> Result:
        loss = self.loss()
        value, s = loss.item(), self.ids.shape[2]
        if not math.isfinite(value):
            return False, f"expected a finite loss, got {value}"
        if self.vocab_size is None:
            return None, f"{value:.3f}, to compare with log V: pass vocab_size="
        log_v = math.log(self.vocab_size)
        labels = torch.where(self.valid, self.labels, -1).flatten(0, 1).sort(-1).values
        distinct = ((labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] >= 0)).sum(-1) + (labels[:, 0] >= 0)
        log_v_alt = log_v - distinct[distinct > 0].double().log().mean().item()
        wanted, formula = (log_v, "log V") if objective == "mce" else (log_v_alt, "log(V / distinct labels)")
        least, most = LEAST * wanted, MOST * wanted
        text = f"{value:.3f}, expected {least:.3f} to {most:.3f} of fresh weights ({formula} = {wanted:.3f})"
        if least <= value <= most:
            return True, text
        other, name = (log_v_alt, "mce_alt") if objective == "mce" else (log_v, "mce")
        count, bags = int(self.valid.sum()), len(distinct)
        guesses = [
            (1 / s, f"log(V) / s: the loss reads one label of {s}, or divides by s once too often"),
            (other / wanted, f"the loss of {name!r}: pass objective={name!r} if the loop means it"),
            (count / bags, f"{s} times as much: divide by the number of labels, not of bags"),
            (count / s if objective == "mce" else (distinct > 0).sum().item(), "a sum over bags: take the mean"),
            (count, "a sum over labels: divide by their number"),
        ]
        near = [why for guess, why in guesses if LEAST * guess <= value / wanted <= MOST * guess]
        why = f"this is {near[0]}" if near else "the divisor is no count of labels, or the fresh logits are large"
        return False, f"{text}: {why}; or the weights are not fresh"

    # ---- with noise in the parameters --------------------------------------------------------------------------------

    def check_noisy(self, tied: bool | None) -> list[Check]:
        loss = self.loss()
        base = loss.detach()
        gradients: dict[str, Tensor | None] = {}
        checks: dict[str, Callable[[], Result]] = {
            "gradients": lambda: self.check_gradients(loss, gradients),  # fills them in
            "label positions": lambda: self.check_label_positions(base),
            "bag slots": lambda: self.check_bag_slots(base),
            "causal": self.check_causal,
            "tied": lambda: self.check_tied(tied, gradients),
        }
        results = []
        for name, check in checks.items():
            if base.element_size() < 4 and name in ("label positions", "bag slots", "causal"):
                result: Result = None, f"a loss in {base.dtype} is too coarse: return it in float32"
            else:
                try:
                    result = check()
                except Exception as error:
                    what = "backward" if name == "gradients" else f"{self.call} with other ids or labels"
                    result = None, f"{what} raised {type(error).__name__}: {error}"
            results.append(Check(name, *result))
        return results

    def check_gradients(self, loss: Tensor, gradients: dict[str, Tensor | None]) -> Result:
        if self.module is None:
            return None, "expected an nn.Module, or a method of one"
        wanted = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        gradients |= dict.fromkeys(wanted)
        if wanted and loss.requires_grad:
            # Not backward(): that would add to .grad, and run optimisers that wait for it.
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            gradients |= zip(wanted, found, strict=True)
        wrong = []
        for fault, names in {
            "no gradient (unused, or detached on the way)": [k for k, g in gradients.items() if g is None],
            "a gradient that is not finite": [
                k for k, g in gradients.items() if g is not None and not g.isfinite().all()
            ],
            "a gradient of zeros": [k for k, g in gradients.items() if g is not None and g.numel() and not g.any()],
        }.items():
            if names:
                wrong.append(f"{_some(names)}: {fault}")
        tokens = self.ids[self.filled & self.valid.any(-1, keepdim=True)].unique()
        for name, table in self.tables.items():
            gradient = self._gradient_of(table, gradients)
            if not table.weight.requires_grad:
                wrong.append(f"{name}.weight: it is frozen, requires_grad=False")
            elif gradient is not None and gradient.any():
                missed = tokens[~gradient[tokens].any(-1)]
                if missed.numel():
                    wrong.append(f"{name}.weight: no gradient for tokens {_some(missed.tolist())} of {len(tokens)}")
        if wrong:
            return False, f"expected a gradient in every parameter and token, got {'; '.join(wrong)}"
        frozen = [name for name, p in self.module.named_parameters() if not p.requires_grad]
        note = f"; frozen: {_some(frozen)}" if frozen else ""
        rows = f", {len(tokens)} tokens" if self.tables else "; no embedding found, so tokens are not checked"
        return True, f"{len(gradients)} parameters{rows}{note}"

    def _gradient_of(self, table: torch_nn.Embedding, gradients: dict[str, Tensor | None]) -> Tensor | None:
        assert self.module is not None
        for name, parameter in self.module.named_parameters():
            if parameter is table.weight:
                return gradients.get(name)
        return None

    def check_label_positions(self, base: Tensor) -> Result:
        s = self.ids.shape[2]
        if s == 1 or self.valid.sum((0, 1)).count_nonzero() < 2:
            return True, "one label per bag"
        lost = []
        for i in range(s):
            labels = self.labels.clone()
            labels[..., i] = self.ignore_index
            if self.valid[..., i].any() and torch.equal(self.loss(labels=labels), base):
                lost.append(i + 1)
        if lost:
            return False, (
                f"expected a loss that depends on all labels of a bag, but those at {_numbers(lost)} of {s} do not "
                "change it: they are cut off on the way, or position_weights are 0 there"
            )
        return True, f"the labels at all {s} positions change the loss"

    def check_bag_slots(self, base: Tensor) -> Result:
        s, other = self.ids.shape[2], self._other_ids()
        if other is None:
            return None, "the batch has one token: give one of several"
        lost = []
        for i in range(s):
            ids = self.ids.clone()
            ids[..., i] = other[..., i]
            if self.filled[..., i].any() and torch.equal(self.loss(ids), base):
                lost.append(i + 1)
        if lost:
            return (
                False,
                f"expected whole bags to be read, but tokens at {_numbers(lost)} of {s} do not change the loss",
            )
        return True, f"the tokens at all {s} positions change the loss"

    def check_causal(self) -> Result:
        bags, other = self.ids.shape[1], self._other_ids()
        labelled = self.valid.any(-1).any(0)[: bags - 1].nonzero().flatten().tolist()
        if other is None or not labelled:
            return None, "no bag with labels has a next bag, or the batch has one token"
        bag = torch.arange(bags, device=self.ids.device).view(1, bags, 1)
        for this in sorted({labelled[0], labelled[-1]}):
            later = bag > this
            if not (self.filled & later).any():
                continue
            labels = torch.where(bag == this, self.labels, self.ignore_index)
            base = self._label_loss(self.ids, labels)
            seen = self._label_loss(torch.where(later, other, self.ids), labels) - base
            own = self._label_loss(torch.where(bag == this, other, self.ids), labels) - base
            if not abs(seen) <= ROUNDING * abs(own):
                return False, (
                    f"expected a loss of bag {this + 1} that later bags do not change, but they move it by {seen:.2g} "
                    f"(its own tokens by {own:.2g}): make the attention causal over bags"
                )
        return True, "later bags do not change the loss of earlier ones"

    def _label_loss(self, ids: Tensor, labels: Tensor) -> float:
        """Compute the part of the loss that depends on labels: a router's balancing loss sees the whole batch."""
        rest = self.loss(ids, torch.full_like(labels, self.ignore_index)).item()
        return self.loss(ids, labels).item() - (rest if math.isfinite(rest) else 0)  # 0 / 0 in plain torch

    def _other_ids(self) -> Tensor | None:
        """Replace each token by another one of the batch."""
        tokens = self.ids[self.filled].unique()
        if len(tokens) < 2:
            return None
        place = torch.searchsorted(tokens, self.ids.clamp_min(tokens[0]).clamp_max(tokens[-1]))
        return torch.where(self.filled, tokens.roll(-1)[place], self.ids)

    def check_tied(self, tied: bool | None, gradients: dict[str, Tensor | None]) -> Result:
        if not self.tables:
            return None, "no embedding found in the model"
        assert self.module is not None
        declared = getattr(self.config, "tie_word_embeddings", None) if tied is None else tied
        parts = [(name, m.weight) for name, m in self.module.named_modules() if isinstance(m, LINEAR)]
        for name, table in self.tables.items():
            memory = [(n, w) for n, w in parts if _memory(w) == _memory(table.weight)]
            copies = [n for n, w in memory if w is not table.weight]
            if copies and declared is not False:
                return False, (
                    f"expected one Parameter, got two over one memory, each with half the gradient: "
                    f"assign {name}.weight itself to {copies[0]}.weight"
                )
            if memory and declared is False:
                return False, f"expected weights of their own (untied), but {name} and {memory[0][0]} share one"
            if memory:
                return (None if declared is None else True), f"{name} and {memory[0][0]} share one Parameter"
            if self._is_head(table, gradients):
                if declared is False:
                    return False, f"expected weights of their own (untied), but the loss uses {name}.weight as its head"
                return (None if declared is None else True), f"the loss uses {name}.weight as its head"
        if declared:
            name = next(iter(self.tables))
            return False, f"expected a head that shares {name}.weight (tied), got one with a weight of its own"
        return (None if declared is None else True), "the head has a weight of its own"

    def _is_head(self, table: torch_nn.Embedding, gradients: dict[str, Tensor | None]) -> bool:
        """Tell a table that is also the head: the softmax gives a gradient to tokens that do not occur."""
        gradient = self._gradient_of(table, gradients)
        if gradient is None:
            return False
        absent = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
        absent[self.ids[self.filled]] = False
        return bool(gradient[absent].any())


def _module_of(model: Any) -> torch_nn.Module | None:
    while isinstance(model, partial):
        model = model.func
    owner = model if isinstance(model, torch_nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, torch_nn.Module) else None


def _tables(module: torch_nn.Module | None) -> dict[str, torch_nn.Embedding]:
    """Find the embeddings of tokens, and leave out embeddings of positions."""
    if module is None:
        return {}
    embeddings = {name: m for name, m in module.named_modules() if isinstance(m, torch_nn.Embedding)}
    if hasattr(module, "get_input_embeddings"):  # of transformers
        own = getattr(module, "get_input_embeddings")()  # noqa: B009  # mypy takes an unknown attribute for a tensor
        found = {name: m for name, m in embeddings.items() if m is own}
    else:
        found = {name: m for name, m in embeddings.items() if isinstance(m, BagEmbedding)}
        heads = {m.weight.shape for m in module.modules() if isinstance(m, LINEAR)}
        found = found or {name: m for name, m in embeddings.items() if m.weight.shape in heads}
    return found or (embeddings if len(embeddings) == 1 else {})


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _kind(batch: Any) -> str:
    return f"a dict of {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__


def _some(things: list[Any]) -> str:
    more = f" and {len(things) - 5} more" if len(things) > 5 else ""
    return ", ".join(map(str, things[:5])) + more


def _numbers(positions: list[int]) -> str:
    return f"position{'s' if len(positions) > 1 else ''} {', '.join(map(str, positions))}"


def _loss_of(result: Any) -> Tensor:
    loss = result
    if isinstance(result, Mapping):
        loss = result.get("loss")
    elif hasattr(result, "loss"):
        loss = result.loss
    elif isinstance(result, tuple | list):
        loss = next((t for t in result if isinstance(t, Tensor) and t.dim() == 0 and t.is_floating_point()), None)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(result).__name__
        raise TypeError(f"expected a 0-d loss, a tuple with one, or an object or dict with loss, got {got}")
    return loss


@contextmanager
def _restored(module: torch_nn.Module | None) -> Iterator[None]:
    """Give parameters and buffers back the values they had."""
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, before, strict=True):
                if not torch.equal(t, value):  # a buffer that is expanded cannot be written
                    t.copy_(value)
        torch.clear_autocast_cache()


@torch.no_grad()
def _add_noise(module: torch_nn.Module | None) -> None:
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in () if module is None else module.parameters():
        if parameter.is_floating_point():
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
            noise = torch.empty_like(parameter, dtype=torch.float32).normal_(std=NOISE, generator=generator)
            parameter.add_(noise)
    torch.clear_autocast_cache()  # of a caller's autocast, which holds the weights without the noise
