"""Check the machine code of the hot CUDA kernels: needs nvcc and nvdisasm, no GPU.

    python tests/machine_code.py [--source FOLDER] [--architectures sm_90a ...]

Compile the kernels of the table below for each architecture, disassemble them, print what the checks count, and exit
with 1 if a kernel breaks a rule:

- no stack frame, no spilled register;
- every load and store of rows moves 16 bytes: as many of them as the table asks for, and narrower stores only as the
  table allows, none of them in a loop over the row;
- the row kernel's loops issue enough loads before they use the first one, and few enough instructions per logit.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
NVCC = ("nvcc", "-cubin", "-std=c++17", "--expt-relaxed-constexpr", "-diag-suppress=177", "-Xptxas=-v")
TYPES = {"float": (4, "float32"), "BFloat16": (2, "bfloat16"), "Float16": (2, "float16")}


class Rule(NamedTuple):
    kernel: str  # template arguments as c++filt prints them; {T} and {n}, the elements of 16 bytes, are filled in
    loads: int = 0  # at least so many of 16 bytes
    stores: int = 0  # likewise
    narrow: int = 0  # at most so many global stores of less than 16 bytes
    statistics: bool = False  # has the loop that reads the row
    gradient: bool = False  # has the loop that writes it


# Narrow stores of the row kernel: loss and lse; with a gradient also a label's column, and the elements of two edges in
# two loops, which the compiler may unroll.
# fmt: off
RULES = (
    Rule("loss_rows_kernel<{T}, true, false>", loads=4, narrow=2, statistics=True),
    Rule("loss_rows_kernel<{T}, true, true>", loads=4, stores=2, narrow=64, statistics=True, gradient=True),
    Rule("bag_embedding_kernel<{T}, {n}, false>", loads=8, stores=2),
    Rule("bag_rows_kernel<{T}, {n}, false>", loads=8, stores=2),
    Rule("bag_pieces_kernel<{T}, {n}, false>", loads=8, stores=2),
    Rule("bag_join_kernel<{T}, {n}, false>", loads=16, stores=2),
)
# fmt: on
IN_FLIGHT = 4  # loads of the statistics loop before the first use of the first one
# Of both loops together: more would take longer to issue than the row's bytes take to move.
INSTRUCTIONS_PER_LOGIT = {"float": 24.0, "BFloat16": 16.0, "Float16": 16.0}


class Instruction(NamedTuple):
    label: str  # of the block that it begins, or ""
    guarded: bool  # by a predicate
    op: str  # such as LDG.E.128
    operands: str


class Access(NamedTuple):
    space: str  # global, shared, local
    stores: bool
    bytes: int


ACCESS = re.compile(r"(LDGSTS|LDG|STG|LDS|STS|LDL|STL)(?:\.|$)")
SPACES = {"G": "global", "S": "shared", "L": "local"}
LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def access(instruction: Instruction) -> Access | None:
    """Return what a load or a store moves."""
    match = ACCESS.match(instruction.op)
    if not match:
        return None
    name, parts = match[1], instruction.op.split(".")
    width = next((int(part) // 8 for part in parts if part in ("64", "128", "256")), 4)
    if {"U16", "S16", "16"} & set(parts):
        width = 2
    elif {"U8", "S8", "8"} & set(parts):
        width = 1
    return Access(SPACES[name[2]], name.startswith("ST"), width)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Parse the output of `nvdisasm -c`: mangled names, and the instructions of each."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    label = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith(".section\t"):
            name = line.split(".text.", 1)[1].split(",")[0] if ".text." in line else ""
            current, label = functions.setdefault(name, []), ""
        elif line.startswith(".L_x_") and line.endswith(":"):
            label = line[:-1]
        elif match := LINE.match(line):
            current.append(Instruction(label, match[1] is not None, match[2], match[3]))
            label = ""
    functions.pop("", None)
    return functions


def blocks_of(code: list[Instruction]) -> tuple[list[range], list[set[int]]]:
    """Cut code into basic blocks; return them and the successors of each."""
    starts = {0}
    for i, instruction in enumerate(code):
        if instruction.label:
            starts.add(i)
        if instruction.op.split(".")[0] in ("BRA", "EXIT", "RET"):
            starts.add(i + 1)
    cuts = sorted(starts | {len(code)})
    blocks = [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    labels = {code[block[0]].label: b for b, block in enumerate(blocks) if code[block[0]].label}
    successors: list[set[int]] = []
    for b, block in enumerate(blocks):
        last, after = code[block[-1]], {b + 1} if b + 1 < len(blocks) else set()
        kind = last.op.split(".")[0]
        if kind == "BRA":
            condition, _, target = last.operands.rpartition("`(")
            after = {labels[target.rstrip(")")]} | (after if last.guarded or condition else set())
        elif kind in ("EXIT", "RET") and not last.guarded:
            after = set()
        successors.append(after)
    return blocks, successors


def loops_of(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the natural loops of the code: of each the longest way through it, whatever its branches decide."""
    blocks, successors = blocks_of(code)
    everything = set(range(len(blocks)))
    predecessors = [{a for a in everything if b in successors[a]} for b in everything]
    dominators = [{0}] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for b in range(1, len(blocks)):
            new = {b} | (set.intersection(*(dominators[p] for p in predecessors[b])) if predecessors[b] else set())
            changed |= new != dominators[b]
            dominators[b] = new

    def longest(body: set[int], header: int) -> list[Instruction]:
        @functools.cache
        def to(b: int) -> list[Instruction]:  # from the header to the end of block b
            before = [to(p) for p in predecessors[b] & body if b != header and b not in dominators[p]]
            return max(before, key=len, default=[]) + [code[i] for i in blocks[b] if code[i].op != "NOP"]

        return max((to(b) for b in body if header in successors[b]), key=len)

    loops: dict[int, set[int]] = {}
    for b in everything:
        for header in successors[b] & dominators[b]:
            body, work = loops.setdefault(header, {header}), [b]
            while work:
                node = work.pop()
                if node not in body:
                    body.add(node)
                    work.extend(predecessors[node])
    return [longest(body, header) for header, body in loops.items()]


def moved(code: list[Instruction], space: str, stores: bool) -> list[int]:
    """Return the bytes of each access of one kind; an access of 32 bytes is two of 16."""
    found = [access(i) for i in code]
    widths = [a.bytes for a in found if a and a.space == space and a.stores == stores]
    return [part for width in widths for part in ([16] * (width // 16) or [width])]


def registers(operands: str) -> list[int]:
    return [int(number) for number in re.findall(r"(?<![A-Z])R(\d+)", operands)]


def in_flight(loop: list[Instruction]) -> int:
    """Count loads of 16 bytes from global memory up to the first use of one of them, from the best place in the loop."""
    best = 0
    for start in range(len(loop)):
        waiting: set[int] = set()
        count = 0
        for instruction in loop[start:] + loop[:start]:
            if waiting & set(registers(instruction.operands)):
                break
            packs = moved([instruction], "global", False).count(16)
            for first in registers(instruction.operands)[:packs]:
                waiting |= set(range(first, first + 4))
                count += 1
        best = max(best, count)
    return best


def statistics_loop(loops: list[list[Instruction]]) -> list[Instruction]:
    """Return the loop with the most loads of 16 bytes among those that store nothing to global memory."""
    found = [loop for loop in loops if 16 in moved(loop, "global", False) and not moved(loop, "global", True)]
    return max(found, key=lambda loop: moved(loop, "global", False).count(16), default=[])


def gradient_loop(loops: list[list[Instruction]]) -> list[Instruction]:
    """Return the loop that reads packs, from wherever they are, and stores the most."""

    def packs(loop: list[Instruction]) -> bool:
        return 16 in moved(loop, "global", False) + moved(loop, "shared", False)

    found = [loop for loop in loops if packs(loop) and moved(loop, "global", True)]
    return max(found, key=lambda loop: sum(moved(loop, "global", True)), default=[])


class Figures(NamedTuple):
    registers: int
    spilled: int  # bytes of stack frame, spill stores and spill loads
    loads: int
    stores: int
    narrow: int
    in_flight: int | None  # None: the kernel has no such loop
    narrow_in_loop: int
    forward: float | None  # instructions per logit
    backward: float | None


def figures_of(code: list[Instruction], rule: Rule, element: int, used: tuple[int, int]) -> Figures:
    loads, stores = moved(code, "global", False), moved(code, "global", True)
    loops = loops_of(code)
    statistics = statistics_loop(loops) if rule.statistics else []
    gradient = gradient_loop(loops) if rule.gradient else []
    written = moved(gradient, "global", True)
    return Figures(
        *used,
        loads=sum(b >= 16 for b in loads),
        stores=sum(b >= 16 for b in stores),
        narrow=sum(b < 16 for b in stores),
        in_flight=in_flight(statistics) if statistics else None,
        narrow_in_loop=sum(b < 16 for b in written),
        forward=len(statistics) * element / sum(moved(statistics, "global", False)) if statistics else None,
        backward=len(gradient) * element / sum(written) if written else None,
    )


def broken(rule: Rule, figures: Figures, most: float) -> list[str]:
    """Say which parts of the rule the kernel breaks."""
    out = []
    if figures.spilled:
        out.append(f"{figures.spilled} bytes of stack or spilled registers")
    if figures.loads < rule.loads:
        out.append(f"{figures.loads} loads of 16 bytes, expected {rule.loads} or more")
    if figures.stores < rule.stores:
        out.append(f"{figures.stores} stores of 16 bytes, expected {rule.stores} or more")
    if figures.narrow > rule.narrow:
        out.append(f"{figures.narrow} narrower stores, expected {rule.narrow} at most")
    if figures.narrow_in_loop:
        out.append(f"{figures.narrow_in_loop} narrow stores in the gradient loop")
    if rule.statistics and (figures.in_flight or 0) < IN_FLIGHT:
        out.append(f"{figures.in_flight} loads in flight, expected {IN_FLIGHT} or more")
    if rule.gradient:
        if figures.forward is None or figures.backward is None:
            out.append("a loop over the row was not found")
        elif figures.forward + figures.backward > most:
            out.append(f"{figures.forward + figures.backward:.1f} instructions per logit, expected {most:g} at most")
    return out


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Read registers, and bytes of stack and spills, of each kernel from what `ptxas -v` prints."""
    found = re.findall(
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {name: (int(used), int(stack) + int(stores) + int(loads)) for name, stack, stores, loads, used in found}


def run(*command: str | os.PathLike[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{command[0]} failed with status {done.returncode}")
    return done.stdout


def find_nvdisasm() -> str:
    """Find nvdisasm on the PATH, or in the wheel of the dev extra."""
    wheel = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvdisasm")
    found = shutil.which("nvdisasm") or (str(wheel) if wheel.exists() else None)
    return found or sys.exit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm, or add CUDA's to PATH")


def demangled(names: list[str]) -> list[str]:
    """Return names such as loss_rows_kernel<BFloat16, true, true>, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [line.replace("tst::cuda::", "").removeprefix("void ") for line in text.splitlines()]
    return [re.sub(r">\(.*\)$", ">", name) for name in short]


def machine_code(architecture: str, source: Path, folder: Path) -> dict[str, tuple[list[Instruction], tuple[int, int]]]:
    """Compile for an architecture; return the instructions and resources of each kernel, by its demangled name."""
    image = folder / f"{architecture}.cubin"
    log = run(*NVCC, f"-arch={architecture}", "-I", source, folder / "hot.cu", "-o", image)
    code, used = parse(run(find_nvdisasm(), "-c", image)), resources(log)
    return {short: (code[name], used[name]) for name, short in zip(code, demangled(list(code)), strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the raw kernels")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    hot = {rule.kernel.format(T=T, n=16 // TYPES[T][0]): (rule, T) for rule in RULES for T in TYPES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        headers = "".join(f'#include "{name}"\n' for name in ("loss_rows.h", "bag_embedding.h"))
        pointers = "".join(f"  reinterpret_cast<const void*>({kernel}),\n" for kernel in hot)
        text = f"{headers}using namespace tst::cuda;\nconst void* const kernels[] = {{\n{pointers}}};\n"
        (folder / "hot.cu").write_text(text)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(lambda a: machine_code(a, arguments.source, folder), arguments.architectures))

    failures = []
    print(f"{'kernel':44} {'':7} registers spills loads stores narrow flight  fwd  bwd instructions/logit")
    for kernel, (rule, T) in hot.items():
        for architecture, kernels in zip(arguments.architectures, built, strict=True):
            if kernel not in kernels:
                sys.exit(f"{kernel} was not compiled; there are: " + ", ".join(kernels))
            code, used = kernels[kernel]
            f = figures_of(code, rule, TYPES[T][0], used)
            faults = broken(rule, f, INSTRUCTIONS_PER_LOGIT[T])
            failures += [f"{kernel} on {architecture}: {fault}" for fault in faults]
            flight = "" if f.in_flight is None else f.in_flight
            per_logit = ["" if x is None else f"{x:.1f}" for x in (f.forward, f.backward)]
            print(
                f"{kernel:44} {architecture:7} {f.registers:9} {f.spilled:6} {f.loads:5} {f.stores:6} {f.narrow:6} "
                f"{flight:6} {per_logit[0]:>4} {per_logit[1]:>4}{'  FAILS' if faults else ''}"
            )
    print(*(failures or ["All rules hold."]), sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
