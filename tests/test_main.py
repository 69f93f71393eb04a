"""`python -m tst_ext info`, which needs none of the trainer's packages."""

import os
import subprocess
import sys
import textwrap
from itertools import zip_longest

import pytest
import torch

from tst_ext import _C, __version__, _cpus, commands, self_check
from tst_ext.__main__ import main
from tst_ext._load import CUDA_ARCHITECTURES, NO_CUDA


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tst_ext", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


class TestInfo:
    def test_facts(self, capsys):
        assert main(["info"]) == 0
        facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        assert facts["tst-ext"] == __version__
        assert facts["torch"] == torch.__version__
        assert int(facts["threads"].split()[0]) >= 1
        assert facts["CPU capability"].split()[0] in _C.cpu_capabilities()
        assert facts["CUDA kernels"] == (CUDA_ARCHITECTURES or f"none: {NO_CUDA}")
        assert facts["device"].split(",")[0] == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_threads_are_those_of_the_quota(self, monkeypatch, capsys):
        monkeypatch.setattr(_cpus, "cpu_quota", lambda: 1.5)
        monkeypatch.setattr(_cpus, "affinity_cpus", lambda: 4)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        threads, seen = torch.get_num_threads(), []
        try:
            torch.set_num_threads(4)
            assert main(["info"]) == 0 and "threads: 2 (CPU quota 1.5)" in capsys.readouterr().out
            torch.set_num_threads(4)
            monkeypatch.setattr(commands, "run", lambda command, argv: seen.append(torch.get_num_threads()) or 0)
            assert main(["train"]) == 0 and seen == [2]
        finally:
            torch.set_num_threads(threads)

    def test_choices_are_forced_by_the_environment(self):
        choices = zip_longest(_C.cpu_capabilities(), _C.cpu_gemms(), fillvalue="")
        for capability, gemm in choices:
            result = run("info", TST_CPU_CAPABILITY=capability, TST_CPU_GEMM=gemm)
            assert result.returncode == 0, result.stderr
            assert f"CPU capability: {capability}" in result.stdout and f"CPU GEMM: {gemm}" in result.stdout

    @pytest.mark.parametrize(("variable", "offered"), [("TST_CPU_CAPABILITY", "default"), ("TST_CPU_GEMM", "blas")])
    def test_an_unknown_choice_is_named(self, variable, offered):
        result = run("info", **{variable: "avx9"})
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert variable in line and "'avx9'" in line and offered in line

    @pytest.mark.parametrize("status", [0, 1])
    def test_check_comes_after_the_facts_and_decides_the_exit_status(self, monkeypatch, capsys, status):
        monkeypatch.setattr(self_check, "self_check", lambda: print("the findings") or status)
        assert main(["info", "--check"]) == status
        facts, findings = capsys.readouterr().out.split("\n\n")
        assert f"tst-ext: {__version__}" in facts and findings == "the findings\n"

    def test_help_names_the_option(self, capsys):
        assert main(["info", "--help"]) == 0 and "--check" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [["--chek"], ["--check", "all"]])
    def test_unknown_arguments_are_named(self, arguments, capsys):
        assert main(["info", *arguments]) == 2 and f"got '{' '.join(arguments)}'" in capsys.readouterr().err


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
