"""What is handed out: an sdist with all that build and tests need, a wheel with every module, pages that are true."""

import math
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tst_ext

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = tst_ext.__version__
# Of the repository alone: its automation, and figures that the documentation has as tables and pictures.
LEFT_OUT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml", "benchmarks/results/")


def run(*arguments, cwd):
    return subprocess.run([*arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def backend(call, cwd):
    """What setuptools returns to pip for `call`, such as the name of the file that was built."""
    code = f"from setuptools import build_meta; print(build_meta.{call})"
    return run(sys.executable, "-c", code, cwd=cwd).splitlines()[-1]


@pytest.fixture(scope="module")
def repository():
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in names if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def copy(repository, tmp_path_factory):
    """Building leaves an egg-info behind, whose list of files makes up for what MANIFEST.in forgets."""
    folder = tmp_path_factory.mktemp("copy")
    for name in repository:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(copy):
    return copy / "dist" / backend("build_sdist('dist')", copy)


@pytest.fixture(scope="module")
def packed(sdist):
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


class TestSdist:
    def test_every_file_of_the_repository_is_there(self, repository, packed):
        assert {name for name in repository if not name.startswith(LEFT_OUT)} - packed == set()

    def test_nothing_else_is_there(self, repository, packed):
        generated = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
        assert packed - repository - generated == set()

    def test_name(self, sdist):
        assert sdist.name == f"tst_ext-{VERSION}.tar.gz"


class TestWheel:
    def test_every_module_is_there(self, repository, copy):
        """What setuptools puts into a wheel beside the extension."""
        run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built", cwd=copy)
        built = {str(path.relative_to(copy / "built")) for path in copy.glob("built/**/*") if path.is_file()}
        assert built == {name for name in repository if name.startswith("tst_ext/")}

    def test_name(self, copy):
        assert backend("prepare_metadata_for_build_wheel('.')", copy) == f"tst_ext-{VERSION}.dist-info"


class TestVersion:
    def test_of_the_installed_package(self):
        assert metadata.version("tst-ext") == VERSION

    def test_of_a_built_checkout_that_pip_has_not_installed(self):
        """A checkout on PYTHONPATH: no metadata of it is found."""
        code = """if 1:
            from importlib import metadata
            found = metadata.distribution
            def distribution(name):
                if name == "tst-ext":
                    raise metadata.PackageNotFoundError(name)
                return found(name)
            metadata.distribution = distribution
            import tst_ext
            from tst_ext.self_check import check_extra
            print(tst_ext.__version__, check_extra("train").status)"""
        assert run(sys.executable, "-c", code, cwd=ROOT) == f"{VERSION} note\n"

    def test_of_the_changelog(self):
        newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert newest[1] == VERSION

    def test_is_written_in_one_place(self):
        for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "mkdocs.yml"):
            assert VERSION not in (ROOT / name).read_text()


class TestPins:
    """Exact versions are in constraints.txt alone."""

    PIN = re.compile(r"^([\w.-]+)==(\S+)$", re.MULTILINE)
    PINS = dict(PIN.findall((ROOT / "constraints.txt").read_text()))
    EXTRAS = PROJECT["project"]["optional-dependencies"]

    def test_every_direct_requirement_has_one(self):
        requirements = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
        requirements += [requirement for extra in self.EXTRAS.values() for requirement in extra]
        names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements} - {"tst-ext"}
        assert names - set(self.PINS) == set()

    def test_the_project_asks_for_ranges(self):
        requirements = [*PROJECT["project"]["dependencies"], *(r for extra in self.EXTRAS.values() for r in extra)]
        assert [text for text in requirements if "==" in text.partition(";")[0]] == []

    def test_an_isolated_build_fetches_the_torch_of_the_environment(self):
        (wanted,) = [r for r in PROJECT["build-system"]["requires"] if r.startswith("torch")]
        assert [wanted] == PROJECT["project"]["dependencies"]

    def test_the_build_requirements_have_both_bounds(self):
        for requirement in PROJECT["build-system"]["requires"]:
            name, lower, upper = re.fullmatch(r"([\w-]+)>=([\d.]+),<(\d+)", requirement).groups()
            pin, lower = (tuple(map(int, text.split("."))) for text in (self.PINS[name], lower))
            assert lower <= pin < (int(upper),)

    def test_pre_commit_has_no_versions_of_its_own(self):
        path = ROOT / ".pre-commit-config.yaml"
        if not path.exists():
            pytest.skip("needs the repository")
        assert re.findall(r"^ *- repo: *(\S+)", path.read_text(), re.MULTILINE) == ["local"]


class TestStarImport:
    """`import *` brings the names of the reference alone: a module would rebind a user's nn, torch or math."""

    # The modules of docs/api, and those that tst_ext brings its functions from.
    REFERENCE = "".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    MODULES = {"tst_ext", "tst_ext.bags", "tst_ext.ops", "tst_ext.schedule"} | {
        name for name in re.findall(r"^::: ([a-z_.]+)$", REFERENCE, re.MULTILINE) if find_spec(name)
    }
    INTEGRATIONS = {name for name in MODULES if name.startswith("tst_ext.integrations.")}  # 20 s of imports

    @pytest.mark.parametrize("name", sorted(MODULES - INTEGRATIONS))
    def test_names(self, name):
        names = {}
        exec(f"from {name} import *", names)
        del names["__builtins__"]
        assert names
        foreign = [k for k, value in names.items() if not getattr(value, "__module__", "").startswith("tst_ext")]
        assert foreign == []

    @pytest.mark.parametrize("name", sorted(INTEGRATIONS))
    def test_the_integrations_list_their_names(self, name):
        assert re.search(r"^__all__ = \[", Path(find_spec(name).origin).read_text(), re.MULTILINE)

    def test_the_modules_stay_attributes(self):
        code = "from torch import nn\nfrom tst_ext import *\nimport tst_ext\nnn.Linear, tst_ext.nn.BagEmbedding"
        run(sys.executable, "-c", code, cwd=ROOT)


class TestDocumentation:
    def test_the_program_of_the_first_page_runs_and_learns(self, capsys):
        (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/index.md").read_text(), re.MULTILINE | re.DOTALL)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the model is so small that more only wait for each other
        try:
            exec(code, {})
        finally:
            torch.set_num_threads(threads)
        *bags, tokens = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [words[4] for words in bags[:4]] == ["4:", "4:", "4:", "1:"]
        assert float(tokens[-1]) < 1 < math.log(64)  # the loss of a model that knows nothing

    def test_every_link_out_of_the_documentation_has_a_target(self):
        """The others are checked by `make docs`; these lead to files of the repository."""
        links = [
            (page.name, target)
            for page in (ROOT / "docs").glob("*.md")
            for target in re.findall(r"\]\((\.\./[^)#]+)", page.read_text())
        ]
        assert links
        assert [(page, target) for page, target in links if not (ROOT / "docs" / target).is_file()] == []

    @pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
    def test_every_link_of_the_first_pages_has_a_target(self, page):
        targets = re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / page).read_text())
        assert targets and [target for target in targets if not (ROOT / target).exists()] == []
