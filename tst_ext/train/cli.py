"""The trainer's commands. Each takes its own command line; `tst_ext.__main__` chooses among them."""

import signal
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from .config import DataConfig, RunConfig, TrainConfig, UserError, check_out, load_config

__all__ = ["compare_command", "prepare_command", "train_command"]

T = TypeVar("T")
CONFIG_HELP = (
    "--config FILE reads defaults from a .toml file, or from the config.json of a run; what follows overrides it."
)


def _default_out() -> Path:
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")


@dataclass(frozen=True)
class TrainArguments:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    out: Path = field(default_factory=_default_out)
    """Folder for the run. One that holds a run goes on with it, by its own configuration."""
    resume: str = "auto"
    """auto: from the latest checkpoint, if there is one; or a checkpoint's name; never: only in an empty folder."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class CompareArguments:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(run=RunConfig(device="cpu"))
    )
    out: Path = field(default_factory=_default_out)
    """Folder for both runs, the table and the figure; must not hold anything yet."""
    seeds: tuple[int, ...] = ()
    """Seeds to compare, one pair of runs each; default: --seed alone."""


@dataclass(frozen=True)
class PrepareArguments:
    data: DataConfig
    out: Path
    """Folder to write; must not hold anything yet."""


def _parse(kind: type[T], argv: list[str], command: str, description: str) -> T:
    """Parses argv into `kind`; flags carry no section names (--dim, not --config.model.dim)."""
    parser: dict[str, Any] = {}
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in argv and kind is not PrepareArguments:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("--config: expected a file after it")
        parser["default"] = kind(config=load_config(Path(argv[at + 1])))  # type: ignore[call-arg]
        argv = argv[:at] + argv[at + 2 :]
    return tyro.cli(
        kind,
        args=argv,
        prog=f"tst {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        **parser,
    )


def train_command(argv: list[str]) -> int:
    arguments = _parse(TrainArguments, argv, "train", f"Trains one model through both phases. {CONFIG_HELP}")
    from .loop import train

    result = train(arguments.config, arguments.out, resume=arguments.resume, progress=arguments.progress)
    print(f"held-out loss {result['val_loss']:.4f} after {result['steps']} steps; run folder {arguments.out}")
    return 0


def compare_command(argv: list[str]) -> int:
    arguments = _parse(
        CompareArguments, argv, "compare", f"Trains a baseline and TST at equal FLOPs, side by side. {CONFIG_HELP}"
    )
    from .compare import compare, table

    # SIGTERM, from a job queue or `timeout`, as an exception: so that both runs are ended with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    summary = compare(arguments.config, arguments.out, arguments.seeds or (arguments.config.seed,))
    print(table(summary))
    print(f"table, figure (loss.png) and both runs: {arguments.out}")
    return 0


def prepare_command(argv: list[str]) -> int:
    arguments = _parse(PrepareArguments, argv, "prepare", "Writes text as token shards with a BPE trained on it.")
    from .data import prepare, read_documents

    check_out(arguments.out)
    prepare(read_documents(arguments.data), arguments.data, arguments.out)
    print(f"prepared folder {arguments.out}; use it as --data {arguments.out}", file=sys.stderr)
    return 0
