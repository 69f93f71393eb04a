"""`tst info --check`: compare every op with `tst_ext.reference` in float64, and say what to do about an error.

Small cases run on each device, in each dtype and with each CPU instruction set, with several options at once.
"""

import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._cpus import affinity_cpus, available_cpus, chosen_threads, cpu_quota
from ._load import _C, BUILD, CUDA_ARCHITECTURES, INSTALL, NO_CUDA
from .bags import position_weights
from .ops import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXTRAS = ("train", "data", "tensorboard", "hf", "torchtitan")  # of pyproject.toml, those for users
IGNORE, BAG_SIZE = -100, 4
# Without gradients the CPU joins blocks of columns, of 1 MiB of logits each or more: two in these rows in float32.
ROWS, DIM, VOCABULARY = 96, 40, 6007


class Finding(NamedTuple):
    """A line of the report."""

    status: str  # "ok", "note" or "problem"
    text: str
    advice: str = ""  # about a problem

    def __str__(self) -> str:
        return f"{self.status:8} {self.text}" + (f"\n{'':8} what to do: {self.advice}" if self.advice else "")


def self_check() -> int:
    """Print each finding as it comes, and return the exit status: 1 if there is a problem, else 0."""
    problems = 0
    for finding in findings():
        print(finding, flush=True)
        problems += finding.status == "problem"
    print(f"{problems} problem{'' if problems == 1 else 's'}")
    return int(problems > 0)


def findings() -> Iterator[Finding]:
    """Check the installation part by part."""
    yield Finding("ok", f"torch {torch.__version__}: the extension loads")  # else the import ends with a diagnosis
    yield check_threads()
    yield from check_device(torch.device("cpu"))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield check_missing_gpu()
    else:
        yield from check_device(accelerator)
    yield from map(check_extra, EXTRAS)


def check_threads() -> Finding:
    """Tell how many threads the CPU kernels use, and whether another program than `tst` would start too many."""
    threads, available = torch.get_num_threads(), available_cpus()
    text = f"cpu: {threads} thread{'s' if threads > 1 else ''}"
    if available == affinity_cpus() or (threads <= available and chosen_threads()):
        return Finding("ok", text)
    quota = f"this container may use {cpu_quota():g} of {affinity_cpus()} CPUs"
    if threads > available:
        advice = f"set OMP_NUM_THREADS={available}: threads beyond the quota are stopped for most of the time"
        return Finding("problem", f"{text}, but {quota}", advice)
    advice = f"set OMP_NUM_THREADS={available} for programs other than tst, as torch counts all {affinity_cpus()} CPUs"
    return Finding("note", f"{text}, because {quota}", advice)


def nvidia_gpus() -> int:
    """Count the NVIDIA GPUs that this system has, whatever torch knows of them."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def check_missing_gpu() -> Finding:
    """Say why the CPU alone is used."""
    count = nvidia_gpus()
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("note", "CUDA_VISIBLE_DEVICES hides any GPU: the CPU is used, and alone was checked")
    if count == 0:
        return Finding("note", "no accelerator: the CPU is used, and alone was checked")
    text = f"{count} NVIDIA GPU{'s' if count > 1 else ''} here, but the CPU is used: "
    if torch.version.cuda is None:
        text += f"torch {torch.__version__} is not a CUDA build"
        return Finding("note", text, "install a CUDA build of torch to use the GPU")
    try:
        torch.cuda.init()
        error = "it finds none"
    except RuntimeError as failed:
        error = str(failed).partition("\n")[0]
    advice = f"update the NVIDIA driver, or install torch for an older CUDA than {torch.version.cuda}"
    return Finding("problem", f"{text}torch {torch.__version__} says: {error}", advice)


def check_extra(extra: str) -> Finding:
    try:
        lines = metadata.requires("tst-ext") or []
    except metadata.PackageNotFoundError:
        return Finding("note", f"extra {extra}: not checked, because pip has not installed tst-ext")
    names = [re.split(r"[^\w.-]", line)[0] for line in lines if re.search(rf"\bextra == .{extra}.$", line)]
    missing = [name for name in names if not any(metadata.distributions(name=name))]
    if missing:
        return Finding("note", f"extra {extra}: no {', '.join(missing)}; pip install 'tst-ext[{extra}]' adds it")
    return Finding("ok", f"extra {extra}: {', '.join(f'{name} {metadata.version(name)}' for name in names)}")


def check_device(device: torch.device) -> Iterator[Finding]:
    if device.type == "cuda" and torch.version.cuda is not None:  # not ROCm
        gpu = check_gpu(device)
        yield gpu
        if gpu.status == "problem":  # plain torch would be tested, or nothing runs
            return
    elif device.type != "cpu":
        yield Finding("note", f"{device.type}: plain torch, there are kernels for the CPU and for CUDA alone")
    yield from (check_accuracy(case, device) for case in CASES)


def check_gpu(device: torch.device) -> Finding:
    """Tell whether the build has CUDA kernels, and code for this GPU: its own, or PTX that the driver compiles."""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    build = f"TST_CUDA=1 {INSTALL} ."
    if not CUDA_ARCHITECTURES:
        text = f"cuda: {name} runs plain torch, slower: {NO_CUDA}"
        return Finding("problem", text, f"install nvcc {torch.version.cuda} and build with it, in a checkout: {build}")
    gpu = f"cuda: kernels for {CUDA_ARCHITECTURES} on {name}, sm_{major}{minor}"
    try:
        bag_embedding(torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, 1, device=device))
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        advice = f"build for this device, in a checkout: TORCH_CUDA_ARCH_LIST={major}.{minor} {build}"
        first = str(error).partition("\n")[0]
        return Finding("problem", f"{gpu}: {first}", advice)
    return Finding("ok", gpu)


class Case(NamedTuple):
    op: Callable[..., Tensor]
    plain: Callable[..., Tensor]  # its counterpart in plain torch
    inputs: tuple[str, ...]
    options: tuple[dict[str, Any], ...]  # to run it with, one after the other


def _plain_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk_size: int | None = None, **options: Any
) -> Tensor:
    return reference.multi_hot_cross_entropy(F.linear(hidden, weight, bias), labels, **options)


WEIGHTS = position_weights("power_law", BAG_SIZE)
BAG_OPTIONS = (dict(padding_idx=IGNORE), dict(mode="sum", padding_idx=IGNORE, position_weights=WEIGHTS))
LOSS_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    dict(reduction="none", position_weights=WEIGHTS, logit_softcap=8.0, z_loss=1e-2, label_smoothing=0.1),
    dict(objective="mce_alt", normalizer=7.0, z_loss=1e-2),
)
LINEAR_OPTIONS = (*LOSS_OPTIONS, dict(LOSS_OPTIONS[1], reduction="mean", chunk_size=40))  # the last chunk is short
CASES = (
    Case(bag_embedding, reference.bag_embedding, ("input_ids", "weight"), BAG_OPTIONS),
    Case(linear_multi_hot_cross_entropy, _plain_linear, ("hidden", "weight", "bias", "labels"), LINEAR_OPTIONS),
    Case(multi_hot_cross_entropy, reference.multi_hot_cross_entropy, ("logits", "labels"), LOSS_OPTIONS),
)


def check_accuracy(case: Case, device: torch.device) -> Finding:
    """Compare the op with float64 in every dtype, with all its options and each CPU instruction set."""
    dtypes = DTYPES[:-1] if device.type == "mps" else DTYPES  # Metal has no float64
    before, worst, capabilities = _C.cpu_capability(), 0.0, [_C.cpu_capability()]
    if device.type == "cpu" and "TST_CPU_CAPABILITY" not in os.environ:  # one that is forced is the one that runs
        capabilities = _C.cpu_capabilities()
    try:
        for dtype, options in product(dtypes, case.options):
            for name, share in _shares(case, device, dtype, options, capabilities):
                if not share <= 1:  # or NaN
                    text = f"{dtype}, {name} errs by {share:.3g} times what rounding explains ({options})"
                    return _wrong(case, device, text)
                worst = max(worst, share)
    except Exception as error:  # whatever stops an op is a finding
        return _wrong(case, device, f"{type(error).__name__}: {error}")
    finally:
        _C.set_cpu_capability(before)
    where = f"cpu ({', '.join(capabilities)})" if device.type == "cpu" else device.type
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Finding("ok", f"{where}, {case.op.__name__}: {names}; errors up to {worst:.2f} of what rounding explains")


def _wrong(case: Case, device: torch.device, text: str) -> Finding:
    capability = f" {_C.cpu_capability()}" if device.type == "cpu" else ""
    advice = f"do not train with it; {BUILD}; if it stays, report it with the output of tst info"
    if torch.get_float32_matmul_precision() != "highest" or "ONEDNN_DEFAULT_FPMATH_MODE" in os.environ:
        reduced = "torch.set_float32_matmul_precision and ONEDNN_DEFAULT_FPMATH_MODE"
        advice = f"check without {reduced}, which reduce the precision of matrix products; else {advice}"
    if capability not in ("", " default"):
        advice += "; TST_CPU_CAPABILITY=default does without these instructions"
    return Finding("problem", f"{device.type}{capability}, {case.op.__name__}: {text}", advice)


def _shares(
    case: Case, device: torch.device, dtype: torch.dtype, options: dict[str, Any], capabilities: list[str]
) -> Iterator[tuple[str, float]]:
    """Yield the error ||x - x64|| of each result as a share of what rounding explains: above 1 the result is wrong.

    Rounding explains twice the error of plain torch in this dtype, because luck does not average out in a small case,
    one eps of ||x64||, and 2 sqrt(terms) eps of the accumulation for another order of the additions.
    """
    inputs = _to(_inputs(case), device, dtype)
    exact = _run(case.plain, _to(inputs, "cpu", torch.float64), options)
    beside = _run(case.plain, inputs, options)
    eps, accumulation = (torch.finfo(d).eps for d in (dtype, torch.promote_types(dtype, torch.float32)))
    for capability in capabilities:
        _C.set_cpu_capability(capability)
        with torch.no_grad():  # as in validation
            results = {"result without gradients": case.op(**inputs, **options)}
        for name, result in (results | _run(case.op, inputs, options)).items():
            key = name.removesuffix(" without gradients")
            error, other = ((t.cpu().double() - exact[key]).norm().item() for t in (result, beside[key]))
            yield name, error / (2 * other + (eps + 2 * VOCABULARY**0.5 * accumulation) * exact[key].norm().item())


def _inputs(case: Case) -> dict[str, Tensor]:
    """Make ids or labels `[rows, s]`, and tensors in float64."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS, BAG_SIZE), generator=g)
    ids[::2, 1] = ids[::2, 0]  # a token twice in a bag
    ids[torch.rand(ROWS, BAG_SIZE, generator=g) < 0.2] = IGNORE
    shapes = dict(hidden=(ROWS, DIM), weight=(VOCABULARY, DIM), bias=(VOCABULARY,), logits=(ROWS, VOCABULARY))
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["weight"] *= 2 / DIM**0.5  # logits of a few units
    return {name: tensors.get(name, ids) for name in case.inputs}


def _to(inputs: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}


def _run(function: Callable[..., Tensor], inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the result and the gradients."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
    out = function(**{**inputs, **leaves}, **options)
    upstream = ((torch.arange(out.numel()) % 7 - 3.5) / 4).view(out.shape)  # exact in every dtype
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    return {"result": out.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
