"""Mutation testing: breaks one line at a time and demands that a test notices.

    python tests/mutation.py [--only NAME ...] [--table]

The raw kernels are judged by the C++ tests (needs CMake and GoogleTest), launches of the CUDA kernels by
tests/test_cuda_host.py, what stands between the kernels and the user by pytest (needs the installed development
environment). All of it happens in a copy of the working tree: an hour on two cores. The exit status is 1 if a mutant
survives, does not apply or does not compile. A mutant that survives is a missing test, or equivalent to what it
replaces: then it has no place here.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mutants import CPP, CUDA_HOST, PYTHON, Mutant

ROOT = Path(__file__).resolve().parent.parent
JOBS = os.environ.get("JOBS", "2")  # at a time, in a build
CPP_SECONDS, PYTEST_SECONDS = 300, 900  # a loop that a mutant made endless ends here


class Outcome(NamedTuple):
    state: str  # "killed", "survived" or "does not compile"
    failing: str = ""  # the first test that fails
    output: str = ""


def copy_tree(folder: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    compiled = [str(path.relative_to(ROOT)) for path in ROOT.glob("tst_ext/_C*.so")]
    for name in filter(None, names + compiled):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


class Tree:
    """The copy of the working tree with a way to build it and the tests that judge it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Neither flags of the caller nor CUDA, which no mutant touches; the copy comes before an editable installation.
        flags = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
        self.environment = {name: value for name, value in os.environ.items() if name not in flags} | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may be of the size and the second of what it replaces
            "CUDA_VISIBLE_DEVICES": "",
            "TST_CUDA": "0",
            "MAX_JOBS": JOBS,
        }

    def run(self, command: list[str], seconds: int | None = None) -> tuple[int | str, str]:
        """Exit status, or "timeout", and output."""
        pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(command, cwd=self.folder, env=self.environment, start_new_session=True, **pipes)
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "timeout", process.communicate()[0]


class CppTree(Tree):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # -O1: a mutant is compiled in 60 % of the time of -O3, and the tests take no longer.
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DTST_REQUIRE_TESTS=ON"]
        status, output = self.run(["cmake", "-S", ".", "-B", "build/mutation", *options])
        if status:
            sys.exit(output)

    def build(self, file: str) -> tuple[int | str, str]:
        return self.run(["cmake", "--build", "build/mutation", "--parallel", JOBS, "--target", "tst_tests"])

    def test(self, mutated: str) -> Outcome:
        emulated = "Emulated/*:*Cuda*:Emulator.*"  # a mutant of csrc/cuda breaks only these, and no other mutant does
        chosen = {"": "*", "csrc": "*", "csrc/cuda": emulated}.get(os.path.dirname(mutated), "-" + emulated)
        # Tests of the mutated file come first. Otherwise a mutant of the loss waits 40 s for the bag tests.
        likely = {"loss_rows.h": "*Cuda*Loss*:Emulated/*", "bag_embedding.h": "*CudaBag*", "shape.h": "CudaShape*"}
        first = likely.get(os.path.basename(mutated)) if "cuda" in mutated else None
        for tests in filter(None, (first, chosen)):
            # Up to the first failure: a broken kernel fails in every column, and printing that takes minutes.
            command = ["build/mutation/tst_tests", "--gtest_break_on_failure", f"--gtest_filter={tests}"]
            status, output = self.run(command, CPP_SECONDS)
            if status:
                break
        else:
            return Outcome("survived")
        begun = re.findall(r"^\[ RUN      \] (?:\w+/)?(\w+\.\w+)", output, re.MULTILINE)
        late = " (timeout)" if status == "timeout" else ""
        return Outcome("killed", (begun[-1] if begun else f"status {status}") + late, output)


PYTEST_OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--capture=sys"]  # not what a sanitizer writes to stderr


def outcome_of_pytest(status: int | str, output: str) -> Outcome:
    failing = re.findall(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", output, re.MULTILINE)
    failing += re.findall(r"AddressSanitizer: [\w-]+|runtime error: [^,\n]+", output)  # which end the process
    return Outcome("killed", failing[0] if failing else f"status {status}", output) if status else Outcome("survived")


class PythonTree(Tree):
    # Training, packaging and processes of their own take minutes and judge other things.
    ignored = ["train", "lab", "integrations", "test_build.py", "test_memory.py", "test_compile.py", "test_load.py"]
    ignored += ["test_distributed.py", "test_main.py", "test_self_check.py", "test_distribution.py", "test_recipes.py"]
    ignored += ["test_examples.py", "test_evidence.py", "test_benchmarks.py", "test_gpu_check.py"]
    ignored += ["test_mutants.py"]  # which every mutant breaks

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        _, imported = self.run([sys.executable, "-c", "import tst_ext; print(tst_ext.__file__)"])
        assert imported.strip() == str(folder / "tst_ext/__init__.py"), f"not the copy's tst_ext: {imported}"

    def build(self, file: str) -> tuple[int | str, str]:
        parse = ["-c", "import ast, sys; ast.parse(open(sys.argv[1]).read())", file]
        return self.run([sys.executable, *(parse if file.endswith(".py") else ["setup.py", "build_ext", "--inplace"])])

    def test(self, mutated: str) -> Outcome:
        command = [sys.executable, "-m", "pytest", "tests", "-m", "not slow", *PYTEST_OPTIONS]
        status, output = self.run(command + [f"--ignore=tests/{name}" for name in self.ignored], PYTEST_SECONDS)
        return outcome_of_pytest(status, output)


class CudaHostTree(Tree):
    """The CUDA ops, as `make cuda-host-test` builds them and runs their own tests."""

    library = "build/cuda-host/libtst_cuda_host.so"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        options = ["-DTST_CUDA_HOST=ON", "-DTST_SANITIZE=address,undefined", f"-DPython3_EXECUTABLE={sys.executable}"]
        status, output = self.run(["cmake", "-S", ".", "-B", "build/cuda-host", *options])
        if status:
            sys.exit(output)

    def build(self, file: str) -> tuple[int | str, str]:
        return self.run(["cmake", "--build", "build/cuda-host", "--parallel", JOBS, "--target", "tst_cuda_host"])

    def test(self, mutated: str) -> Outcome:
        preload = [self.run(["g++", f"-print-file-name={name}.so"])[1].strip() for name in ("libasan", "libstdc++")]
        command = ["env", f"LD_PRELOAD={' '.join(preload)}", "ASAN_OPTIONS=detect_leaks=0"]
        command += [f"TST_CUDA_HOST={self.folder / self.library}", sys.executable, "-m", "pytest"]
        status, output = self.run([*command, "tests/test_cuda_host.py", *PYTEST_OPTIONS], PYTEST_SECONDS)
        return outcome_of_pytest(status, output)


TREES: dict[type[CppTree | PythonTree | CudaHostTree], dict[str, list[Mutant]]] = {
    CppTree: CPP,
    CudaHostTree: CUDA_HOST,
    PythonTree: PYTHON,
}


def judge(tree: CppTree | PythonTree | CudaHostTree, file: str, old: str = "", new: str = "") -> Outcome:
    path = tree.folder / file
    text = path.read_text()
    if old:
        path.write_text(text.replace(old, new))
    status, output = tree.build(file)
    outcome = Outcome("does not compile", output=output) if status else tree.test(file if old else "")
    path.write_text(text)
    return outcome


def main() -> int:
    mutants = [(tree, file, m) for tree, files in TREES.items() for file, group in files.items() for m in group]
    names = [m.name for _, _, m in mutants]
    assert len(set(names)) == len(names), "two mutants of one name"
    parser = argparse.ArgumentParser(description="Breaks one line at a time and demands that a test notices.")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these mutants alone")
    parser.add_argument("--table", action="store_true", help="print the result as a Markdown table too")
    arguments = parser.parse_args()

    results: list[tuple[str, Mutant, Outcome]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        for _, file, m in mutants:
            count = (folder / file).read_text().count(m.old)
            assert count == 1 and m.old != m.new, f"{m.name}: {m.old!r} occurs {count} times in {file}"
        for kind in TREES:
            chosen = [(file, m) for k, file, m in mutants if k is kind and m.name in (arguments.only or names)]
            chosen.sort(key=lambda each: not each[0].endswith(".py"))  # while the extension is not a mutant's
            if not chosen:
                continue
            tree = kind(folder)
            outcome = judge(tree, chosen[-1][0])  # builds the extension if any mutant does
            if outcome.state != "survived":
                sys.exit(f"{outcome.output}\n{kind.__name__} without a mutation: {outcome.state}, {outcome.failing}")
            for file, m in chosen:
                outcome = judge(tree, file, m.old, m.new)
                results.append((file, m, outcome))
                by = f" ({outcome.failing})" if outcome.failing else ""
                print(f"{outcome.state:8} {m.name}: {m.breaks}{by}", flush=True)
                if outcome.state == "does not compile":
                    print(outcome.output[-3000:])

    if arguments.table:
        print("\n| mutant | file | what is broken | killed by |\n| --- | --- | --- | --- |")
        for file, mutant, outcome in results:
            by = f"`{outcome.failing}`" if outcome.failing else f"**{outcome.state}**"
            print(f"| {mutant.name} | `{file}` | {mutant.breaks} | {by} |")
    bad = [mutant.name for _, mutant, outcome in results if outcome.state != "killed"]
    print(f"\n{len(results) - len(bad)} of {len(results)} mutants killed" + (f"; not: {', '.join(bad)}" if bad else ""))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
