"""The built extension and what setup.py says when it cannot build."""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

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
    """A build that cannot work stops before it compiles a source, with one line that says what to do."""

    def run(self, *options, code="", **environment):
        code += "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_path('setup.py', run_name='__main__')"
        result = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        lines = result.stderr.splitlines()
        ours = [line for line in lines if line.startswith("tst-ext: ")]
        # torch warns of a CUDA_HOME without a GPU
        assert len(ours) == (result.returncode != 0) and "Traceback" not in result.stderr, result.stderr
        self.printed = result.stdout
        return result.returncode, "".join(ours)

    def test_version(self):
        assert self.run(TST_CUDA="0") == (0, "")

    def test_missing_compiler_is_named_with_what_to_install(self):
        status, error = self.run(CXX="absent-g++")
        assert status == 1 and "'absent-g++' is not on PATH" in error and "apt-get install g++" in error

    @pytest.mark.parametrize("value", ["ccache g++", "g++ -m64", "sccache g++ -m64"])
    def test_compiler_with_more_words(self, value):
        """torch quotes CXX as one word: the shell finds no such program, exit status 127."""
        status, error = self.run(CXX=value)
        assert status == 1 and f"CXX is {value!r}, expected the name of one program" in error
        assert "Set CXX=g++ " in error

    def test_compiler_that_does_not_work(self, tmp_path):
        compiler = script(tmp_path / "clang++", "echo \"fatal error: 'vector' file not found\" >&2; exit 1")
        status, error = self.run(CXX=compiler)
        assert status == 1 and f"{compiler} does not compile C++20 (fatal error: 'vector' file not found)" in error

    def test_missing_headers_of_python(self, tmp_path):
        fake = f"import sysconfig; sysconfig.get_path = lambda *names: {str(tmp_path)!r}; "
        status, error = self.run(code=fake)
        version = f"python3.{sys.version_info[1]}"
        assert status == 1 and f"no Python.h in {tmp_path}" in error and f"apt-get install {version}-dev" in error

    def test_ninja_next_to_a_python_that_is_not_activated(self, tmp_path):
        code = f"""if 1:
            import atexit, os, shutil, sysconfig
            path, which = sysconfig.get_path, shutil.which
            sysconfig.get_path = lambda *names: {str(tmp_path)!r} if names == ("scripts",) else path(*names)
            shutil.which = lambda name: None if name == "ninja" else which(name)
            atexit.register(lambda: print(os.environ["PATH"].split(os.pathsep)[-1]))\n"""
        assert self.run(code=code, TST_CUDA="0") == (0, "") and self.printed.endswith(f"{tmp_path}\n")

    def test_missing_packages(self):
        status, error = self.run("-S")  # without site-packages
        assert status == 1 and "(found no setuptools, no torch, no pybind11" in error
        assert "-m pip install 'setuptools>=77,<85' 'torch>=2.11,<3' 'pybind11>=3,<4'" in error

    @pytest.mark.parametrize(
        ("name", "old"), [("setuptools", "65.5.0"), ("setuptools", "76.1"), ("torch", "2.9.1+cpu")]
    )
    def test_old_package(self, tmp_path, name, old):
        (tmp_path / f"{name}-{old}.dist-info").mkdir()
        (tmp_path / f"{name}-{old}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {old}\n")
        status, error = self.run(PYTHONPATH=str(tmp_path))
        assert status == 1 and error.endswith(f"(found {name} {old})")
        assert error.count("'") == 2 and f"-m pip install '{name}>=" in error

    @pytest.mark.extended
    def test_fresh_environment_without_isolation(self, tmp_path):
        """With setuptools 65.5, as in Python 3.11.7: "invalid command 'bdist_wheel'". Python 3.12 has none."""
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
        command = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--no-index", "--no-build-isolation", tmp_path]
        output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        if sys.version_info < (3, 12):
            assert "-m pip install 'setuptools>=77,<85' 'torch>=2.11,<3' 'pybind11>=3,<4'" in output
        else:
            assert "Cannot import 'setuptools.build_meta'" in output
        assert "bdist_wheel" not in output

    @pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
    def test_cuda_without_a_cuda_torch_is_refused(self):
        status, error = self.run(TST_CUDA="1")
        assert status == 1 and "TST_CUDA=1" in error
        assert f"torch {torch.__version__} is not a CUDA build. Install one that is, or unset TST_CUDA" in error

    def test_unknown_value_is_refused(self):
        status, error = self.run(TST_CUDA="yes")
        assert status == 1 and "'yes'" in error and "expected 0, 1 or unset" in error

    def test_cuda_can_be_left_out(self):
        assert self.run(TST_CUDA="0") == (0, "")


def script(path, body):
    """Write an executable; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


class TestSetupForCuda:
    """Its decisions with a torch for CUDA 13.0 and made-up toolkits; setup() is left out."""

    @pytest.fixture
    def run(self, monkeypatch):
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "TST_CUDA", "CC"):
            monkeypatch.setenv(name, "")  # so that setup.py's change is undone afterwards
            monkeypatch.delenv(name)
        monkeypatch.setenv("CXX", os.environ.get("CXX", "c++"))
        monkeypatch.setenv("TORCH_DONT_CHECK_COMPILER_ABI", "ON")  # this machine's compiler may be too new for them
        monkeypatch.setattr(torch.version, "cuda", "13.0")

        def run(home, root=ROOT):
            """Return what setup.py defines, and the CUDA library it would build, None without one."""
            monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(home))
            names = runpy.run_path(str(root / "setup.py"))
            cpu, *cuda = given["ext_modules"]
            assert cpu.name == "tst_ext._C" and not any(source.endswith(".cu") for source in cpu.sources)
            return cuda[0] if cuda else None, names

        return run

    @staticmethod
    def toolkit(folder, release="13.0", runtime="lib64", compiles=True):
        """Make the part of a CUDA toolkit that setup.py looks at, with `runtime` None only its nvcc."""
        compile_ = "exit 0" if compiles else "echo '#error -- unsupported GNU version!' >&2; exit 1"
        script(
            folder / "bin/nvcc",
            f"""case "$*" in
            *--version*) echo 'Cuda compilation tools, release {release}, V{release}.1';;
            *--dryrun*) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={folder}/bin/..' >&2;;
            *) {compile_};;
            esac""",
        )
        if runtime:
            (folder / runtime).mkdir(parents=True)
            (folder / runtime / "libcudart.so").touch()
        return folder

    @pytest.mark.parametrize(
        ("release", "wanted"),
        [
            ("12.6", "8.0;9.0+PTX"),
            ("12.8", "8.0;9.0a;10.0+PTX"),
            ("13.0", "8.0;9.0a;10.0+PTX"),
            ("12.10", "8.0;9.0a;10.0+PTX"),
        ],
    )
    def test_architectures(self, run, monkeypatch, tmp_path, release, wanted):
        monkeypatch.setattr(torch.version, "cuda", release)
        monkeypatch.setenv("TST_CUDA", "1")
        extension, _ = run(self.toolkit(tmp_path, release))
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == wanted
        assert extension.name == "tst_ext._cuda" and all(source.endswith(".cu") for source in extension.sources)

    def test_architectures_of_the_user(self, run, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
        assert run(self.toolkit(tmp_path))[0] is not None and os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"

    @pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
    @pytest.mark.parametrize("runtime", ["lib64", "lib", "targets/{}-linux/lib", "lib/{}-linux-gnu"])
    def test_library_of_the_linker(self, run, monkeypatch, tmp_path, runtime, machine):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setitem(sysconfig.get_config_vars(), "MULTIARCH", f"{machine}-linux-gnu")
        runtime = runtime.format("sbsa" if machine == "aarch64" and "targets" in runtime else machine)
        home = self.toolkit(tmp_path, runtime=runtime)
        assert str(home / runtime) in run(home)[0].library_dirs

    def test_toolkit_behind_a_script(self, run, monkeypatch, tmp_path):
        """torch takes the folder above the script, where there is no library."""
        real = self.toolkit(tmp_path / "cuda-13.0")
        script(tmp_path / "local/bin/nvcc", f'exec {real}/bin/nvcc "$@"')
        extension, names = run(tmp_path / "local")
        assert cpp_extension.CUDA_HOME == str(real) and str(real / "lib64") in extension.library_dirs
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "local"))
        assert names["cuda_home"](str(tmp_path / "local")) == str(tmp_path / "local"), "named by the user"

    def test_toolkit_behind_a_link(self, run, tmp_path):
        real = self.toolkit(tmp_path / "cuda-13.0")
        (real / "bin/nvcc").write_text("#!/bin/sh\necho release 13.0")  # it does not tell
        (tmp_path / "local/bin").mkdir(parents=True)
        (tmp_path / "local/bin/nvcc").symlink_to(real / "bin/nvcc")
        assert run(tmp_path / "local")[0] is not None and cpp_extension.CUDA_HOME == str(real)

    def test_standard_toolkit_in_place_of_one_that_does_not_tell(self, run, tmp_path):
        _, names = run(None)
        mute, standard = script(tmp_path / "local/bin/nvcc", "exit 1"), self.toolkit(tmp_path / "cuda")
        found = str(tmp_path / "local")
        assert os.access(mute, os.X_OK) and names["cuda_home"](found, str(standard)) == str(standard)
        assert names["cuda_home"](found, str(tmp_path / "absent")) == found
        assert names["cuda_home"](None, str(standard)) is None

    @pytest.mark.parametrize(
        ("made", "expected"),
        [
            (None, "there is no nvcc on PATH. Set CUDA_HOME to a complete CUDA 13 toolkit"),
            (dict(runtime=None), "but there is no libcudart.so in {0}/lib64, lib or targets/*/lib. Set CUDA_HOME to"),
            (
                dict(release="12.4"),
                "the nvcc in {0}/bin is for CUDA 12.4, but torch is for CUDA 13.0. Set CUDA_HOME to",
            ),
            (
                dict(compiles=False),
                "nvcc does not compile here (#error -- unsupported GNU version!). Set CC and CXX to",
            ),
        ],
    )
    def test_what_cannot_be_built_is_found_before_compiling(self, run, monkeypatch, tmp_path, capsys, made, expected):
        home = self.toolkit(tmp_path, **made) if made else None
        monkeypatch.setenv("CUDA_HOME", str(home or ""))  # the toolkit of this machine is not tried
        extension, _ = run(home)
        error = capsys.readouterr().err
        assert extension is None and expected.format(home) in error
        assert error.startswith("tst-ext: building the CPU kernels alone, because ") and error.count("\n") == 1
        monkeypatch.setenv("TST_CUDA", "1")
        with pytest.raises(SystemExit, match="tst-ext: TST_CUDA=1, but ") as stopped:
            run(home)
        assert expected.format(home) in stopped.value.code and "\n" not in stopped.value.code

    def test_compiler_that_torch_refuses(self, run, monkeypatch, tmp_path, capsys):
        def refuse(name, version):
            raise RuntimeError(f"The current installed version of {name} is greater than the maximum")

        monkeypatch.setattr(cpp_extension, "_check_cuda_version", refuse)
        assert run(self.toolkit(tmp_path))[0] is None
        assert f"of {os.environ['CXX']} is greater than the maximum). Set CC and CXX to" in capsys.readouterr().err

    @pytest.mark.parametrize(("inplace", "rest"), [(True, 0), (False, 1)])
    def test_kernels_of_an_earlier_build_are_removed(self, run, monkeypatch, tmp_path, inplace, rest):
        """From the folder that a wheel is packed from, and from a checkout that is built in place."""
        monkeypatch.setenv("TST_CUDA", "0")
        (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
        (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
        _, names = run(None, tmp_path)
        command = names["BuildExtension"](setuptools.Distribution())
        command.extensions, command.build_lib, command.inplace = [], str(tmp_path / "build/lib"), inplace
        earlier = [tmp_path / top / f"tst_ext/_cuda{EXTENSION_SUFFIXES[0]}" for top in ("build/lib", ".")]
        for path in earlier:
            path.parent.mkdir(parents=True)
            path.touch()
        command.run()
        assert [path.exists() for path in earlier] == [False, rest]

    @pytest.mark.extended
    @pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
    def test_both_builds_find_a_new_file(self, run, tmp_path):
        root, build = tmp_path / "root", tmp_path / "build"
        for folder in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / folder, root / folder)
        for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
            shutil.copy(ROOT / name, root)
        new = {"csrc/cpu/new_kernel.cpp", "csrc/cuda/new_op.cu"}
        for name in new:
            (root / name).touch()
        options = ["-DTST_CUDA_HOST=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
        subprocess.run(["cmake", "-S", root, "-B", build, *options], check=True, capture_output=True)
        commands = json.loads((build / "compile_commands.json").read_text())
        by_cmake = {os.path.relpath(command["file"], root) for command in commands}

        extension, names = run(self.toolkit(tmp_path / "cuda"), root)
        sources = {source for part in names["extensions"] for source in part.sources}
        assert new <= sources and new <= by_cmake
        ops = {name for name in sources if "torch::" in (root / name).read_text() and ".cpp" in name}
        raw_and_cuda = {name for name in by_cmake if name.startswith("csrc")}
        assert raw_and_cuda == sources - ops - {"csrc/library.cpp"}
