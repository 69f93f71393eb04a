"""Run the commands of the trainer and the lab. Each parses its own command line; `tst_ext.__main__` chooses one."""

import dataclasses
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from .train.config import DataConfig, RunConfig, TrainConfig, load_config
from .train.files import UserError, check_out
from .train.presets import PRESETS, preset

__all__ = ["COMMANDS"]

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
    """Folder for the run. A folder that holds a run resumes it, by its own configuration."""
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
    """Folder for the runs, the table and loss.png. With the options of an earlier call its runs are resumed."""
    seeds: tuple[int, ...] = ()
    """Seeds to compare, two runs each; default: --seed alone."""


@dataclass(frozen=True)
class SweepArguments:
    file: tyro.conf.Positional[Path]
    """A .toml file with the options of tst train and tables [[grid]]; docs/trainer.md describes it."""
    out: Path | None = None
    """Folder for the runs, the table and the figures; a sweep begun there is resumed. Default: runs/NAME OF FILE."""
    jobs: int = 0
    """Runs at a time; 0: as many as the cores are enough for, or one per GPU."""
    only: tuple[str, ...] | None = None
    """Names of grids or runs; no others are run."""
    list: bool = False
    """Print the names of the runs and run none."""


@dataclass(frozen=True)
class PrepareArguments:
    data: DataConfig
    out: Path
    """Folder to write; must not hold anything yet."""


@dataclass(frozen=True)
class PlanArguments:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpus: int
    """GPUs of the run, one process each."""
    tokens_per_second_per_gpu: float
    """Throughput of a run without superposition, in tokens per second per GPU."""


@dataclass(frozen=True)
class FitWeightsArguments:
    data: DataConfig
    out: Path = field(default_factory=_default_out)
    """Folder for fit_weights.json and fit_weights.png; must not hold anything yet."""
    tokens: int = 4_000_000
    """Tokens to measure; the fewer, the higher the floor of the estimate."""
    distances: int = 64
    """Largest distance between two tokens; fewer than about 16 leave the curve's end open."""
    subtract_floor: bool = False
    """Fit what exceeds the estimate for independent tokens; the paper's constants do not."""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    run: tyro.conf.Positional[Path]
    """Folder of a run."""
    checkpoint: str = "auto"
    """auto: the latest checkpoint; or the name of one."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments(RunArguments):
    out: Path
    """Folder to write; must not hold anything yet."""
    format: Literal["hf"] = "hf"
    """hf: config.json, safetensors and tokenizer, as transformers loads them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the files."""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(RunArguments):
    prompt: str = ""
    """Text to continue; without any a new document begins."""
    max_tokens: int = 200
    """Most tokens to append."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token each time."""
    top_k: int = 50
    """Draw among that many most probable tokens; 0: among all."""
    seed: int = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class EvalArguments(RunArguments):
    data: tuple[Path, ...] = ()
    """Files (.txt, .jsonl), folders of those, or one folder that `tst prepare` wrote, of which the held-out split is
    read. Default: the run's own held-out split."""
    text_key: str = "text"
    """Key of the text in a line of a .jsonl file."""
    batch: int = 16
    """Sequences at a time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


def _parse(kind: type[T], argv: list[str], command: str, description: str) -> T:
    """Parse argv into `kind`; flags carry no section names (--dim, not --config.model.dim)."""
    parser: dict[str, Any] = {}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if "config" in {f.name for f in fields}:
        defaults, argv = _defaults(argv)
        if defaults is not None:
            required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
            missing = dict.fromkeys(set(required) - {"config"}, tyro.MISSING)
            parser["default"] = kind(**{"config": defaults, **missing})
    return tyro.cli(
        kind,
        args=argv,
        prog=f"tst {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        **parser,
    )


def _defaults(argv: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """Return the configuration that the options of argv override, and argv without --config and --preset.

    It is that of --config or --preset; else that of the run in the folder --out; else the default.
    """
    argv = [
        part for a in argv for part in (a.split("=", 1) if a.startswith(("--config=", "--preset=", "--out=")) else [a])
    ]
    values: dict[str, str] = {}
    for option in ("--config", "--preset", "--out"):
        if option in argv:
            at = len(argv) - 1 - argv[::-1].index(option)  # the last one, as the parser takes it
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
    arguments = _parse(TrainArguments, argv, "train", f"Train one model through both phases. {CONFIG_HELP}")
    from .train.loop import train
    from .train.signals import Stopped

    first = os.environ.get("RANK", "0") == "0"
    try:
        result = train(arguments.config, arguments.out, resume=arguments.resume, progress=arguments.progress)
    except Stopped as stopped:
        if first:
            print(f"tst train: {stopped}", file=sys.stderr)
        return stopped.status
    if first:
        print(f"held-out loss {result['val_loss']:.4f} after {result['steps']} steps; run folder {arguments.out}")
    return 0


def compare_command(argv: list[str]) -> int:
    arguments = _parse(
        CompareArguments,
        argv,
        "compare",
        f"Train a baseline and TST at equal FLOPs, or resume such runs: a sweep over seeds. {CONFIG_HELP}",
    )
    from .lab.compare import compare

    _exit_on_sigterm()
    results = compare(arguments.config, arguments.out, arguments.seeds or (arguments.config.seed,))
    return _report(results, "compare", arguments.out)


def sweep_command(argv: list[str]) -> int:
    arguments = _parse(SweepArguments, argv, "sweep FILE", "Do a grid of runs, or resume it.")
    from .lab.sweep import load_sweep, run_sweep

    sweep = load_sweep(arguments.file)
    if arguments.list:
        if arguments.only is not None:
            raise UserError("list, only: expected one of them")
        for grid in sweep.grids:
            print("\n  ".join([f"{grid.name}:", *grid.runs]))
        return 0
    if arguments.jobs < 0:
        raise UserError(f"jobs: expected an integer >= 0, got {arguments.jobs}")
    folder = arguments.out or Path("runs") / arguments.file.stem
    _exit_on_sigterm()
    return _report(run_sweep(sweep, folder, jobs=arguments.jobs, only=arguments.only), "sweep", folder)


def _exit_on_sigterm() -> None:
    """Make SIGTERM, from a job queue or `timeout`, an exception, so that the runs are ended with this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _report(results: dict[str, Any], command: str, folder: Path) -> int:
    """Print the table of a sweep and the runs that failed; return the exit status."""
    from .lab.sweep import table

    print(table(results))
    print(f"table (results.csv, results.json), figures and runs: {folder}")
    failed = [row for row in results["runs"] if row["status"] not in ("done", "to do")]
    for row in failed:
        print(f"tst {command}: {row['name']} {row['status']}", file=sys.stderr)
    return 1 if failed else 0


def prepare_command(argv: list[str]) -> int:
    arguments = _parse(PrepareArguments, argv, "prepare", "Write text as token shards with a BPE trained on it.")
    from .train.data import prepare, read_documents

    check_out(arguments.out)
    prepare(read_documents(arguments.data), arguments.data, arguments.out)
    print(f"prepared folder {arguments.out}; use it as --data {arguments.out}", file=sys.stderr)
    return 0


def plan_command(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        argv = ["--preset" if argv[0] in PRESETS else "--config", *argv]
    arguments = _parse(
        PlanArguments,
        argv,
        "plan PRESET|FILE",
        f"Print tokens, FLOPs and hours of a run before it is paid for, and when TST is worth it. {CONFIG_HELP}",
    )
    from .lab.plan import plan, report

    config, gpus, rate = arguments.config, arguments.gpus, arguments.tokens_per_second_per_gpu
    print(report(plan(config, gpus=gpus, tokens_per_second_per_gpu=rate)), end="")
    return 0


def fit_weights_command(argv: list[str]) -> int:
    arguments = _parse(
        FitWeightsArguments,
        argv,
        "fit-weights",
        "Measure how the mutual information of two tokens decays with their distance and fit position weights to it.",
    )
    from .lab.fit_weights import fit_weights
    from .train.data import Shard, prepared_folder

    check_out(arguments.out)
    shard = Shard(prepared_folder(arguments.data), "train")
    print(f"measures {arguments.distances} distances", file=sys.stderr)
    fitted = fit_weights(
        shard,
        tokens=arguments.tokens,
        distances=arguments.distances,
        subtract_floor=arguments.subtract_floor,
        folder=arguments.out,
    )
    constants = " ".join(f"{fitted[name]:.4g}" for name in ("c0", "a", "k"))
    print(f"--position-weights fitted --fitted {constants}")
    print(f"figure and values: {arguments.out}")
    return 0


def export_command(argv: list[str]) -> int:
    arguments = _parse(ExportArguments, argv, "export", "Write a run's model in a format that other software loads.")
    import torch

    from .lab.export import export_hf
    from .train.run_folder import load_run

    run = load_run(arguments.run, arguments.checkpoint)
    dtype = getattr(torch, arguments.dtype)
    export_hf(run.model, run.config, run.tokenizer_path, run.end_of_text, arguments.out, dtype=dtype)
    print(f"model as of step {run.step}: {arguments.out}")
    return 0


def generate_command(argv: list[str]) -> int:
    arguments = _parse(GenerateArguments, argv, "generate", "Continue a text with a run's model.")
    from .lab.generate import generate
    from .train.run_folder import load_run

    run = load_run(arguments.run, arguments.checkpoint)
    text = generate(
        run.model,
        run.tokenizer(),
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        end_of_text=run.end_of_text,
        positions=run.config.latent_tokens,
    )
    print(arguments.prompt + text)
    return 0


def eval_command(argv: list[str]) -> int:
    arguments = _parse(EvalArguments, argv, "eval", "Print next-token loss and bits per byte of a text.")
    from .lab.evaluate import evaluate, evaluate_shard
    from .train.data import Shard, prepared_folder, read_documents
    from .train.distributed import choose_device
    from .train.run_folder import load_run

    run = load_run(arguments.run, arguments.checkpoint)
    device = choose_device(arguments.device)
    options: dict[str, Any] = {"length": run.config.latent_tokens, "batch": arguments.batch, "device": device}
    model, tokenizer = run.model.to(device), run.tokenizer()
    data = DataConfig(data=arguments.data, text_key=arguments.text_key) if arguments.data else run.config.data
    if not arguments.data or (data.data[0] / "val.json").exists():
        folder = prepared_folder(data)
        if not (folder / "tokenizer.json").exists():
            raise UserError(f"data {folder}: it has no tokenizer.json to compare with the run's")
        # Ids of another tokenizer would give figures, and wrong ones.
        if (folder / "tokenizer.json").read_bytes() != (arguments.run / "tokenizer.json").read_bytes():
            raise UserError(f"data {folder}: its tokenizer.json is not the run's")
        result = evaluate_shard(model, Shard(folder, "val"), tokenizer, **options)
    else:
        if run.end_of_text is None:
            raise UserError(f"run {arguments.run}: its data names no end-of-text token")
        result = evaluate(model, tokenizer, run.end_of_text, read_documents(data), **options)
    print(json.dumps({"step": run.step, **result}, indent=2))
    return 0


COMMANDS = {
    "train": train_command,
    "compare": compare_command,
    "sweep": sweep_command,
    "prepare": prepare_command,
    "plan": plan_command,
    "fit-weights": fit_weights_command,
    "eval": eval_command,
    "generate": generate_command,
    "export": export_command,
}
