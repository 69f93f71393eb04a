"""Load the compiled extension, or raise an error that says why it does not load and what to do.

`_C` has the op schemas and the CPU kernels. `_cuda` has the CUDA kernels, if they were built. Without them, or with
another torch than theirs, the ops run plain torch on a GPU.
"""

import ctypes
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

MINIMUM_TORCH = "2.11"  # that of pyproject.toml: the first with every call of the stable ABI that csrc/ makes
INSTALL = "python -m pip install --no-build-isolation --force-reinstall --no-deps"
BUILD = f"build it with this Python and this torch, in a checkout: {INSTALL} ."


def too_old(version: str) -> bool:
    """Compare the release alone: 2.11.0a0+vendor has what 2.11 has."""
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is None or (int(release[1]), int(release[2])) < tuple(map(int, MINIMUM_TORCH.split(".")))


def diagnosis(error: str, folder: Path) -> tuple[str, str]:
    """Return the meaning of the loader's message about the extension in `folder`, and advice."""
    this_torch = f"torch {torch.__version__}"
    if too_old(torch.__version__):
        meaning = f"{this_torch} is too old, the extension needs {MINIMUM_TORCH} or later"
        return meaning, f"python -m pip install --upgrade 'torch>={MINIMUM_TORCH}'"
    built = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if not built:
        advice = f"{INSTALL} -e . there; if tst-ext is installed elsewhere, leave that folder, which hides it"
        return f"{folder} is a checkout that was not built", advice
    if not {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES} & set(built):
        meaning = f"{', '.join(built)} is for another Python than this {sys.version.split()[0]}"
        return meaning, f"use the Python that it was installed with, or {BUILD}"
    library = re.search(r"(lib[\w+-]+)\S*: cannot open|Library not loaded: \S*(lib[\w+-]+)", error)
    name = (library[1] or library[2]) if library else ""
    if name.startswith(("libtorch", "libc10")):
        return f"{name}, a part of torch, is missing", "install torch again"
    if library:
        return f"{name}, a library of the system, is missing", "install it by the system's package manager"
    if "GLIBC" in error:
        return "it was built on a newer Linux than this one", BUILD
    if "symbol" in error.lower():
        return f"{this_torch} lacks a function that it calls", f"install torch again, or {BUILD}"
    return "the file is damaged, or was built for another machine", BUILD


def load_cuda(folder: Path) -> tuple[str, str]:
    """Load the CUDA kernels of the build in `folder`. Return their architectures, or "" and why there are none."""
    built = [path for path in (folder / f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES) if path.exists()]
    if not built:
        return "", "this build of tst-ext has no CUDA kernels"
    this_torch = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return "", f"{this_torch} is not a CUDA build"
    try:
        library = ctypes.CDLL(str(built[0]))  # registers its ops
    except OSError as error:
        return "", f"the CUDA kernels of this build do not load with {this_torch}, CUDA {torch.version.cuda}: {error}"
    library.tst_cuda_architectures.restype = ctypes.c_char_p
    return library.tst_cuda_architectures().decode(), ""


try:
    import tst_ext._C as _C  # noqa: F401  # which others import from here
except ImportError as error:
    meaning, advice = diagnosis(str(error), Path(__file__).parent)
    raise ImportError(
        f"tst_ext: the compiled extension does not load: {meaning}\n  what to do: {advice}\n  the error: {error}"
    ) from error

CUDA_ARCHITECTURES, NO_CUDA = load_cuda(Path(_C.__file__).parent)
