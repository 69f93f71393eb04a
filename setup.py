"""Names the extension; everything else is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.platform == "win32":
    sys.exit("tst-ext: the kernels build with GCC or Clang on Linux and macOS, not on Windows (WSL works)")
compiler = (os.environ.get("CXX") or "c++").split()[0]
if shutil.which(compiler) is None:
    sys.exit(
        f"tst-ext: no C++ compiler ({compiler!r} is not on PATH). Install one (Debian and Ubuntu: apt-get install g++; "
        "Fedora: dnf install gcc-c++; macOS: xcode-select --install) or name one in the environment variable CXX."
    )

import pybind11  # noqa: E402
import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def files(pattern: str) -> list[str]:
    """Find the source files that match a pattern, in an order that does not depend on the file system."""
    root = Path(__file__).resolve().parent
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))


def cuda_home(found: str | None, chosen: bool, standard: str = "/usr/local/cuda") -> str | None:
    """The toolkit to build with: `found` by torch, unless it is only the parent folder of a script that calls nvcc.

    A script /usr/local/bin/nvcc makes torch take /usr/local, where the linker finds no libcudart. What the user has
    `chosen` through CUDA_HOME or CUDA_PATH stays.
    """

    def has_runtime(folder: str) -> bool:
        return any(Path(folder, lib, "libcudart.so").exists() for lib in ("lib64", "lib"))

    return standard if found and not chosen and not has_runtime(found) and has_runtime(standard) else found


def architectures(nvcc_version: str) -> str:
    """GPU architectures to build for, given the output of `nvcc --version`; PTX of the last one serves later ones.

    nvcc before CUDA 12.8 refuses sm_100. The newest PTX is then for sm_90: PTX for sm_90a runs on no other GPU.
    """
    release = re.search(r"release (\d+)\.(\d+)", nvcc_version)
    old = release is not None and (int(release[1]), int(release[2])) < (12, 8)
    return "8.0;9.0+PTX" if old else "8.0;9.0a;10.0+PTX"


def build_cuda() -> bool:
    """TST_CUDA=1 or 0 decides; without it, CUDA is built where torch has it and nvcc is there."""
    wanted = os.environ.get("TST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"tst-ext: TST_CUDA is {wanted!r}; expected 0, 1 or unset")
    home = cpp_extension.CUDA_HOME
    nvcc = home is not None and os.access(os.path.join(home, "bin", "nvcc"), os.X_OK)
    if wanted == "1" and not (torch.version.cuda and nvcc):
        sys.exit(
            f"tst-ext: TST_CUDA=1 needs a CUDA build of torch (here: {torch.__version__}, CUDA {torch.version.cuda}) "
            f"and nvcc (CUDA_HOME: {home}). Install both, or unset TST_CUDA for a CPU build."
        )
    return wanted != "0" and bool(torch.version.cuda) and nvcc


# CMakeLists.txt finds the same files: tests/test_build.py compares the two.
sources = files("csrc/*.cpp") + files("csrc/cpu/*.cpp")
# The C++ side of torch's ABI is not used, so one build serves every torch from this version on.
macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
cxx_flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
compile_args = {"cxx": cxx_flags}
extension = cpp_extension.CppExtension
cpp_extension.CUDA_HOME = cuda_home(
    cpp_extension.CUDA_HOME, chosen=bool(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"))
)
if build_cuda():
    extension = cpp_extension.CUDAExtension
    sources += files("csrc/cuda/*.cu")
    macros += [("TST_WITH_CUDA", None), ("USE_CUDA", None)]
    compile_args["nvcc"] = ["-O3", "--expt-relaxed-constexpr"]
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(version)

setup(
    ext_modules=[
        extension(
            "tst_ext._C",
            sources,
            include_dirs=[pybind11.get_include()],
            define_macros=macros,
            extra_compile_args=compile_args,
        )
    ],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
