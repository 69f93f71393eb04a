"""The built extension and what setup.py says when it cannot build."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from tst_ext import _C

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm from binutils")
def test_no_cxx_symbol_of_torch_is_needed():
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", _C.__file__], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert any("aoti_torch_" in line for line in symbols), "the C functions of the stable ABI are needed"
    assert not [line for line in symbols if any(name in line for name in ("torch::", "c10::", "at::"))]


class TestSetup:
    def run(self, **environment):
        return subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )

    def test_missing_compiler_is_named_with_what_to_install(self):
        result = self.run(CXX="absent-g++")
        assert result.returncode != 0
        assert "absent-g++" in result.stderr and "apt-get install g++" in result.stderr

    @pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
    def test_cuda_without_a_cuda_torch_is_refused(self):
        result = self.run(TST_CUDA="1")
        assert result.returncode != 0
        assert "TST_CUDA=1" in result.stderr and torch.__version__ in result.stderr and "nvcc" in result.stderr

    def test_unknown_value_is_refused(self):
        result = self.run(TST_CUDA="yes")
        assert result.returncode != 0 and "'yes'" in result.stderr and "expected 0, 1 or unset" in result.stderr

    def test_cuda_can_be_left_out(self):
        assert self.run(TST_CUDA="0").returncode == 0


class TestSetupForCuda:
    """Its decisions, in a process without a CUDA toolkit: setup() is left out."""

    @pytest.fixture
    def run(self, monkeypatch):
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # so that setup.py's change is undone afterwards
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME)
        return lambda root=ROOT: runpy.run_path(str(root / "setup.py")) | given

    @staticmethod
    def toolkit(folder, release, runtime="lib64"):
        """Make the part of a CUDA toolkit that setup.py reads, with `runtime` None only its nvcc; return its folder."""
        (folder / "bin").mkdir(parents=True)
        script = f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        (folder / "bin/nvcc").write_text(script)
        (folder / "bin/nvcc").chmod(0o755)
        if runtime:
            (folder / runtime).mkdir()
            (folder / runtime / "libcudart.so").touch()
        return str(folder)

    @pytest.mark.parametrize(
        ("release", "wanted"),
        [
            ("12.6", "8.0;9.0+PTX"),
            ("12.8", "8.0;9.0a;10.0+PTX"),
            ("13.0", "8.0;9.0a;10.0+PTX"),
            ("12.10", "8.0;9.0a;10.0+PTX"),
        ],
    )
    def test_architectures(self, run, monkeypatch, tmp_path, release, wanted):
        monkeypatch.setattr(torch.version, "cuda", release)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", self.toolkit(tmp_path, release))
        monkeypatch.setenv("TST_CUDA", "1")
        (extension,) = run()["ext_modules"]
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == wanted
        assert any(source.endswith(".cu") for source in extension.sources)
        assert str(tmp_path / "lib64") in extension.library_dirs

    @pytest.mark.extended
    @pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
    def test_both_builds_find_a_new_file(self, run, monkeypatch, tmp_path):
        root, build = tmp_path / "root", tmp_path / "build"
        for folder in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / folder, root / folder)
        for name in ("setup.py", "CMakeLists.txt"):
            shutil.copy(ROOT / name, root)
        new = {"csrc/cpu/new_kernel.cpp", "csrc/cuda/new_op.cu"}
        for name in new:
            (root / name).touch()
        options = ["-DTST_CUDA_HOST=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
        subprocess.run(["cmake", "-S", root, "-B", build, *options], check=True, capture_output=True)
        commands = json.loads((build / "compile_commands.json").read_text())
        by_cmake = {os.path.relpath(command["file"], root) for command in commands}

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", self.toolkit(tmp_path, "13.0"))
        monkeypatch.setenv("TST_CUDA", "1")
        (extension,) = run(root)["ext_modules"]
        assert new <= set(extension.sources) and new <= by_cmake
        ops = {name for name in extension.sources if "torch::" in (root / name).read_text() and ".cpp" in name}
        raw_and_cuda = {name for name in by_cmake if name.startswith("csrc")}
        assert raw_and_cuda == set(extension.sources) - ops - {"csrc/library.cpp"}

    def test_architectures_of_the_user(self, run, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", self.toolkit(tmp_path, "13.0"))
        monkeypatch.setenv("TST_CUDA", "1")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
        run()
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"

    def test_toolkit_behind_a_script(self, run, tmp_path):
        cuda_home = run()["cuda_home"]
        script = self.toolkit(tmp_path / "local", "13.0", runtime=None)
        standard = self.toolkit(tmp_path / "local/cuda", "13.0")
        conda = self.toolkit(tmp_path / "conda", "13.0", runtime="lib")
        assert cuda_home(script, False, standard) == standard
        assert cuda_home(script, True, standard) == script, "named by the user"
        assert cuda_home(script, False, str(tmp_path / "absent")) == script
        assert cuda_home(conda, False, standard) == conda
        assert cuda_home(None, False, standard) is None
