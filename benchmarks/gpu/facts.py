"""Record the device, its driver and clocks, and the versions of what is installed."""

import importlib.metadata
import os
import platform
import sys

import torch
from common import REHEARSE, gpu_state, record

PACKAGES = ("triton", "numpy", "pytest", "hypothesis", "pytest-xdist", "pybind11", "ninja", "setuptools", "tokenizers")
OPTIONAL = ("tyro", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "safetensors", "tqdm")


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def main() -> int:
    if not REHEARSE and not torch.cuda.is_available():
        print(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no CUDA device")
        return 1
    values: dict[str, object] = {"device": "CPU, a rehearsal", "capability": "0.0", "architecture": ""}
    if not REHEARSE:
        p = torch.cuda.get_device_properties(0)
        values = {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "architecture": "9.0a" if p.major == 9 else f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": p.total_memory / 2**30,
            "l2_mib": getattr(p, "L2_cache_size", 0) / 2**20,
            **gpu_state(("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")),
            **gpu_state(),
        }
    record(
        **values,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
    )
    record(versions=" ".join(f"{name} {version(name)}" for name in (*PACKAGES, *OPTIONAL)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
