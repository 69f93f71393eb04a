"""The trainer's commands. Each takes its own command line; `tst_ext.__main__` chooses among them."""

import dataclasses
import os
import signal
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from .config import DataConfig, RunConfig, TrainConfig, UserError, check_out, load_config
from .presets import PRESETS, preset

__all__ = ["compare_command", "prepare_command", "train_command"]

T = TypeVar("T")
CONFIG_HELP = (
    "--config FILE reads defaults from a .toml file or the config.json of a run, --preset NAME takes those of the "
    f"paper's models ({', '.join(PRESETS)}); options override them."
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
    if "config" in {f.name for f in dataclasses.fields(kind)}:  # type: ignore[arg-type]
        defaults, argv = _defaults(argv)
        if defaults is not None:
            parser["default"] = kind(config=defaults)  # type: ignore[call-arg]
    return tyro.cli(
        kind,
        args=argv,
        prog=f"tst {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        **parser,
    )


def _defaults(argv: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """The configuration that the options of argv override, and argv without --config and --preset.

    That of --config or --preset; else that of the run in the folder --out; else the default.
    """
    argv = [
        part for a in argv for part in (a.split("=", 1) if a.startswith(("--config=", "--preset=", "--out=")) else [a])
    ]
    values: dict[str, str] = {}
    for option in ("--config", "--preset", "--out"):
        if option in argv:
            at = argv.index(option)
            if at + 1 == len(argv):
                raise UserError(f"{option}: expected a value after it")
            values[option] = argv[at + 1]
            if option != "--out":
                argv = argv[:at] + argv[at + 2 :]
    if len(values.keys() - {"--out"}) == 2:
        raise UserError("config, preset: expected one of them")
    if "--config" in values:
        return load_config(Path(values["--config"])), argv
    if "--preset" in values:
        return preset(values["--preset"]), argv
    run = Path(values["--out"]) / "config.json" if "--out" in values else None
    return (load_config(run) if run and run.exists() else None), argv


def train_command(argv: list[str]) -> int:
    arguments = _parse(TrainArguments, argv, "train", f"Trains one model through both phases. {CONFIG_HELP}")
    from .loop import Stopped, train

    try:
        result = train(arguments.config, arguments.out, resume=arguments.resume, progress=arguments.progress)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"tst train: {stopped}", file=sys.stderr)
        return stopped.status
    if os.environ.get("RANK", "0") == "0":
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
