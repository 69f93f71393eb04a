"""`tst info --check`: does this installation compute what it should, and if not, what to do about it.

Every op runs on a small case with several options at once, on each device, in each dtype and with each CPU instruction
set, beside `tst_ext.reference` in float64. Needs torch alone.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fallback, reference
from ._load import _C, BUILD, INSTALL, MINIMUM_TORCH, too_old
from .bags import position_weights
from .ops import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy

__all__ = ["Finding", "findings", "self_check"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXTRAS = ("train", "tensorboard", "hf", "torchtitan")  # of pyproject.toml, those that add something for users
IGNORE = -100
ADVICE = f"do not train with it; {BUILD}; if it stays, report it with the output of tst info"
BAG_SIZE = 4
WEIGHTS = position_weights("power_law", BAG_SIZE)


@dataclass(frozen=True)
class Finding:
    """A line of the report: status "ok", "note" or "problem", and what to do about a problem."""

    status: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.text}" + (f"\n{'':8} what to do: {self.advice}" if self.advice else "")


def self_check() -> int:
    """Prints each finding as it comes, and returns the exit status: 1 where there is a problem, else 0."""
    problems = 0
    with torch.enable_grad(), torch.device("cpu"):
        for finding in findings():
            print(finding, flush=True)
            problems += finding.status == "problem"
    print(f"{problems} problem{'' if problems == 1 else 's'}")
    return int(problems > 0)


def findings() -> Iterator[Finding]:
    """Checks the installation part by part."""
    yield check_torch()
    yield from check_device(torch.device("cpu"))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield Finding("note", "no accelerator: the CPU alone was checked")
    else:
        yield from check_device(accelerator)
    yield from check_extras()


def check_torch() -> Finding:
    if too_old(torch.__version__):
        upgrade = f"python -m pip install --upgrade 'torch>={MINIMUM_TORCH}'"
        return Finding("problem", f"torch {torch.__version__}: expected {MINIMUM_TORCH} or later", upgrade)
    return Finding("ok", f"torch {torch.__version__}: the extension loads")


def check_extras() -> Iterator[Finding]:
    requirements = metadata.requires("tst-ext") or []
    for extra in EXTRAS:
        wanted = [line.partition(";")[0].strip() for line in requirements if re.search(rf"\bextra == .{extra}.$", line)]
        versions = {line: _version(re.split(r"[^\w.-]", line)[0]) for line in wanted}
        missing = [line for line, version in versions.items() if version is None]
        if missing:
            yield Finding("note", f"extra {extra}: no {', '.join(missing)}; pip install 'tst-ext[{extra}]' adds it")
        else:
            yield Finding("ok", f"extra {extra}: {', '.join(f'{line} ({v})' for line, v in versions.items())}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---- a device ----------------------------------------------------------------------------------------------------


def check_device(device: torch.device) -> Iterator[Finding]:
    """Every check of a device, up to the first kind that finds a problem: later ones would raise, or mislead."""
    capabilities = [""]
    if device.type == "cpu":  # one that is forced is the one that runs
        capabilities = [_C.cpu_capability()] if "TST_CPU_CAPABILITY" in os.environ else _C.cpu_capabilities()
    for checks in (
        [check_kernels],
        [check_image] if device.type == "cuda" and torch.version.cuda is not None else [],
        [partial(check_accuracy, case, capability=capability) for capability in capabilities for case in CASES],
        [check_without_gradients],
        [check_repeats],
        [partial(check_speed, case) for case in CASES],
    ):
        statuses = []
        for check in checks:
            finding = check(device=device)
            yield finding
            statuses.append(finding.status)
        if "problem" in statuses:
            return


def check_kernels(device: torch.device) -> Finding:
    """Whether each op has a compiled kernel for the device."""
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.cuda is None):
        return Finding("note", f"{device.type}: plain torch, there are kernels for the CPU and for CUDA alone")
    # On a GPU the linear loss is a loop in Python over multi_hot_cross_entropy_rows_; a CPU needs no scaled_copy_.
    without = {"cpu": "scaled_copy_", "cuda": "linear_multi_hot_cross_entropy"}[device.type]
    missing = [op.__name__ for op in fallback.OPS if op.__name__ != without and not _has_kernel(op.__name__, device)]
    if not missing:
        return Finding("ok", f"{device.type}: a compiled kernel for every op")
    if device.type == "cpu":
        return Finding("problem", f"cpu: no compiled kernel for {', '.join(missing)}", BUILD)
    return Finding(
        "problem",
        f"cuda: this build has no CUDA kernels, {torch.cuda.get_device_name(device)} runs plain torch, slower",
        f"install nvcc {torch.version.cuda} and build with it, in a checkout: TST_CUDA=1 {INSTALL} .",
    )


def _has_kernel(op: str, device: torch.device) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"tst_ext::{op}", device.type.upper())


def check_image(device: torch.device) -> Finding:
    """Whether the build has code for this GPU: its own, or PTX that the driver compiles."""
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"cuda: kernels for {_C.cuda_architectures()} on {torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    try:
        bag_embedding(torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, 1, device=device))
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        build = f"TORCH_CUDA_ARCH_LIST={major}.{minor} TST_CUDA=1 {INSTALL} ."
        first = str(error).partition("\n")[0]
        return Finding("problem", f"{gpu}: {first}", f"build for this device, in a checkout: {build}")
    return Finding("ok", gpu)


# ---- what the ops compute ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op and its counterpart in plain torch: called alike, with ids or labels and then those `tensors` of inputs."""

    op: str
    function: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    tensors: tuple[str, ...]
    options: tuple[dict[str, Any], ...]


def _linear(labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, **options)


def _plain_linear(
    labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, chunk_size: int | None = None, **options: Any
) -> Tensor:
    return reference.multi_hot_cross_entropy(F.linear(hidden, weight, bias), labels, **options)


LOSS_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    dict(reduction="none", position_weights=WEIGHTS, logit_softcap=8.0, z_loss=1e-2, label_smoothing=0.1),
    dict(objective="mce_alt", normalizer=7.0, z_loss=1e-2),
)
CASES = (
    Case(
        "bag_embedding",
        bag_embedding,
        reference.bag_embedding,
        ("weight",),
        (dict(padding_idx=IGNORE), dict(mode="sum", padding_idx=IGNORE, position_weights=WEIGHTS)),
    ),
    Case(
        "linear_multi_hot_cross_entropy",
        _linear,
        _plain_linear,
        ("hidden", "weight", "bias"),
        (*LOSS_OPTIONS, dict(LOSS_OPTIONS[1], reduction="mean", chunk_size=40)),  # three chunks, the last one short
    ),
    Case(
        "multi_hot_cross_entropy",
        lambda labels, logits, **options: multi_hot_cross_entropy(logits, labels, **options),
        lambda labels, logits, **options: reference.multi_hot_cross_entropy(logits, labels, **options),
        ("logits",),
        LOSS_OPTIONS,
    ),
)


def _inputs(case: Case, rows: int, dim: int, vocabulary: int, ignored: float) -> tuple[Tensor, list[Tensor]]:
    """Ids `[rows, s]`, and the tensors of the case in float64, on the CPU."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, BAG_SIZE), generator=g)
    ids[::2, 1] = ids[::2, 0]  # a token twice in a bag
    ids[torch.rand(rows, BAG_SIZE, generator=g) < ignored] = IGNORE
    shapes = {"hidden": (rows, dim), "weight": (vocabulary, dim), "bias": (vocabulary,), "logits": (rows, vocabulary)}
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["weight"] *= 2 / dim**0.5  # logits of a few units
    return ids, [tensors[name] for name in case.tensors]


def _run(function: Callable[..., Tensor], ids: Tensor, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The result of the op and the gradients of `tensors`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(ids, *leaves, **options)
    upstream = ((torch.arange(out.numel()) % 7 - 3.5) / 4).view(out.shape)  # exact in every dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out))]


def _shares(case: Case, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Iterator[float]:
    """For the result and each gradient its error as a share of what rounding explains: above 1 it is wrong.

    By ||x - x64|| beside the same of plain torch in this dtype: twice that, because luck does not average out in a
    small case, one eps of ||x64|| where plain torch happens to err less, and 2 sqrt(terms) eps of the accumulation for
    another order of the additions. Plain torch adds the gradient of an embedding in the 16 bits of its dtype; there
    x64 rounded once stands in its place.
    """
    ids, tensors = _inputs(case, rows=96, dim=40, vocabulary=1003, ignored=0.2)
    rounded = [t.to(dtype) for t in tensors]
    exact = _run(case.plain, ids, [t.double() for t in rounded], options)
    here = (ids.to(device), [t.to(device) for t in rounded], options)
    if case.op == "bag_embedding":
        beside = [t.to(dtype) for t in exact]
    else:
        beside = _run(case.plain, *here)
    eps, accumulation = (torch.finfo(d).eps for d in (dtype, torch.promote_types(dtype, torch.float32)))
    for actual, plain, x64 in zip(_run(case.function, *here), beside, exact, strict=True):
        error, other = ((t.cpu().double() - x64).norm().item() for t in (actual, plain))
        share = error / (2 * other + (eps + 2 * max(tensors[0].shape) ** 0.5 * accumulation) * x64.norm().item())
        yield share if share == share else float("inf")


def check_accuracy(case: Case, device: torch.device, capability: str = "") -> Finding:
    """The op in every dtype and with all its options; on the CPU with the instruction set `capability`."""
    where = f"{device.type}{capability and ' ' + capability}, {case.op}"
    advice = ADVICE
    reduced = [name for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE") if name in os.environ]
    if torch.get_float32_matmul_precision() != "highest":
        reduced.append("torch.set_float32_matmul_precision")
    if reduced:
        advice = f"{', '.join(reduced)} reduces the precision of matrix products: check without; else {advice}"
    if capability not in ("", "default"):
        advice += "; TST_CPU_CAPABILITY=default does without these instructions"
    dtypes = [dtype for dtype in DTYPES if device.type != "mps" or dtype != torch.float64]  # which Metal does not have
    before, worst = _C.cpu_capability(), 0.0
    try:
        _C.set_cpu_capability(capability or before)
        for dtype in dtypes:
            for options in case.options:
                for name, share in zip(("result", *case.tensors), _shares(case, device, dtype, options), strict=True):
                    worst = max(worst, share)
                    if share > 1:
                        part = name if name == "result" else f"gradient of {name}"
                        given = ", ".join(
                            f"{k}={v.tolist() if isinstance(v, Tensor) else v}" for k, v in options.items()
                        )
                        what = f"{dtype}, {part} errs by {share:.3g} times what rounding explains ({given})"
                        return Finding("problem", f"{where}: {what}", advice)
    except Exception as error:  # whatever stops an op is a finding
        return Finding("problem", f"{where}: {type(error).__name__}: {error}", advice)
    finally:
        _C.set_cpu_capability(before)
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Finding("ok", f"{where}: {names}; errors up to {worst:.2f} of what rounding explains")


def check_without_gradients(device: torch.device) -> Finding:
    """What validation runs: on the CPU the logits come in blocks of columns, which are joined."""
    g = torch.Generator().manual_seed(0)
    rows, vocabulary = 600, 9001  # more than one block of columns
    hidden, weight = torch.randn(rows, 16, generator=g), torch.randn(vocabulary, 16, generator=g) / 4
    labels = torch.randint(vocabulary, (rows, BAG_SIZE), generator=g)
    worst = 0.0
    with torch.no_grad():
        for options in LOSS_OPTIONS:
            logits = hidden.double() @ weight.double().T
            exact = reference.multi_hot_cross_entropy(logits, labels, **options).norm()
            here = (hidden.to(device), weight.to(device), labels.to(device))
            loss = linear_multi_hot_cross_entropy(*here, **options).double().cpu().norm()
            error = abs(float(loss / exact) - 1)
            worst = max(worst, error if error == error else float("inf"))
    allowed = 2 * vocabulary**0.5 * torch.finfo(torch.float32).eps  # the order of the additions
    text = f"{device.type}, loss without gradients: errors up to {worst:.1e}"
    return Finding("ok", text) if worst <= allowed else Finding("problem", f"{text}, allowed {allowed:.1e}", ADVICE)


def check_repeats(device: torch.device) -> Finding:
    for case in CASES:
        ids, tensors = _inputs(case, rows=96, dim=40, vocabulary=1003, ignored=0.2)
        here = (ids.to(device), [t.to(device, torch.float32) for t in tensors], case.options[0])
        first = _run(case.function, *here)
        for _ in range(3):
            if not all(map(torch.equal, first, _run(case.function, *here))):
                return Finding("problem", f"{device.type}, {case.op}: a repeated call gives other bits", ADVICE)
    return Finding("ok", f"{device.type}: repeated calls are bitwise equal")


# ---- speed -------------------------------------------------------------------------------------------------------


def check_speed(case: Case, device: torch.device) -> Finding:
    """Forward and backward beside plain torch; never a problem, because it depends on what else the machine does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    ids, tensors = _inputs(case, rows=256, dim=256, vocabulary=8192, ignored=0.0)
    ids, tensors = ids.to(device), [t.to(device, dtype) for t in tensors]
    mine = _seconds(lambda: _run(case.function, ids, tensors, {}))
    plain = _seconds(lambda: _run(case.plain, ids, tensors, {}))
    text = f"{device.type}, {case.op}: {1000 * mine:.1f} ms, plain torch {plain / mine:.1f} times that"
    if mine <= plain:
        return Finding("ok", text)
    return Finding("note", f"{text}: slower than plain torch", "again on an idle machine; if it stays, report it")


def _seconds(function: Callable[[], object]) -> float:
    """The least time of three calls, after one that is not measured."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
