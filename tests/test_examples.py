"""The examples as a user runs them, with few steps. They share one cache, as a user's do: the corpus is made once."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
VOCABULARY = 1024  # of plain_loop.py and the notebook


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """A cache that is not the user's, and one thread, as threads that wait for each other would take a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TST_STEPS", "40")
        yield


def run(name, *options):
    """What the script prints."""
    command = [sys.executable, str(EXAMPLES / name), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tested():
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {"ops.py", "plain_loop.py", "hf_trainer.py", "tst.ipynb"}


@pytest.mark.extended
def test_ops():
    output = run("ops.py", "--vocabulary", "2048")
    differences = [float(d) for d in re.findall(r"relative difference (\S+)", output)]
    # Both err by rounding, in sums of up to 2048 terms that are added in different orders.
    allowed = 2 * 2 * 2048**0.5 * torch.finfo(torch.float32).eps
    assert len(differences) == 4 and max(differences) < allowed
    assert "[4, 256, 6]" in output and "[2048, 256]" in output


@pytest.mark.extended
def test_plain_loop():
    output = run("plain_loop.py", "--steps", "40", "--held-out-tokens", "8192")
    held_out = {int(step): float(loss) for step, loss in re.findall(r"step +(\d+)  held-out .* (\S+)", output)}
    assert held_out.keys() == {12, 40}
    assert held_out[40] < held_out[12] < 1.1 * math.log(VOCABULARY)


@pytest.mark.extended
def test_hf_trainer(tmp_path):
    output = run("hf_trainer.py", "--steps", "5", "--out", str(tmp_path))
    assert math.isfinite(float(re.search(r"held-out next-token loss: (\S+)", output)[1]))
    assert (tmp_path / "model.safetensors").exists()


class TestNotebook:
    def test_it_is_committed_without_outputs(self):
        notebook = json.loads((EXAMPLES / "tst.ipynb").read_text(encoding="utf-8"))
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
        nbformat.validate(notebook)  # 4.5 demands an id of each cell
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)

    @pytest.mark.extended
    def test_it_runs(self):
        notebook = nbformat.read(EXAMPLES / "tst.ipynb", as_version=4)
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        outputs = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell.cell_type == "code"}
        baseline, tst = re.findall(r"held-out next-token loss (\S+)", outputs["runs"][0]["text"])
        assert float(baseline) < float(tst) < math.log(VOCABULARY)  # with so few steps TST is behind
        assert "image/png" in outputs["plot"][0]["data"]
