"""The built extension and what setup.py says when it cannot build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
