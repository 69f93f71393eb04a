"""`tst info --check` is green here, and turns red, with the right advice, for each thing that is broken on purpose."""

import re
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tst_ext import _C, self_check
from tst_ext.ops import IN_PYTHON
from tst_ext.self_check import CASES, Finding, check_accuracy, check_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EMBEDDING, LINEAR, LOGITS = CASES
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def replace():
    """Put plain torch in the place of an op's CPU kernel, with changed results or an option that it ignores."""
    library = torch.library.Library("tst_ext", "IMPL")
    in_python = {op.__name__: op for op in IN_PYTHON}

    def put(op, change=lambda results: results, ignored=""):
        def wrong(*args, **options):
            options.pop(ignored, None)
            return change(in_python[op](*args, **options))

        library.impl(op, wrong, "CPU", allow_override=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, and by plain torch
        yield put
    library._destroy()


def test_nothing_is_wrong_here(monkeypatch, capsys):
    monkeypatch.setattr(self_check, "available_cpus", self_check.affinity_cpus)  # a quota here is no fault of ours
    before = _C.cpu_capability()
    assert self_check.self_check() == 0 and _C.cpu_capability() == before
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "0 problems" and not [line for line in lines if line.startswith("problem")]
    for case in CASES:
        start = f"ok       cpu ({', '.join(_C.cpu_capabilities())}), {case.op.__name__}: float32, bfloat16, float16"
        (line,) = [line for line in lines if line.startswith(start)]
        share = float(re.search(r"errors up to (\S+) of what rounding explains", line)[1])
        assert 0 < share < 0.5  # an error of the bound's size is no luck


def scaled(output, factor):
    return lambda results: tuple(r * factor if i == output else r for i, r in enumerate(results))


class TestWrongResults:
    @pytest.mark.parametrize(
        ("case", "op", "change", "found"),
        [
            (EMBEDDING, "bag_embedding", lambda out: 2 * out, "torch.float32, result without gradients errs by"),
            (EMBEDDING, "bag_embedding", lambda out: out * torch.nan, "torch.float32, result .*errs by nan"),
            (EMBEDDING, "bag_embedding_backward", lambda g: 0 * g, "torch.float32, gradient of weight errs by"),
            (EMBEDDING, "bag_embedding_backward", lambda g: -g, "torch.float32, gradient of weight errs by"),
            (EMBEDDING, "bag_embedding_backward", lambda g: 1.02 * g, "torch.float32, gradient of weight errs by"),
            (
                EMBEDDING, "bag_embedding_backward", lambda g: g * 1.05 if g.dtype == torch.bfloat16 else g,
                "torch.bfloat16, gradient of weight",
            ),
            (LINEAR, "linear_multi_hot_cross_entropy", scaled(0, 1.001), "result without gradients errs by"),
            (LINEAR, "linear_multi_hot_cross_entropy", scaled(2, 1.02), "gradient of hidden errs by"),
            (LINEAR, "linear_multi_hot_cross_entropy", scaled(4, 1.02), "gradient of bias errs by"),
        ],
    )  # fmt: skip
    def test_is_found(self, replace, case, op, change, found):
        replace(op, change)
        finding = check_accuracy(case, CPU)
        assert finding.status == "problem" and re.search(found, finding.text)
        assert "do not train" in finding.advice and "pip install" in finding.advice

    def test_an_option_that_is_ignored(self, replace):
        replace("multi_hot_cross_entropy_rows_", ignored="z_loss")
        finding = check_accuracy(LOGITS, CPU)
        assert "gradient of logits" in finding.text and "'z_loss': 0.01" in finding.text

    def test_one_instruction_set_alone(self, replace, monkeypatch):
        best = _C.cpu_capabilities()[-1]
        if best == "default":
            pytest.skip("one instruction set here")
        replace("bag_embedding", lambda out: out * (2 if _C.cpu_capability() == best else 1))
        finding = check_accuracy(EMBEDDING, CPU)
        assert finding.text.startswith(f"cpu {best}, bag_embedding: torch.float32, result")
        assert "TST_CPU_CAPABILITY=default" in finding.advice
        monkeypatch.setenv("TST_CPU_CAPABILITY", "default")  # one that is forced is checked alone
        before = _C.cpu_capability()
        _C.set_cpu_capability("default")
        assert check_accuracy(EMBEDDING, CPU).text.startswith("cpu (default), bag_embedding: float32, bfloat16")
        _C.set_cpu_capability(before)

    def test_an_op_that_raises(self, replace):
        replace("bag_embedding", lambda out: 1 / 0)
        finding = check_accuracy(EMBEDDING, CPU)
        assert finding.status == "problem" and "ZeroDivisionError" in finding.text

    def test_reduced_precision_is_named(self, replace, monkeypatch):
        replace("bag_embedding", lambda out: 2 * out)
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        assert "ONEDNN_DEFAULT_FPMATH_MODE, which reduce the precision" in check_accuracy(EMBEDDING, CPU).advice

    def test_report_and_exit_status(self, replace, monkeypatch, capsys):
        replace("bag_embedding", lambda out: 2 * out)
        monkeypatch.setattr(self_check, "findings", lambda: (check_accuracy(case, CPU) for case in (EMBEDDING, LOGITS)))
        assert self_check.self_check() == 1
        wrong, advice, right, last = capsys.readouterr().out.splitlines()
        assert wrong.startswith("problem  cpu default, bag_embedding") and right.startswith("ok       cpu (default")
        assert advice.startswith("         what to do: do not train with it") and last == "1 problem"


class TestWhatIsUsed:
    """The CPU: because there is no GPU, because this torch cannot use it; and how many of its cores."""

    @pytest.fixture
    def gpus(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return lambda count: monkeypatch.setattr(self_check, "nvidia_gpus", lambda: count)

    def test_no_gpu(self, gpus):
        gpus(0)
        assert self_check.check_missing_gpu() == ("note", "no accelerator: the CPU is used, and alone was checked", "")

    def test_gpu_that_the_user_hides(self, gpus, monkeypatch):
        gpus(2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        status, text, _ = self_check.check_missing_gpu()
        assert status == "note" and text.startswith("CUDA_VISIBLE_DEVICES hides any GPU: the CPU is used")

    def test_gpu_and_a_torch_for_the_cpu(self, gpus, monkeypatch):
        gpus(2)
        monkeypatch.setattr(torch.version, "cuda", None)
        status, text, advice = self_check.check_missing_gpu()
        assert status == "note" and "install a CUDA build of torch" in advice
        assert text == f"2 NVIDIA GPUs here, but the CPU is used: torch {torch.__version__} is not a CUDA build"

    def test_gpu_that_torch_does_not_reach(self, gpus, monkeypatch):
        def init():
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nMore")

        gpus(1)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "init", init)
        status, text, advice = self_check.check_missing_gpu()
        assert status == "problem" and text.startswith("1 NVIDIA GPU here, but the CPU is used: torch")
        assert text.endswith("is too old (found version 12040).") and "update the NVIDIA driver" in advice

    @pytest.mark.parametrize(
        ("threads", "available", "cores", "chosen", "status", "said"),
        [
            (1, 1, 1, "", "ok", "cpu: 1 thread"),
            (8, 8, 8, "", "ok", "cpu: 8 threads"),
            (1, 2, 8, "1", "ok", "cpu: 1 thread"),
            (2, 2, 8, "", "note", "cpu: 2 threads, because this container may use 1.5 of 8 CPUs"),
            (8, 2, 8, "8", "problem", "cpu: 8 threads, but this container may use 1.5 of 8 CPUs"),
        ],
    )
    def test_threads(self, monkeypatch, threads, available, cores, chosen, status, said):
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        for name, value in (("available_cpus", available), ("affinity_cpus", cores), ("cpu_quota", 1.5)):
            monkeypatch.setattr(self_check, name, lambda value=value: value)
        finding = self_check.check_threads()
        assert (finding.status, finding.text) == (status, said)
        assert ("OMP_NUM_THREADS=2 " in finding.advice or "OMP_NUM_THREADS=2:" in finding.advice) == (status != "ok")


class TestGpu:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(self_check, "CUDA_ARCHITECTURES", "sm_80, sm_90")
        monkeypatch.setattr(self_check, "bag_embedding", lambda *args: None)
        monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)  # there is no such device here
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(self_check, "check_accuracy", lambda case, device: Finding("ok", "accurate"))

    def test_without_kernels(self, monkeypatch):
        monkeypatch.setattr(self_check, "CUDA_ARCHITECTURES", "")
        monkeypatch.setattr(self_check, "NO_CUDA", "the reason")
        (finding,) = check_device(CUDA)  # nothing else is run: it would test plain torch
        assert finding.status == "problem" and finding.text == "cuda: a GPU runs plain torch, slower: the reason"
        assert "nvcc 13.0" in finding.advice and "TST_CUDA=1" in finding.advice

    def test_build_without_code_for_this_gpu(self, monkeypatch):
        def launch(*args):
            raise RuntimeError("no kernel image is available for execution on the device\nmore")

        first, *others = check_device(CUDA)
        assert first == ("ok", "cuda: kernels for sm_80, sm_90 on a GPU, sm_75", "") and len(others) == len(CASES)
        monkeypatch.setattr(self_check, "bag_embedding", launch)
        (finding,) = check_device(CUDA)
        assert finding.text == (
            "cuda: kernels for sm_80, sm_90 on a GPU, sm_75: no kernel image is available for execution on the device"
        )
        assert finding.status == "problem" and "TORCH_CUDA_ARCH_LIST=7.5 TST_CUDA=1" in finding.advice

    def test_device_that_has_no_kernels_by_design(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        for device in (CUDA, torch.device("mps")):  # ROCm, Metal
            first, *others = check_device(device)
            assert first.status == "note" and len(others) == len(CASES)


def test_missing_extra(monkeypatch):
    distributions = metadata.distributions
    missing = ("transformers", "accelerate")
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(metadata, "distributions", lambda name: [] if name in missing else [name])
    found = [self_check.check_extra(extra) for extra in self_check.EXTRAS]
    assert [finding.status for finding in found] == ["ok", "ok", "ok", "note", "ok"]
    assert found[2].text == "extra tensorboard: tensorboard 1.0"
    assert found[3].text == "extra hf: no transformers, accelerate; pip install 'tst-ext[hf]' adds it"
    assert any(distributions(name="torch")) and not any(distributions(name="no-such-package"))


def test_every_extra_of_pyproject_is_known():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(declared) - {"test", "docs", "bench", "peers", "dev"} == set(self_check.EXTRAS)
