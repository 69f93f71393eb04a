"""Build the extension in place for this GPU alone, or take a build of the same sources from build/gpu.

A new build is left in build/gpu, named after a digest of its sources, and a copy in the folder OUT if that is set.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from common import REHEARSE, ROOT, record

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
KEPT = ROOT / "build" / "gpu"


def digest() -> str:
    """Of everything that the result depends on: sources, torch, architectures."""
    found = hashlib.sha256(f"{torch.__version__} {os.environ.get('TORCH_CUDA_ARCH_LIST')}".encode())
    for path in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def build() -> str | None:
    """How it was built; None: not at all."""
    commands = {
        "pip install -e": ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."],
        "setup.py build_ext --inplace": ["setup.py", "-q", "build_ext", "--inplace"],
    }
    if REHEARSE:  # which must not install anything
        del commands["pip install -e"]
    for how, command in commands.items():
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode == 0:
            return how
    return None


def main() -> int:
    began = time.monotonic()
    kept = KEPT / digest()
    libraries = [ROOT / "tst_ext" / f"{name}{SUFFIX}" for name in ("_C", "_cuda")]
    if kept.exists():
        for library in libraries:
            library.unlink(missing_ok=True)
            if (kept / library.name).exists():
                shutil.copyfile(kept / library.name, library)
        how = "taken from build/gpu"
    else:
        how = build()
        if how is None:
            return 1
        partial = kept.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            if library.exists():  # without nvcc there is no _cuda
                shutil.copyfile(library, partial / library.name)
        partial.rename(kept)
    if out := os.environ.get("OUT"):
        shutil.copytree(kept, Path(out) / kept.name, dirs_exist_ok=True)
    code = "from tst_ext._load import CUDA_ARCHITECTURES; print(CUDA_ARCHITECTURES or 'none')"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    built = loaded.stdout.strip()
    record(how=how, cuda_architectures=built, seconds_build=time.monotonic() - began, kept=kept.name)
    return 0 if loaded.returncode == 0 and (REHEARSE or built != "none") else 1


if __name__ == "__main__":
    sys.exit(main())
