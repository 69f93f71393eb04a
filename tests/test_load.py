"""An extension that does not load: the error says why, and what to do."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import tst_ext
from tst_ext import _C
from tst_ext._load import MINIMUM_TORCH, diagnosis, load_cuda, too_old
from tst_ext.ops import plain


def test_the_minimum_torch_is_that_of_the_package():
    (requirement,) = [line for line in metadata.requires("tst-ext") if re.match("torch[<>=]", line)]
    assert f">={MINIMUM_TORCH}" in re.split("torch|,", requirement)


class TestExtensionThatDoesNotLoad:
    """What the loader says, on Linux and macOS, and what is made of it."""

    SUFFIX = Path(_C.__file__).name

    @pytest.mark.parametrize(
        ("error", "meaning", "advice"),
        [
            ("_C.so: undefined symbol: aoti_torch_new_call", "lacks a function", "install torch again"),
            ("dlopen(_C.so): symbol not found in flat namespace '_aoti'", "lacks a function", "install torch again"),
            ("libstdc++.so.6: cannot open shared object file", "libstdc++, a library of the system", "package manager"),
            ("dlopen(_C.so): Library not loaded: @rpath/libtorch_cpu.dylib", "libtorch_cpu, a part", "install torch"),
            ("/lib/libm.so.6: version `GLIBC_2.38' not found", "newer Linux", "build it"),
            ("libstdc++.so.6: version `GLIBCXX_3.4.31' not found", "newer Linux", "build it"),
            ("_C.so: invalid ELF header", "damaged", "build it"),
        ],
    )
    def test_meaning(self, tmp_path, error, meaning, advice):
        (tmp_path / self.SUFFIX).touch()
        found = diagnosis(error, tmp_path)
        assert meaning in found[0] and advice in found[1]

    def test_not_built(self, tmp_path):
        meaning, advice = diagnosis("No module named 'tst_ext._C'", tmp_path)
        assert f"{tmp_path} is a checkout that was not built" in meaning
        assert "-e ." in advice and "leave that folder" in advice

    def test_another_python(self, tmp_path):
        (tmp_path / "_C.cpython-37m-x86_64-linux-gnu.so").touch()
        meaning, advice = diagnosis("No module named 'tst_ext._C'", tmp_path)
        assert (
            "_C.cpython-37m" in meaning and sys.version.split()[0] in meaning and "build it with this Python" in advice
        )

    def test_too_old_a_torch_is_the_first_suspect(self, monkeypatch, tmp_path):
        (tmp_path / self.SUFFIX).touch()
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
        meaning, advice = diagnosis("_C.so: undefined symbol: aoti_torch_new_call", tmp_path)
        assert "torch 2.10.0 is too old" in meaning and "--upgrade 'torch>=2.11'" in advice

    @pytest.mark.parametrize(
        ("broken", "code"),
        [
            ("missing", "import tst_ext"),
            ("missing", "runpy.run_module('tst_ext', run_name='__main__')"),
            ("damaged", "import tst_ext"),
        ],
    )
    def test_both_ways_in_say_it(self, tmp_path, broken, code):
        """A copy of the package whose extension is missing or damaged: `import tst_ext` and the command."""
        shutil.copytree(Path(tst_ext.__file__).parent, tmp_path / "tst_ext", ignore=shutil.ignore_patterns("*.so"))
        if broken == "damaged":
            (tmp_path / "tst_ext" / self.SUFFIX).write_bytes(b"no extension")
        expected = {"missing": "a checkout that was not built", "damaged": "the file is damaged"}[broken]
        # An editable installation would find the extension of the checkout.
        leave = "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]; "
        result = subprocess.run(
            [sys.executable, "-c", leave + code, "info", "--check"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert f"the compiled extension does not load: {tmp_path if broken == 'missing' else ''}" in result.stderr
        assert expected in result.stderr and "what to do:" in result.stderr


class TestCudaLibrary:
    """It is loaded where torch is for CUDA; without it the package works, and knows why there are no kernels."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"of another CUDA")
        return tmp_path

    def test_not_built(self, tmp_path):
        assert load_cuda(tmp_path) == ("", "this build of tst-ext has no CUDA kernels")

    def test_torch_for_the_cpu(self, folder, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert load_cuda(folder) == ("", f"torch {torch.__version__} is not a CUDA build")

    def test_another_cuda(self, folder, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        architectures, reason = load_cuda(folder)
        assert architectures == ""
        assert f"do not load with torch {torch.__version__}, CUDA 12.8: " in reason and str(folder) in reason

    def test_the_warning_of_plain_torch_says_why(self, monkeypatch):
        monkeypatch.setattr(plain, "NO_CUDA", "the reason")
        plain._warn.cache_clear()
        with pytest.warns(UserWarning, match=r"no compiled kernel for cuda \(the reason\), running plain torch"):
            plain._warn("cuda")
        with pytest.warns(UserWarning, match="no compiled kernel for xpu, running plain torch"):
            plain._warn("xpu")
        plain._warn.cache_clear()


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.11.0", False), ("2.11.0a0+abc.nv26.03", False), ("3.0.1", False), ("2.10.1+cpu", True), ("2.9", True)],
)
def test_too_old_by_the_release(version, old):
    assert too_old(version) == old
