"""`tst info --check` is green here, and turns red, with the right advice, for each thing that is broken on purpose."""

import os
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
from tst_ext.self_check import (
    CASES,
    check_accuracy,
    check_device,
    check_image,
    check_kernels,
    check_repeats,
    check_without_gradients,
)

CPU = torch.device("cpu")
EMBEDDING, LINEAR, LOGITS = CASES
ROOT = Path(__file__).resolve().parent.parent


def statuses(found):
    return [finding.status for finding in found]


@pytest.fixture
def replace():
    """Puts a function in the place of an op's CPU kernel."""
    library = torch.library.Library("tst_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, and by plain torch
        yield lambda op, function: library.impl(op, function, "CPU", allow_override=True)
    library._destroy()


class TestHealthy:
    def test_nothing_is_wrong_here(self, capsys):
        assert self_check.self_check() == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == "0 problems"
        assert not [line for line in lines if line.startswith("problem")]
        for capability in _C.cpu_capabilities():
            for case in CASES:
                assert any(
                    line.startswith(f"ok       cpu {capability}, {case.op}: float32, bfloat16") for line in lines
                )

    def test_rounding_is_far_from_the_bound(self):
        """An error of the bound's size is no luck: other inputs come nowhere near it."""
        for case in CASES:
            for options in case.options:
                for dtype in self_check.DTYPES:
                    assert max(self_check._shares(case, CPU, dtype, options)) < 0.5, (case.op, options, dtype)

    def test_capability_is_put_back(self):
        before = _C.cpu_capability()
        check_accuracy(LINEAR, CPU, "default")
        assert _C.cpu_capability() == before


class TestWrongResults:
    @pytest.mark.parametrize("factor", [0.0, -1.0, 1.02])
    def test_gradient_of_the_embedding(self, replace, factor):
        def wrong(*args, **options):
            return fallback.bag_embedding_backward(*args, **options) * factor

        replace("bag_embedding_backward", wrong)
        found = check_accuracy(EMBEDDING, CPU)
        assert found.status == "problem"
        assert "bag_embedding: torch.float32, gradient of weight errs by" in found.text
        assert "do not train" in found.advice and "pip install" in found.advice

    @pytest.mark.parametrize(("output", "name"), [(0, "result"), (2, "gradient of hidden"), (4, "gradient of bias")])
    def test_results_of_the_linear_loss(self, replace, output, name):
        def wrong(*args, **options):
            results = list(fallback.linear_multi_hot_cross_entropy(*args, **options))
            results[output] = results[output] * 1.02
            return tuple(results)

        replace("linear_multi_hot_cross_entropy", wrong)
        found = check_accuracy(LINEAR, CPU)
        assert found.status == "problem" and f"{name} errs by" in found.text

    def test_validation_alone(self, replace):
        def wrong(*args, grad_hidden=False, grad_weight=False, grad_bias=False, **options):
            gradients = dict(grad_hidden=grad_hidden, grad_weight=grad_weight, grad_bias=grad_bias)
            results = fallback.linear_multi_hot_cross_entropy(*args, **gradients, **options)
            return results if any(gradients.values()) else (results[0] * 1.001, *results[1:])

        assert check_without_gradients(CPU).status == "ok"
        replace("linear_multi_hot_cross_entropy", wrong)
        found = check_without_gradients(CPU)
        assert found.status == "problem" and "loss without gradients: errors up to 1.0e-03" in found.text

    def test_reduced_precision_is_named(self, replace, monkeypatch):
        replace("bag_embedding", lambda *args, **options: fallback.bag_embedding(*args, **options) * 2)
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        assert check_accuracy(EMBEDDING, CPU).advice.startswith("ONEDNN_DEFAULT_FPMATH_MODE reduces the precision")

    def test_a_forced_instruction_set_is_checked_alone(self, monkeypatch):
        monkeypatch.setenv("TST_CPU_CAPABILITY", _C.cpu_capability())
        checked = [finding.text for finding in check_device(CPU) if ": float32, bfloat16" in finding.text]
        assert len(checked) == len(CASES) and all(text.startswith(f"cpu {_C.cpu_capability()},") for text in checked)

    def test_nan(self, replace):
        replace("bag_embedding", lambda *args, **options: fallback.bag_embedding(*args, **options) * float("nan"))
        assert "result errs by inf" in check_accuracy(EMBEDDING, CPU).text

    def test_an_option_that_is_ignored(self, replace):
        def wrong(*args, z_loss=0.0, **options):
            return fallback.multi_hot_cross_entropy_backward_(*args, **options)

        replace("multi_hot_cross_entropy_backward_", wrong)
        found = check_accuracy(LOGITS, CPU)
        assert found.status == "problem" and "gradient of logits" in found.text and "z_loss=0.01" in found.text

    def test_sixteen_bits_alone(self, replace):
        def wrong(weight_grad, *args, **options):
            gradient = fallback.bag_embedding_backward(weight_grad, *args, **options)
            return gradient * 1.05 if gradient.dtype == torch.bfloat16 else gradient

        replace("bag_embedding_backward", wrong)
        assert "torch.bfloat16" in check_accuracy(EMBEDDING, CPU).text

    def test_one_instruction_set_alone(self, replace):
        *others, best = _C.cpu_capabilities()
        if not others:
            pytest.skip("one instruction set here")

        def wrong(*args, **options):
            return fallback.bag_embedding(*args, **options) * (2 if _C.cpu_capability() == best else 1)

        replace("bag_embedding", wrong)
        assert statuses(check_accuracy(EMBEDDING, CPU, capability) for capability in others) == ["ok"] * len(others)
        found = check_accuracy(EMBEDDING, CPU, best)
        assert found.status == "problem" and found.text.startswith(f"cpu {best}, bag_embedding: torch.float32, result")
        assert "TST_CPU_CAPABILITY=default" in found.advice

    def test_an_op_that_raises(self, replace, monkeypatch):
        def wrong(*args, **options):
            raise RuntimeError("illegal instruction")

        replace("bag_embedding", wrong)
        monkeypatch.setattr(self_check, "CASES", (EMBEDDING,))
        kernels, *accuracy = check_device(CPU)  # and neither repeats nor speed
        assert kernels.status == "ok" and len(accuracy) == len(_C.cpu_capabilities())
        assert all(found.status == "problem" and "illegal instruction" in found.text for found in accuracy)

    def test_repeats_that_differ(self, replace):
        calls = []

        def wrong(*args, **options):
            calls.append(1)
            return fallback.bag_embedding(*args, **options) + (1e-6 if len(calls) == 3 else 0)

        replace("bag_embedding", wrong)
        found = check_repeats(CPU)
        assert found.status == "problem" and "bag_embedding: a repeated call" in found.text

    def test_exit_status(self, replace, monkeypatch, capsys):
        replace("bag_embedding", lambda *args, **options: 2 * fallback.bag_embedding(*args, **options))
        monkeypatch.setattr(self_check, "findings", lambda: (check_accuracy(case, CPU) for case in (EMBEDDING, LOGITS)))
        assert self_check.self_check() == 1
        wrong, advice, right, last = capsys.readouterr().out.splitlines()
        assert wrong.startswith("problem  cpu, bag_embedding") and right.startswith("ok       cpu, multi_hot")
        assert advice.startswith("         what to do: do not train with it")
        assert last == "1 problem"


class TestKernels:
    def test_without_cpu_kernels(self, monkeypatch):
        monkeypatch.setattr(self_check, "_has_kernel", lambda op, device: op != "bag_embedding_backward")
        found = check_kernels(CPU)
        assert (found.status, found.text) == ("problem", "cpu: no compiled kernel for bag_embedding_backward")
        assert "pip install" in found.advice

    def test_cpu_build_with_a_cuda_device(self, monkeypatch):
        monkeypatch.setattr(self_check, "_has_kernel", lambda op, device: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        (found,) = check_device(torch.device("cuda"))  # nothing else is run: it would test plain torch
        assert found.status == "problem" and "a GPU runs plain torch" in found.text
        assert "nvcc 13.0" in found.advice and "TST_CUDA=1" in found.advice

    def test_device_that_has_no_kernels_by_design(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert check_kernels(torch.device("cuda")).status == "note"  # ROCm

    def test_linear_loss_needs_no_cuda_kernel_of_its_own(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(self_check, "_has_kernel", lambda op, device: op != "linear_multi_hot_cross_entropy")
        assert check_kernels(torch.device("cuda")).status == "ok"
        assert check_kernels(CPU).status == "problem"

    def test_build_without_code_for_this_gpu(self, monkeypatch):
        def launch(*args):
            raise RuntimeError("no kernel image is available for execution on the device\nmore")

        monkeypatch.setattr(self_check, "bag_embedding", launch)
        monkeypatch.setattr(_C, "cuda_architectures", lambda: "sm_80, sm_90")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)  # there is no such device here
        found = check_image(torch.device("cuda"))
        assert found.text == (
            "cuda: kernels for sm_80, sm_90 on a GPU, sm_75: no kernel image is available for execution on the device"
        )
        assert found.status == "problem" and "TORCH_CUDA_ARCH_LIST=7.5 TST_CUDA=1" in found.advice


class TestNotes:
    def test_slower_than_plain_torch(self, monkeypatch):
        times = iter([0.2, 0.1])
        monkeypatch.setattr(self_check, "_seconds", lambda function: next(times))
        found = self_check.check_speed(EMBEDDING, CPU)
        assert found.status == "note" and "200.0 ms, plain torch 0.5 times that" in found.text and found.advice

    def test_faster(self, monkeypatch):
        times = iter([0.1, 0.25])
        monkeypatch.setattr(self_check, "_seconds", lambda function: next(times))
        found = self_check.check_speed(EMBEDDING, CPU)
        assert (found.status, found.advice) == ("ok", "") and "plain torch 2.5 times that" in found.text

    def test_missing_extra(self, monkeypatch):
        def version(name):
            if name in ("transformers", "accelerate"):
                raise metadata.PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr(metadata, "version", version)
        found = list(self_check.check_extras())
        assert statuses(found) == ["ok", "ok", "note", "ok"]
        assert found[2].text == "extra hf: no transformers<6,>=5, accelerate>=1.1; pip install 'tst-ext[hf]' adds it"

    def test_every_extra_of_pyproject_is_known(self):
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(declared) - {"test", "docs", "bench", "peers", "dev"} == set(self_check.EXTRAS)


class TestTorch:
    def test_the_minimum_is_that_of_the_package(self):
        assert f"torch>={MINIMUM_TORCH}" in metadata.requires("tst-ext")

    @pytest.mark.parametrize("version", ["2.9.1", "2.10.0+cu128"])
    def test_too_old(self, monkeypatch, version):
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
