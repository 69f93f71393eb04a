"""`python -m tst_ext` and the command `tst`."""

import argparse
import sys

EXTRA = "needs the trainer's packages: pip install 'tst-ext[train]'"


def info() -> str:
    """Facts about this installation, one `name: value` a line: what a bug report needs."""
    import torch

    from . import _C, __version__

    facts = {
        "tst-ext": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "CPU capability": f"{_C.cpu_capability()} (of {', '.join(_C.cpu_capabilities())})",
        "CUDA architectures": _C.cuda_architectures() or "none built",
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status. `info` works without the packages of the extra `train`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["info"]:
        print(info())
        return 0
    try:
        from .train.cli import main as train_main
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "tst_ext":
            raise
        parser = argparse.ArgumentParser(prog="tst")
        parser.add_argument("command", choices=["info"])
        parser.error(f"{error.name} is missing; every command but 'info' {EXTRA}")
    return train_main(argv)


if __name__ == "__main__":
    sys.exit(main())
