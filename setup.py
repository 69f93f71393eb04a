"""Check that the extension can be built here, and name its two libraries; everything else is in pyproject.toml.

A check that fails ends the build before any source is compiled, with one line that says what to do. `tst_ext._C` has
the op schemas and the CPU kernels. `tst_ext._cuda` has the CUDA kernels, so that a wheel with them also serves a CPU
build of torch.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent


def stop(message: str) -> NoReturn:
    sys.exit(f"tst-ext: {message}")


def check_packages() -> None:
    """Look for the build requirements: pip installs them for an isolated build, and otherwise does not check."""
    if shutil.which("ninja") is None:  # it is next to a Python whose environment is not activated
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    unmet, install = [], []
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]:
        name, minimum = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if shutil.which(name):  # the system's ninja
                continue
            unmet.append(f"no {name}")
        else:
            numbers, wanted = ([int(n) for n in re.findall(r"\d+", text)] for text in (version, minimum))
            if numbers >= wanted:
                continue
            unmet.append(f"{name} {version}")
        install.append(f"'{requirement}'")
    if unmet:
        stop(f"to build it here, first run: python -m pip install {' '.join(install)} (found {', '.join(unmet)})")


def check_compiler() -> None:
    """Compile a few lines, for what each source needs: a C++ compiler, its standard library, Python's headers."""
    compiler = os.environ.get("CXX") or "c++"
    if " " in compiler and shutil.which(compiler) is None:
        program = next(word for word in [*compiler.split(), "c++"] if not word.startswith("-") and "cache" not in word)
        stop(
            f"CXX is {compiler!r}, expected the name of one program, because torch takes it for one. "
            f"Set CXX={program} (torch 2.13 calls ccache by itself), or to a script that adds the rest"
        )
    if shutil.which(compiler) is None:
        stop(
            f"no C++ compiler ({compiler!r} is not on PATH). Install one (Debian and Ubuntu: apt-get install g++; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install) or name one in the environment variable CXX."
        )
    include = sysconfig.get_path("include", "posix_prefix")  # as torch does
    if not Path(include, "Python.h").exists():
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        stop(
            f"the headers of {python} are missing: no Python.h in {include}. Install them (Debian and Ubuntu: "
            f"apt-get install {python}-dev; Fedora: dnf install {python}-devel), or use a Python that has them."
        )
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}"]  # the standard that torch asks for from 2.13 on
    if error := first_error(command, "#include <Python.h>\n#include <vector>"):
        advice = "Run xcode-select --install, or set" if sys.platform == "darwin" else "Set"
        stop(f"{compiler} does not compile C++20 ({error}). {advice} CXX to one that does (GCC 11 or later, or Clang)")
    os.environ["CXX"] = compiler  # so that the linker is called through it too, not through the compiler of Python


def first_error(command: list[str], source: str, language: str = "c++") -> str | None:
    """Compile a source, and return the first error, None if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "source")
        path.write_text(source + "\n")
        command = [*command, "-x", language, str(path), "-o", f"{folder}/object"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if result.returncode == 0:
        return None
    lines = (result.stderr + result.stdout).strip().splitlines() or [f"exit status {result.returncode}"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


if sys.platform == "win32":
    stop("the kernels build with GCC or Clang on Linux and macOS, not on Windows (WSL works)")
check_packages()
check_compiler()

import pybind11  # noqa: E402
import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def files(pattern: str) -> list[str]:
    """Find the source files that match a pattern, in an order that does not depend on the file system."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def runtime_folder(home: str) -> str | None:
    """Find the folder with the libcudart that the linker needs; None if the toolkit has none."""
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    # the installer's, conda's, what these link to, Debian's
    for folder in ("lib64", "lib", f"targets/{machine}-linux/lib", f"lib/{sysconfig.get_config_var('MULTIARCH')}"):
        if Path(home, folder, "libcudart.so").exists():
            return str(Path(home, folder))
    return None


def cuda_home(found: str | None, standard: str = "/usr/local/cuda") -> str | None:
    """Choose the toolkit to build with: `found` by torch, unless that is only the folder above a link or script.

    For a script /usr/local/bin/nvcc torch takes /usr/local, where the linker finds no libcudart. The real nvcc tells
    where it is in a dry run, as TOP. CUDA_HOME or CUDA_PATH, if set, is the user's choice and stays.
    """
    if found is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or runtime_folder(found):
        return found
    candidates = [standard]
    if (nvcc := shutil.which(f"{found}/bin/nvcc")) is not None:
        result = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        tops = re.findall(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
        candidates = [*map(os.path.realpath, tops), str(Path(nvcc).resolve().parent.parent), standard]
    return next((home for home in candidates if runtime_folder(home)), found)


def cuda_obstacle(home: str | None) -> str | None:
    """Say why CUDA kernels cannot be built, and what to do; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build. Install one that is"
    major = torch.version.cuda.partition(".")[0]
    choose = f"Set CUDA_HOME to a complete CUDA {major} toolkit"
    if home is None or (nvcc := shutil.which(f"{home}/bin/nvcc")) is None:
        return f"there is no nvcc in {home}/bin. {choose}" if home else f"there is no nvcc on PATH. {choose}"
    if runtime_folder(home) is None:
        return f"nvcc is in {home}/bin, but there is no libcudart.so in {home}/lib64, lib or targets/*/lib. {choose}"
    release = nvcc_release(nvcc)
    if release and str(release[0]) != major:
        of_nvcc = f"{release[0]}.{release[1]}"
        return f"the nvcc in {home}/bin is for CUDA {of_nvcc}, but torch is for CUDA {torch.version.cuda}. {choose}"
    # An nvcc refuses compilers newer than itself, and so does torch. nvcc is called as torch calls it.
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    error = first_error([nvcc, *host, "-c"], "#include <cub/version.cuh>", "cu") or refusal_of_torch()
    return error and f"nvcc does not compile here ({error}). Set CC and CXX to compilers that CUDA {major} takes"


def refusal_of_torch() -> str | None:
    """Return what torch's build says against this C++ compiler with this nvcc; None if it takes both."""
    compiler = os.environ["CXX"]
    _, version = cpp_extension.get_compiler_abi_compatibility_and_version(compiler)
    try:
        cpp_extension._check_cuda_version(compiler, version)
    except RuntimeError as error:
        return str(error)
    return None


def nvcc_release(nvcc: str) -> tuple[int, int] | None:
    """Return the CUDA version of an nvcc; None if it does not say."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    return (int(release[1]), int(release[2])) if release else None


def architectures(release: tuple[int, int] | None) -> str:
    """Choose the GPU architectures for an nvcc of this release; PTX of the last one serves later ones.

    nvcc before CUDA 12.8 refuses sm_100. The newest PTX is then for sm_90: PTX for sm_90a runs on no other GPU.
    """
    return "8.0;9.0+PTX" if release is not None and release < (12, 8) else "8.0;9.0a;10.0+PTX"


def wants_cuda() -> bool:
    """Decide by TST_CUDA=1 or 0. Without it, CUDA kernels are built where they can be."""
    wanted = os.environ.get("TST_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"TST_CUDA is {wanted!r}; expected 0, 1 or unset")
    if wanted == "0":
        return False
    cpp_extension.CUDA_HOME = cuda_home(cpp_extension.CUDA_HOME)
    obstacle = cuda_obstacle(cpp_extension.CUDA_HOME)
    if obstacle is not None and wanted == "1":
        stop(f"TST_CUDA=1, but {obstacle}, or unset TST_CUDA to build the CPU kernels alone")
    if obstacle is not None and torch.version.cuda is not None:
        print(f"tst-ext: building the CPU kernels alone, because {obstacle}", file=sys.stderr)
    return obstacle is None


# The C++ side of torch's ABI is not used, so one build serves every torch from this version on.
macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
cxx_flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
# CMakeLists.txt finds the same files: tests/test_build.py compares the two.
extensions = [
    cpp_extension.CppExtension(
        "tst_ext._C",
        files("csrc/*.cpp") + files("csrc/cpu/*.cpp"),
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags},
    )
]
if wants_cuda():
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        release = nvcc_release(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(release)
    extensions.append(
        cpp_extension.CUDAExtension(
            "tst_ext._cuda",
            files("csrc/cuda/*.cu"),
            library_dirs=[runtime_folder(cpp_extension.CUDA_HOME)],
            define_macros=[*macros, ("USE_CUDA", None)],
            extra_compile_args={"nvcc": ["-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]},
        )
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Remove the CUDA kernels of an earlier build if this one has none: they would be packed and loaded."""

    def run(self) -> None:
        if not any(part.name == "tst_ext._cuda" for part in self.extensions):
            for folder in [self.build_lib, *([ROOT] if self.inplace or self.editable_mode else [])]:
                Path(folder, "tst_ext", f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        super().run()


setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
