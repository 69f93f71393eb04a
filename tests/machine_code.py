"""Check the machine code of the hot CUDA kernels. Needs nvcc and nvdisasm, no GPU.

    python tests/machine_code.py [--source FOLDER] [--architectures sm_90a ...]

Compile the kernels in the table RULES for each architecture, disassemble them and print one line of figures per kernel.
Exit with 1 if a kernel breaks a rule:

- It has no stack frame and spills no register.
- It stores 16 bytes at a time, with no more narrower stores than the table allows, and none in the loop over a row.
- It streams what nobody reads soon past the second-level cache, and nothing else.
- It issues enough loads of 16 bytes before it uses the first one.
- Its loops over a row execute few enough instructions per logit.
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
NVCC = ("nvcc", "-cubin", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v")
ELEMENT = {"float": 4, "BFloat16": 2, "Float16": 2}  # bytes; float64 is for checks, not for speed


class Rule(NamedTuple):
    kernel: str  # as c++filt prints it, without tst::cuda::; {T} is an element, {n} how many are 16 bytes
    flight: int  # loads of 16 bytes, at least, before one of them is used
    stores: int = 0  # of 16 bytes, at least
    streaming: int = 0  # of those, exactly: they give up their place in the second-level cache first
    narrow: int = 0  # global stores of less than 16 bytes, at most
    reads_row: bool = False  # a loop takes the statistics of a row
    writes_row: bool = False  # a loop overwrites the row with its gradient
    copies: int = 0  # of 16 bytes to shared memory in that loop, at least: the next row


# Passes 0, 1 and 2 are kLoss, kGradient and kCachedGradient. Their narrow stores are loss and lse. A gradient has up to
# 38 more: the columns of labels, and the elements of two edges, as gradient or as zeros, which the compiler may write
# out more than once. The rows of a bag's gradient are streamed, its pieces are not: the join reads them next. A warp of
# bag_rows_kernel has few registers, so that 40 warps fit a multiprocessor, which then has 80 loads in flight.
RULES = (
    Rule("loss_rows_kernel<{T}, true, (Pass)0>", flight=8, narrow=2, reads_row=True),
    Rule("loss_rows_kernel<{T}, true, (Pass)1>", flight=4, stores=2, narrow=40, reads_row=True, writes_row=True),
    Rule("loss_rows_kernel<{T}, true, (Pass)2>", 0, stores=2, narrow=40, reads_row=True, writes_row=True, copies=1),
    Rule("bag_embedding_kernel<{T}, {n}, false>", flight=4, stores=2),
    Rule("bag_rows_kernel<{T}, {n}, false>", flight=2, stores=2, streaming=1),
    Rule("bag_join_kernel<{T}, {n}, false>", flight=4, stores=1),
)
# In the two loops over a row together: 10 % above what they are. An H100 issues 14 in 35 % of the time in which it
# reads and writes a 16-bit logit. A float32 logit has twice the bytes, and an exponential that is not approximate.
INSTRUCTIONS_PER_LOGIT = {"float": 28.0, "BFloat16": 14.0, "Float16": 14.0}


class Instruction(NamedTuple):
    label: str  # of the block that it begins, or ""
    guarded: bool  # by a predicate
    op: str  # such as LDG.E.128
    operands: str


class Access(NamedTuple):
    space: str  # global, shared
    stores: bool
    bytes: int
    streaming: bool  # evicted first


ACCESS = re.compile(r"(LDGSTS|LDG|STG|ST|LDS|STS)(?:\.|$)")
SPACES = {"G": "global", "S": "shared", "": "global"}
LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def access(instruction: Instruction) -> Access | None:
    """Return the access of a load or a store, None for another instruction."""
    match = ACCESS.match(instruction.op)
    if not match:
        return None
    name, parts = match[1], instruction.op.split(".")
    width = next((int(part) // 8 for part in parts if part in ("64", "128", "256")), 4)
    if {"U16", "S16", "16"} & set(parts):
        width = 2
    elif {"U8", "S8", "8"} & set(parts):
        width = 1
    return Access(SPACES[name[2:3]], name.startswith("ST"), width, "EF" in parts)


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
        if kind == "BRA" and last.op != "BRA.DIV":  # taken only if a warp's lanes have diverged
            condition, _, target = last.operands.rpartition("`(")
            after = {labels[target.rstrip(")")]} | (after if last.guarded or condition else set())
        elif kind in ("EXIT", "RET") and not last.guarded:
            after = set()
        successors.append(after)
    return blocks, successors


def loops_of(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the longest way through each innermost loop of the code, whatever the branches in it decide."""
    blocks, successors = blocks_of(code)
    reached, work = set[int](), [0]
    while work:
        block = work.pop()
        if block not in reached:
            reached.add(block)
            work.extend(successors[block])
    predecessors = {b: {a for a in reached if b in successors[a]} for b in reached}
    dominators = {b: reached for b in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for b in reached - {0}:
            new = {b} | set.intersection(*(dominators[p] for p in predecessors[b]))
            changed |= new != dominators[b]
            dominators[b] = new

    def longest(body: set[int], header: int) -> list[Instruction]:
        @functools.cache
        def to(b: int) -> list[Instruction]:  # from the header to the end of block b
            before = [to(p) for p in predecessors[b] & body if b != header and b not in dominators[p]]
            return max(before, key=len, default=[]) + [code[i] for i in blocks[b] if code[i].op != "NOP"]

        return max((to(b) for b in body if header in successors[b]), key=len)

    loops: dict[int, set[int]] = {}
    for b in reached:
        for header in successors[b] & dominators[b]:
            body, work = loops.setdefault(header, {header}), [b]
            while work:
                node = work.pop()
                if node not in body:
                    body.add(node)
                    work.extend(predecessors[node])
    innermost = {h: body for h, body in loops.items() if not any(body > other for other in loops.values())}
    return [longest(body, header) for header, body in innermost.items()]


def moved(code: list[Instruction], space: str, stores: bool, streaming: bool | None = None) -> list[int]:
    """Return the bytes of each access of one kind, streaming or not where that is given; 32 bytes are two of 16."""
    found = [access(i) for i in code]
    kind = [a for a in found if a and a.space == space and a.stores == stores]
    widths = [a.bytes for a in kind if streaming in (None, a.streaming)]
    return [part for width in widths for part in ([16] * (width // 16) or [width])]


def registers(operands: str) -> list[int]:
    return [int(number) for number in re.findall(r"(?<![A-Z])R(\d+)", operands)]


def in_flight(loop: list[Instruction]) -> int:
    """Count the loads of 16 bytes from global memory before one of them is used, from the best place in the loop."""
    best = 0
    for start, first in enumerate(loop):
        if 16 not in moved([first], "global", False):
            continue
        waiting: set[int] = set()
        count = 0
        for instruction in loop[start:] + loop[:start]:
            named = registers(instruction.operands)
            if waiting & set(named):
                break
            for target in named[: moved([instruction], "global", False).count(16)]:
                waiting |= set(range(target, target + 4))
                count += 1
        best = max(best, count)
    return best


def reading_loop(loops: list[list[Instruction]]) -> list[Instruction]:
    """Return the loop with the most loads of 16 bytes among those that store nothing to global memory."""
    found = [loop for loop in loops if not moved(loop, "global", True)]
    return max(found, key=lambda loop: read_by(loop).count(16), default=[])


def read_by(loop: list[Instruction]) -> list[int]:
    """Return the bytes of each load, from global memory or, where another loop has copied them there, from shared."""
    return moved(loop, "global", False) + moved(loop, "shared", False)


def writing_loop(loops: list[list[Instruction]]) -> list[Instruction]:
    """Return the loop that stores the most among those that load 16 bytes, from global or shared memory."""
    found = [loop for loop in loops if 16 in moved(loop, "global", False) + moved(loop, "shared", False)]
    return max(found, key=lambda loop: sum(moved(loop, "global", True)), default=[])


class Figures(NamedTuple):
    registers: int
    spilled: int  # bytes of stack frame, spill stores and spill loads
    flight: int
    stores: int
    streaming: int
    narrow: int
    narrow_in_loop: int
    forward: float | None  # instructions per element in the loop that reads; None: there is none
    backward: float | None  # likewise in the loop that writes
    copies: int  # of 16 bytes to shared memory in that loop


def figures_of(code: list[Instruction], element: int, used: tuple[int, int]) -> Figures:
    stores, loops = moved(code, "global", True), loops_of(code)
    reading, writing = reading_loop(loops), writing_loop(loops)
    read, written = read_by(reading), moved(writing, "global", True)
    return Figures(
        *used,
        flight=in_flight(reading),
        stores=stores.count(16),
        streaming=moved(code, "global", True, streaming=True).count(16),
        narrow=len(stores) - stores.count(16),
        narrow_in_loop=len(written) - written.count(16),
        forward=len(reading) * element / sum(read) if reading else None,
        backward=len(writing) * element / sum(written) if written else None,
        copies=sum(i.op.startswith("LDGSTS") and i.op.endswith(".128") for i in writing),
    )


def broken(rule: Rule, figures: Figures, most: float) -> list[str]:
    """Say which parts of the rule the kernel breaks."""
    per_logit = (figures.forward or 0) + (figures.backward or 0)
    faults = {
        f"{figures.spilled} bytes of stack frame or spilled registers": figures.spilled > 0,
        f"{figures.flight} loads of 16 bytes in flight, expected {rule.flight} or more": figures.flight < rule.flight,
        f"{figures.stores} stores of 16 bytes, expected {rule.stores} or more": figures.stores < rule.stores,
        f"{figures.streaming} streaming stores of 16 bytes, expected {rule.streaming}": figures.streaming
        != rule.streaming,
        f"{figures.narrow} narrower stores, expected {rule.narrow} at most": figures.narrow > rule.narrow,
        f"{figures.narrow_in_loop} narrower stores in the loop that writes the row": figures.narrow_in_loop > 0,
        f"{per_logit:.1f} instructions per logit, expected {most:g} at most": per_logit > most,
        "no loop reads the row by 16 bytes": rule.reads_row and figures.forward is None,
        f"{figures.copies} copies of the next row's 16 bytes, expected {rule.copies}": figures.copies < rule.copies,
        "no loop writes the row": rule.writes_row and figures.backward is None,
    }
    return [fault for fault, found in faults.items() if found]


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
    """Return names such as bag_rows_kernel<BFloat16, 8, false>, without namespace and parameters."""
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
    hot = {rule.kernel.format(T=T, n=16 // ELEMENT[T]): (rule, T) for rule in RULES for T in ELEMENT}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pointers = "".join(f"  (const void*){kernel},\n" for kernel in hot)
        (folder / "hot.cu").write_text(
            '#include "bag_embedding.h"\n#include "loss_rows.h"\n'
            f"using namespace tst::cuda;\nconst void* kernels[] = {{\n{pointers}}};\n"
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(lambda a: machine_code(a, arguments.source, folder), arguments.architectures))

    failures = []
    print(f"{'':53}registers spilled flight stores streaming narrow  instructions per logit")
    for kernel, (rule, T) in hot.items():
        for architecture, kernels in zip(arguments.architectures, built, strict=True):
            code, used = kernels[kernel]
            f = figures_of(code, ELEMENT[T], used)
            faults = broken(rule, f, INSTRUCTIONS_PER_LOGIT[T])
            failures += [f"{kernel}, {architecture}: {fault}" for fault in faults]
            per_logit = " + ".join(f"{x:.1f}" for x in (f.forward, f.backward) if x is not None and rule.reads_row)
            print(
                f"{kernel:45}{architecture:8}{f.registers:9} {f.spilled:7} {f.flight:6} "
                f"{f.stores:6} {f.streaming:9} {f.narrow:6}  {per_logit:22} {'FAILS' if faults else ''}".rstrip()
            )
    print(*failures, sep="\n", end=f"\n{len(failures)} rules broken\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
