"""`python -m tst_ext info`, which needs none of the trainer's packages."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from tst_ext import _C, __version__, self_check
from tst_ext.__main__ import main


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

    @pytest.mark.parametrize("gemm", _C.cpu_gemms())
    def test_gemm_is_forced_by_the_environment(self, gemm):
        assert f"CPU GEMM: {gemm} " in run("info", TST_CPU_GEMM=gemm).stdout

    @pytest.mark.parametrize(("variable", "offered"), [("TST_CPU_CAPABILITY", "default"), ("TST_CPU_GEMM", "blas")])
    def test_an_unknown_choice_is_named(self, variable, offered):
        result = run("info", **{variable: "avx9"})
        assert result.returncode != 0
        assert variable in result.stderr and "'avx9'" in result.stderr and offered in result.stderr

    @pytest.mark.parametrize("status", [0, 1])
    def test_check_comes_after_the_facts_and_decides_the_exit_status(self, monkeypatch, capsys, status):
        monkeypatch.setattr(self_check, "self_check", lambda: print("the findings") or status)
        assert main(["info", "--check"]) == status
        facts, findings = capsys.readouterr().out.split("\n\n")
        assert f"tst-ext: {__version__}" in facts and findings == "the findings\n"

    def test_help_names_the_option(self):
        result = run("info", "--help")
        assert result.returncode == 0 and "--check" in result.stdout

    @pytest.mark.parametrize("arguments", [["--chek"], ["--check", "all"]])
    def test_unknown_arguments_are_named(self, arguments):
        result = run("info", *arguments)
        assert result.returncode == 2 and f"got '{' '.join(arguments)}'" in result.stderr


@pytest.mark.parametrize(("world", "ends"), [("1", "main\nthe end of Python\n"), ("2", "main\n")])
def test_under_torchrun_the_process_ends_without_the_end_of_python(world, ends):
    """Where gloo's threads abort it now and then."""
    code = """
        import atexit, tst_ext.__main__ as command
        atexit.register(print, "the end of Python")
        command.main = lambda: print("main") or 3
        command.entry()"""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": world},
    )
    assert (result.returncode, result.stdout) == (3, ends), result.stderr


@pytest.mark.parametrize(
    ("get", "choose", "offered"),
    [(_C.cpu_capability, _C.set_cpu_capability, "default"), (_C.cpu_gemm, _C.set_cpu_gemm, "blas")],
)
def test_choices(get, choose, offered):
    before = get()
    try:
        choose(offered)
        assert get() == offered
        with pytest.raises(ValueError, match="avx9"):
            choose("avx9")
        assert get() == offered
    finally:
        choose(before)
