"""Names the extension; everything else is in pyproject.toml."""

import os
import shutil
import sys

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
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def build_cuda() -> bool:
    """TST_CUDA=1 or 0 decides; without it, CUDA is built where torch has it and nvcc is there."""
    wanted = os.environ.get("TST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"tst-ext: TST_CUDA is {wanted!r}; expected 0, 1 or unset")
    nvcc = CUDA_HOME is not None and os.access(os.path.join(CUDA_HOME, "bin", "nvcc"), os.X_OK)
    if wanted == "1" and not (torch.version.cuda and nvcc):
        sys.exit(
            f"tst-ext: TST_CUDA=1 needs a CUDA build of torch (here: {torch.__version__}, CUDA {torch.version.cuda}) "
            f"and nvcc (CUDA_HOME: {CUDA_HOME}). Install both, or unset TST_CUDA for a CPU build."
        )
    return wanted != "0" and bool(torch.version.cuda) and nvcc


sources = ["csrc/library.cpp"] + [
    f"csrc/cpu/{name}.cpp"
    for name in (
        "bag_embedding",
        "bags",
        "capability",
        "gemm",
        "kernels_avx2",
        "kernels_avx512",
        "kernels_default",
        "linear_multi_hot_cross_entropy",
        "multi_hot_cross_entropy",
    )
]
# The C++ side of torch's ABI is not used, so one build serves every torch from this version on.
macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
cxx_flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
compile_args = {"cxx": cxx_flags}
extension = CppExtension
if build_cuda():
    extension = CUDAExtension
    sources += ["csrc/cuda/bag_embedding.cu", "csrc/cuda/multi_hot_cross_entropy.cu"]
    macros += [("TST_WITH_CUDA", None), ("USE_CUDA", None)]
    compile_args["nvcc"] = ["-O3", "--expt-relaxed-constexpr"]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")

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
    cmdclass={"build_ext": BuildExtension},
)
