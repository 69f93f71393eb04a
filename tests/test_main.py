"""`python -m tst_ext info`, which needs none of the trainer's packages."""

import os
import subprocess
import sys

import pytest
import torch

from tst_ext import _C, __version__


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tst_ext", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


class TestInfo:
    def test_facts(self):
        result = run("info")
        assert result.returncode == 0, result.stderr
        facts = dict(line.split(": ", 1) for line in result.stdout.splitlines())
        assert facts["tst-ext"] == __version__
        assert facts["torch"] == torch.__version__
        assert int(facts["threads"]) >= 1
        assert facts["CPU capability"].split()[0] in _C.cpu_capabilities()
        assert facts["CUDA architectures"]

    @pytest.mark.parametrize("capability", _C.cpu_capabilities())
    def test_capability_is_forced_by_the_environment(self, capability):
        assert f"CPU capability: {capability} " in run("info", TST_CPU_CAPABILITY=capability).stdout

    def test_unknown_capability_is_named(self):
        result = run("info", TST_CPU_CAPABILITY="avx9")
        assert result.returncode != 0
        assert "'avx9'" in result.stderr and "default" in result.stderr


def test_set_capability():
    before = _C.cpu_capability()
    try:
        _C.set_cpu_capability("default")
        assert _C.cpu_capability() == "default"
        with pytest.raises(ValueError, match="avx9"):
            _C.set_cpu_capability("avx9")
        assert _C.cpu_capability() == "default"
    finally:
        _C.set_cpu_capability(before)
