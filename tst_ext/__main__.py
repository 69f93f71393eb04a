"""`python -m tst_ext` and the command `tst`."""

import math
import os
import signal
import sys
from typing import NoReturn

USAGE = """usage: tst COMMAND [OPTION...]

commands:
  train        train one model through both phases, or resume a run; under torchrun on many devices
  compare      train a baseline and TST at equal FLOPs: one table and the curves of both losses
  sweep        do a grid of runs, or resume it: one table and figures
  prepare      write text as token shards that train and compare read
  plan         tokens, FLOPs and hours of a run before it is paid for, and when TST is worth it
  fit-weights  measure position weights on your text
  eval         next-token loss and bits per byte of a text under a run's model
  generate     continue a text with a run's model
  export       write a run's model for other software
  info         print the facts of this installation; info --check tests it

tst COMMAND --help lists the options of a command."""

INFO_USAGE = """usage: tst info [--check]

Prints the facts of this installation: what a bug report needs.

  --check  also tests it: compares every op with plain torch in float64, on the CPU with each of its instruction sets
           and on the GPU, in each dtype, and says what to do about each problem; exit status 1 if there is one"""


def info_command(argv: list[str]) -> int:
    if argv in (["-h"], ["--help"]):
        print(INFO_USAGE)
        return 0
    if argv not in ([], ["--check"]):
        print(f"tst info: expected --check or nothing, got {' '.join(argv)!r}\n\n{INFO_USAGE}", file=sys.stderr)
        return 2
    import torch

    from . import _C, __version__
    from ._cpus import cpu_quota, limit_threads
    from ._load import CUDA_ARCHITECTURES, NO_CUDA

    limit_threads()  # as every command does
    quota = f" (CPU quota {cpu_quota():g})" if cpu_quota() < math.inf else ""
    facts = {
        "tst-ext": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "CPU capability": f"{_C.cpu_capability()} (of {', '.join(_C.cpu_capabilities())})",
        "CPU GEMM": f"{_C.cpu_gemm()} (of {', '.join(_C.cpu_gemms())})",
        "CPU bfloat16": "as it is" if _C.cpu_bfloat16_gemms() else "in float32 (no bfloat16 instructions)",
        "CUDA kernels": CUDA_ARCHITECTURES or f"none: {NO_CUDA}",
        "device": f"cuda, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu",
        "threads": f"{torch.get_num_threads()}{quota}",
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not argv:
        return 0
    from .self_check import self_check

    print()
    return self_check()


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can put right, 1 for a failed check."""
    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes that are no text, which Python hands on as halves of surrogate pairs
            encoding = sys.getfilesystemencoding()
            hint = "" if encoding == "utf-8" else "; PYTHONUTF8=1 makes it utf-8"
            wanted = f"arguments in {encoding}, the encoding of the locale"
            print(f"tst: expected {wanted}, got {argument!a}{hint}", file=sys.stderr)
            return 2
    if argv in (["-h"], ["--help"], ["help"]):
        print(USAGE)
        return 0
    if not argv or f"  {argv[0]} " not in USAGE:
        print(f"tst: expected a command, got {' '.join(argv) or 'none'!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from . import _C

    try:
        _C.cpu_capability(), _C.cpu_gemm()
    except ValueError as error:  # of TST_CPU_CAPABILITY or TST_CPU_GEMM
        print(f"tst {argv[0]}: {error}", file=sys.stderr)
        return 2
    if argv[0] == "info":  # needs none of the packages of the extra `train`
        return info_command(argv[1:])
    try:
        from . import commands
        from ._cpus import limit_threads
        from .train.files import UserError
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tst_ext"):
            raise
        print(f"tst {argv[0]}: {error.name} is missing: pip install 'tst-ext[train]'", file=sys.stderr)
        return 2
    limit_threads()
    try:
        return commands.run(argv[0], argv[1:])
    except BrokenPipeError:
        raise  # for `entry`
    except (UserError, OSError, UnicodeEncodeError) as error:  # the last one of names that the locale cannot write
        print(f"tst {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tst {argv[0]}: interrupted", file=sys.stderr)
        return 130


def entry() -> NoReturn:
    """Run the command `tst` and end the process."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed
    for stream in streams:  # characters that the locale lacks are written as escapes
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        try:
            status = main()
        except SystemExit as ended:  # of --help, of wrong options, of SIGTERM
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        for stream in streams:
            stream.flush()
    except OSError as error:  # of the output
        if isinstance(error, BrokenPipeError):  # its reader, such as head, has read enough
            status = 128 + signal.SIGPIPE
        else:
            print(f"tst: the output cannot be written: {error}", file=sys.stderr)
            status = 2
        # Python writes what is left when it shuts down, which would be an error again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in streams:
            os.dup2(nowhere, stream.fileno())
    # Under torchrun gloo's threads outlive the run. One that frees a tensor while Python shuts down aborts the process
    # (torch 2.13; 4 of 16 runs with those threads at idle priority). So skip the shutdown.
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    entry()
