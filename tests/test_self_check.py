"""`tst info --check` is green here, and turns red, with the right advice, for each thing that is broken on purpose."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

import tst_ext
from tst_ext import _C, fallback, self_check
from tst_ext.extension import MINIMUM_TORCH, diagnosis, too_old
from tst_ext.self_check import CASES, check_accuracy, check_device, check_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EMBEDDING, LINEAR, LOGITS = CASES
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def replace():
    """Put plain torch in the place of an op's CPU kernel, with changed results or an option that it ignores."""
    library = torch.library.Library("tst_ext", "IMPL")

    def put(op, change=lambda results: results, ignored=""):
        def wrong(*args, **options):
            options.pop(ignored, None)
            return change(getattr(fallback, op)(*args, **options))

        library.impl(op, wrong, "CPU", allow_override=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, and by plain torch
        yield put
    library._destroy()


def test_nothing_is_wrong_here(capsys):
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
        replace("multi_hot_cross_entropy_backward_", ignored="z_loss")
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


class TestKernels:
    @pytest.fixture
    def has(self, monkeypatch):
        """Let the dispatcher know some ops alone, beside a GPU."""
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(_C, "cuda_architectures", lambda: "sm_80, sm_90")
        monkeypatch.setattr(self_check, "bag_embedding", lambda *args: None)
        monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)  # there is no such device here
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        name = "_dispatch_has_kernel_for_dispatch_key"
        return lambda known: monkeypatch.setattr(torch._C, name, lambda op, key: known(op.removeprefix("tst_ext::")))

    def test_a_missing_one_on_the_cpu(self, has):
        has(lambda op: op != "bag_embedding_backward")
        (finding,) = check_device(CPU)  # nothing else is run: it would test plain torch
        assert (finding.status, finding.text) == ("problem", "cpu: no compiled kernel for bag_embedding_backward")
        assert "pip install" in finding.advice

    def test_linear_loss_needs_no_cuda_kernel_of_its_own(self, has):
        has(lambda op: op != "linear_multi_hot_cross_entropy")
        assert check_kernels(CUDA).status == "ok" and check_kernels(CPU).status == "problem"
        has(lambda op: op != "scaled_copy_")
        assert check_kernels(CUDA).status == "problem" and check_kernels(CPU).status == "ok"

    @pytest.mark.parametrize(("known", "architectures"), [(False, "sm_80"), (True, "")])
    def test_cpu_build_with_a_cuda_device(self, has, monkeypatch, known, architectures):
        has(lambda op: known)
        monkeypatch.setattr(_C, "cuda_architectures", lambda: architectures)
        (finding,) = check_device(CUDA)
        assert finding.status == "problem" and "a GPU runs plain torch" in finding.text
        assert "nvcc 13.0" in finding.advice and "TST_CUDA=1" in finding.advice

    def test_build_without_code_for_this_gpu(self, has, monkeypatch):
        def launch(*args):
            raise RuntimeError("no kernel image is available for execution on the device\nmore")

        has(lambda op: True)
        assert check_kernels(CUDA) == ("ok", "cuda: kernels for sm_80, sm_90 on a GPU, sm_75", "")
        monkeypatch.setattr(self_check, "bag_embedding", launch)
        finding = check_kernels(CUDA)
        assert finding.text == (
            "cuda: kernels for sm_80, sm_90 on a GPU, sm_75: no kernel image is available for execution on the device"
        )
        assert finding.status == "problem" and "TORCH_CUDA_ARCH_LIST=7.5 TST_CUDA=1" in finding.advice

    def test_device_that_has_no_kernels_by_design(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert check_kernels(CUDA).status == check_kernels(torch.device("mps")).status == "note"  # ROCm, Metal

    def test_a_torch_without_its_private_function(self, has, monkeypatch):
        """The rest is checked all the same."""
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
        monkeypatch.setattr(self_check, "CASES", ())
        (finding,) = check_device(CPU)
        assert (finding.status, finding.advice) == ("note", "") and "this torch cannot tell" in finding.text
        assert check_kernels(CUDA).status == "ok"  # a launch tells
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op: True, raising=False)
        assert check_kernels(CPU).status == "note"  # other arguments


def test_missing_extra(monkeypatch):
    distributions = metadata.distributions
    missing = ("transformers", "accelerate")
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(metadata, "distributions", lambda name: [] if name in missing else [name])
    found = [self_check.check_extra(extra) for extra in self_check.EXTRAS]
    assert [finding.status for finding in found] == ["ok", "ok", "note", "ok"]
    assert found[1].text == "extra tensorboard: tensorboard 1.0"
    assert found[2].text == "extra hf: no transformers, accelerate; pip install 'tst-ext[hf]' adds it"
    assert any(distributions(name="torch")) and not any(distributions(name="no-such-package"))


def test_every_extra_of_pyproject_is_known():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(declared) - {"test", "docs", "bench", "peers", "dev"} == set(self_check.EXTRAS)


def test_the_minimum_torch_is_that_of_the_package():
    assert f"torch>={MINIMUM_TORCH}" in metadata.requires("tst-ext")


@pytest.mark.parametrize("version", ["2.9.1", "2.10.0+cu128"])
def test_too_old_a_torch(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    found = self_check.check_torch()
    assert found.status == "problem" and version in found.text and "'torch>=2.11'" in found.advice


class TestExtensionThatDoesNotLoad:
    """What the loader says, on Linux and macOS, and what is made of it."""

    SUFFIX = Path(_C.__file__).name

    @pytest.mark.parametrize(
        ("error", "meaning", "advice"),
        [
            ("_C.so: undefined symbol: aoti_torch_new_call", "lacks a function", "install torch again"),
            ("dlopen(_C.so): symbol not found in flat namespace '_aoti'", "lacks a function", "install torch again"),
            ("libcudart.so.13: cannot open shared object file: No such file", "another CUDA", "for the CUDA version"),
            ("libtorch_cuda.so: cannot open shared object file", "another CUDA", "for the CUDA version"),
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


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.11.0", False), ("2.11.0a0+abc.nv26.03", False), ("3.0.1", False), ("2.10.1+cpu", True), ("2.9", True)],
)
def test_too_old_by_the_release(version, old):
    assert too_old(version) == old
