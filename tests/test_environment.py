"""The command under an environment, a locale and an output that others chose: a line on stderr, never a traceback."""

import ast
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tst_ext.__main__ as command
from tst_ext import _cpus
from tst_ext.__main__ import entry, main
from tst_ext.train import distributed
from tst_ext.train.distributed import Processes, choose_device, rank_and_world
from tst_ext.train.files import UserError

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FOUND = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Set these variables of torchrun, and no others of them."""

    def set_to(variables):
        for name in GROUP:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


class TestTorchrun:
    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({}, (0, 1)),
            ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),  # as a shell script exports what it lacks
            ({"WORLD_SIZE": ""}, (0, 1)),
            ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
            ({"RANK": "1", "WORLD_SIZE": "2", **FOUND}, (1, 2)),
        ],
    )
    def test_what_it_says(self, environment, variables, expected):
        environment(variables)
        assert rank_and_world() == expected

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"RANK": "1"}, "RANK, WORLD_SIZE: expected both, as torchrun sets them, or neither, got RANK='1', "
             "WORLD_SIZE=None"),
            ({"WORLD_SIZE": "2"}, "or neither, got RANK=None, WORLD_SIZE='2'"),
            ({"RANK": "0", "WORLD_SIZE": ""}, "or neither, got RANK='0', WORLD_SIZE=''"),
            ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK: expected an integer >= 0, as torchrun sets it, got 'first'"),
            ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: expected an integer >= 0, as torchrun sets it, got '-1'"),
            ({"RANK": "0", "WORLD_SIZE": "2x"}, "WORLD_SIZE: expected an integer >= 0, as torchrun sets it, got '2x'"),
            ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: expected an integer >= 1, got 0"),
            ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected an integer below WORLD_SIZE = 2, got 2"),
            ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR: expected one, as torchrun sets it, "
             "with WORLD_SIZE = 2, got None"),
            ({"RANK": "0", "WORLD_SIZE": "2", **FOUND, "MASTER_PORT": ""}, "MASTER_PORT: expected one, as torchrun"),
            ({"RANK": "0", "WORLD_SIZE": "2", **FOUND, "MASTER_PORT": "http"}, "MASTER_PORT: expected an integer >= 0"),
            ({"RANK": "0", "WORLD_SIZE": "2", **FOUND, "MASTER_PORT": "65536"}, "MASTER_PORT: expected an integer "
             "below 65536, got 65536"),
            ({"LOCAL_RANK": "a"}, "LOCAL_RANK: expected an integer >= 0, as torchrun sets it, got 'a'"),
        ],
    )  # fmt: skip
    def test_what_it_would_not_say_is_one_line(self, environment, variables, message, tmp_path, capsys):
        environment(variables)
        out = tmp_path / "run"
        assert main(["train", "--device", "cpu", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tst train: ") and message in line and not out.exists()

    def test_an_empty_local_rank_is_none(self, environment):
        environment({"LOCAL_RANK": ""})
        assert choose_device("cpu").type == "cpu"

    @pytest.mark.skipif(not distributed.dist.is_available(), reason="needs torch.distributed")
    def test_processes_that_cannot_be_joined(self, environment, monkeypatch):
        def refuse(*_):
            raise distributed.dist.DistNetworkError("The server socket has failed to listen\nand a stack")

        environment({"RANK": "0", "WORLD_SIZE": "2", **FOUND})
        monkeypatch.setattr(distributed.dist, "init_process_group", refuse)
        message = "MASTER_ADDR, MASTER_PORT: .* at 127.0.0.1:29500: The server socket has failed to listen$"
        with pytest.raises(UserError, match=message), Processes("cpu"):
            pass


class TestText:
    def test_an_argument_that_is_no_text(self, capsys):
        assert main(["generate", "run", "--prompt", os.fsdecode(b"caf\xe9")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tst: expected arguments in utf-8,") and r"got 'caf\udce9'" in line

    def test_output_that_the_locale_cannot_write(self, monkeypatch):
        output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(command, "main", lambda: print("café") or 3)
        with pytest.raises(SystemExit) as ended:
            entry()
        assert (ended.value.code, output.buffer.getvalue()) == (3, b"caf\\xe9\n")

    def test_a_name_that_the_locale_cannot_write(self, monkeypatch, capsys):
        monkeypatch.setattr("tst_ext.commands.run", lambda *_: "\u00e9".encode("ascii"))
        assert main(["train"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(r"tst train: 'ascii' codec can't encode character '\xe9'")

    def test_no_file_is_read_in_the_encoding_of_the_locale(self):
        """Calls of open, read_text and write_text name an encoding, unless they read or write bytes."""
        files = sorted(Path(command.__file__).parent.rglob("*.py"))
        without = []
        for file in files:
            for call in (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)):
                text = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
                opened = isinstance(call.func, ast.Name) and call.func.id == "open"
                binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[1:2])
                if (text or (opened and not binary)) and "encoding" not in {word.arg for word in call.keywords}:
                    without.append(f"{file}:{call.lineno}")
        assert len(files) > 40 and not without

    def test_control_groups_with_other_names_than_ascii(self, tmp_path):
        (tmp_path / "caf\udce9").mkdir()
        (tmp_path / "caf\udce9" / "cpu.max").write_text("150000 100000\n", encoding="ascii")
        (tmp_path / "own").write_bytes(b"0::/caf\xe9\n")
        assert _cpus.cpu_quota(tmp_path, tmp_path / "own") == 1.5


class TestOutput:
    """In a process of its own: the end of Python writes what is left."""

    def run(self, code, stdout):
        code = f"import sys, tst_ext.__main__ as command\n{code}\ncommand.entry()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for name in GROUP:
            environment.pop(name, None)
        process = subprocess.run(
            [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
        )
        return process.returncode, process.stderr

    @pytest.mark.parametrize("ended", ["0", "sys.exit(0)"], ids=["a status", "as --help ends"])
    def test_a_reader_that_has_enough(self, ended):
        """As of `tst info | head -1`."""
        reader, writer = os.pipe()
        os.close(reader)
        try:
            result = self.run(f"command.main = lambda: print('fact') or {ended}", writer)
        finally:
            os.close(writer)
        assert result == (128 + signal.SIGPIPE, "")

    def test_a_reader_that_is_gone_before_all_is_printed(self, monkeypatch):
        def run(*_):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

        monkeypatch.setattr("tst_ext.commands.run", run)
        with pytest.raises(BrokenPipeError):  # for `entry`, which is silent about it
            main(["plan"])

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
    def test_a_full_disk(self):
        with open("/dev/full", "w") as full:
            status, error = self.run("command.main = lambda: print('fact') or 0", full)
        assert (status, error) == (2, "tst: the output cannot be written: [Errno 28] No space left on device\n")

    def test_no_output(self):
        status, error = self.run("sys.stdout = None\ncommand.main = lambda: print('fact') or 0", subprocess.DEVNULL)
        assert (status, error) == (0, "")
