"""Run the commands of the trainer and the lab: a function each, whose signature and docstring are its command line."""

import argparse
import dataclasses
import functools
import inspect
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .train.config import DataConfig, RunConfig, TrainConfig, load_config
from .train.files import UserError, check, check_out
from .train.presets import PRESETS, preset
from .train.tokens import with_tokens

CONFIG_HELP = (
    "--config FILE reads defaults from a .toml file or the config.json of a run, --preset NAME takes those of the "
    f"paper's models ({', '.join(PRESETS)}); options override them."
)
Config = Annotated[TrainConfig, tyro.conf.arg(name="")]  # options without a section's name: --dim, not --model.dim
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="Folder of a run.")]
Checkpoint = Annotated[str, tyro.conf.arg(help="auto: the latest; or the name of one.")]
DEFAULT, ON_CPU = TrainConfig(), TrainConfig(run=RunConfig(device="cpu"))


def run(command: str, argv: list[str]) -> int:
    """Call the function of a command with the arguments in argv, and return its exit status."""
    function = COMMANDS[command]
    if command == "plan" and argv and not argv[0].startswith("-"):
        argv = ["--preset" if argv[0] in PRESETS else "--config", *argv]
    description = " ".join((function.__doc__ or "").partition("\n\n    Args:")[0].split())
    defaults: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters
    if "config" in parameters:
        description += f" {CONFIG_HELP}"
        config, tokens, argv = _defaults(argv)
        if tokens is not None:
            # --tokens has not set the steps yet, so a warm-up of any number of steps is right here.
            config = dataclasses.replace(config or parameters["config"].default, steps=sys.maxsize)
            defaults["tokens"] = tokens
        if config:
            defaults["config"] = config

    @functools.wraps(function)
    def parsed(*positional: Any, **options: Any) -> Callable[[], int]:
        return functools.partial(function, *positional, **options)

    # Called here, as tyro would take a ValueError of the function for one of the command line.
    return tyro.cli(
        functools.partial(parsed, **defaults),
        args=argv,
        prog=f"tst {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )()


def _defaults(argv: list[str]) -> tuple[TrainConfig | None, str | None, list[str]]:
    """Return the configuration of --preset, --config or the run in --out, if any, --tokens, and argv without them.

    It keeps --out.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--config", "--preset", "--out", "--tokens"):
        parser.add_argument(option)
    try:
        given, argv = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: expected a value after it") from error
    if given.config is not None and given.preset is not None:
        raise UserError("config, preset: expected one of them")
    if given.tokens is not None and any(argument.partition("=")[0] == "--steps" for argument in argv):
        raise UserError("steps, tokens: expected one of them")
    if given.out is not None:
        argv = [*argv, f"--out={given.out}"]
        if given.config is None and (Path(given.out) / "config.json").exists():
            given.config = Path(given.out) / "config.json"
    if given.preset is not None:
        return preset(given.preset), given.tokens, argv
    return (None if given.config is None else load_config(Path(given.config))), given.tokens, argv


def _out(given: Path | None) -> Path:
    return given or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")


def train_command(
    config: Config = DEFAULT,
    *,
    tokens: str | None = None,
    out: Path | None = None,
    resume: str = "auto",
    progress: bool = True,
) -> int:
    """Train one model through both phases.

    Args:
        tokens: Data tokens of both phases together, such as 2B or 500M, in place of --steps.
        out: Folder for the run. A folder that holds a run resumes it, by its own configuration. Default: runs/DATE-TIME
        resume: auto: the latest checkpoint, if there is one; or a checkpoint's name; never: take only an empty folder.
        progress: Show a progress bar.
    """
    from .train.distributed import rank_and_world
    from .train.loop import train
    from .train.signals import Stopped

    config = with_tokens(config, tokens)
    first, out = rank_and_world()[0] == 0, _out(out)
    try:
        result = train(config, out, resume=resume, progress=progress)
    except Stopped as stopped:
        if first:
            print(f"tst train: {stopped}", file=sys.stderr)
        return stopped.status
    if first:
        print(f"held-out loss {result['val_loss']:.4f} after {result['steps']} steps; run folder {out}")
    return 0


def compare_command(
    config: Config = ON_CPU, *, tokens: str | None = None, out: Path | None = None, seeds: tuple[int, ...] = ()
) -> int:
    """Train a baseline and TST at equal FLOPs, or resume such runs: a sweep over seeds.

    Args:
        tokens: Data tokens of the TST run, such as 2B or 500M, in place of --steps. The baseline takes as many steps.
        out: Folder for runs, table and loss.png. The options of an earlier call resume it. Default: runs/DATE-TIME.
        seeds: Seeds to compare, two runs each. Default: --seed alone.
    """
    from .lab.compare import compare

    config = with_tokens(config, tokens)
    _exit_on_sigterm()
    out = _out(out)
    return _report(compare(config, out, seeds or (config.seed,)), "compare", out)


def sweep_command(
    file: tyro.conf.Positional[Path],
    *,
    out: Path | None = None,
    jobs: int = 0,
    only: tuple[str, ...] | None = None,
    list: bool = False,
) -> int:
    """Do a grid of runs, or resume it.

    Args:
        file: A .toml file with the options of tst train and tables [[grid]]; docs/trainer.md describes it.
        out: Folder for runs, table and figures; a sweep begun there is resumed. Default: runs/NAME OF FILE.
        jobs: Runs at a time; 0: as many as the cores are enough for, or one per GPU.
        only: Names of grids or runs; no others are run.
        list: Print the names of the runs and run none.
    """
    from .lab.sweep import load_sweep, run_sweep

    sweep = load_sweep(file)
    if list:
        if only is not None:
            raise UserError("list, only: expected one of them")
        for grid in sweep.grids:
            print("\n  ".join([f"{grid.name}:", *grid.runs]))
        return 0
    check("jobs", jobs, jobs >= 0, "an integer >= 0")
    out = out or Path("runs") / file.stem
    _exit_on_sigterm()
    return _report(run_sweep(sweep, out, jobs=jobs, only=only), "sweep", out)


def _exit_on_sigterm() -> None:
    """Make SIGTERM an exception, so that the runs end with this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _report(results: dict[str, Any], command: str, folder: Path) -> int:
    """Print the table of a sweep and its failed runs, and return the exit status."""
    from .lab.sweep import table

    print(table(results))
    print(f"table (results.csv, results.json), figures and runs: {folder}")
    failed = [row for row in results["runs"] if row["status"] not in ("done", "to do")]
    for row in failed:
        print(f"tst {command}: {row['name']} {row['status']}", file=sys.stderr)
    return 1 if failed else 0


def prepare_command(data: DataConfig, *, out: Path, progress: bool = True) -> int:
    """Write text as token shards with a BPE trained on it, or resume an interrupted call.

    Args:
        out: Folder to write; must be empty or new.
        progress: Show a progress bar.
    """
    from .train.corpus import sources
    from .train.data import has_tokens
    from .train.prepare import prepare

    check_out(out)
    for path in data.data:
        if has_tokens(path):
            raise UserError(f"data {path}: expected text, got a folder of tokens, which tst train reads as it is")
    try:
        prepare(sources(data), data, out, progress)
    except OSError as error:
        raise UserError(f"out {out}: {error.strerror or error}") from error
    print(f"prepared folder {out}; use it as --data {out}", file=sys.stderr)
    return 0


def plan_command(
    config: Config = DEFAULT, *, tokens: str | None = None, gpus: int, tokens_per_second_per_gpu: float
) -> int:
    """Print tokens, FLOPs and hours of a run before it is paid for, and when TST is worth it.

    `tst plan NAME` is `tst plan --preset NAME`, `tst plan FILE` is `tst plan --config FILE`.

    Args:
        tokens: Data tokens of both phases together, such as 2B or 500M, in place of --steps.
        gpus: GPUs of the run, one process each.
        tokens_per_second_per_gpu: Throughput of a run without superposition, in tokens per second per GPU.
    """
    from .lab.plan import plan, report

    config = with_tokens(config, tokens)
    print(report(plan(config, gpus=gpus, tokens_per_second_per_gpu=tokens_per_second_per_gpu)), end="")
    return 0


def fit_weights_command(
    data: DataConfig,
    *,
    out: Path | None = None,
    tokens: int = 4_000_000,
    distances: int = 64,
    subtract_floor: bool = False,
) -> int:
    """Measure how the mutual information of two tokens decays with their distance and fit position weights to it.

    Args:
        out: Folder for fit_weights.json and fit_weights.png; must be empty or new. Default: runs/DATE-TIME.
        tokens: Tokens to measure; fewer tokens raise the floor of the estimate.
        distances: Largest distance between two tokens; fewer than about 16 leave the curve's end open.
        subtract_floor: Fit what exceeds the estimate for independent tokens, unlike the paper.
    """
    from .lab.fit_weights import fit_weights
    from .train.data import Shard
    from .train.prepare import prepared_folder

    out = _out(out)
    check_out(out)
    shard = Shard(prepared_folder(data, progress=True), "train", data)
    print(f"measures {distances} distances", file=sys.stderr)
    fitted = fit_weights(shard, tokens=tokens, distances=distances, subtract_floor=subtract_floor, folder=out)
    constants = " ".join(f"{fitted[name]:.4g}" for name in ("c0", "a", "k"))
    print(f"--position-weights fitted --fitted {constants}")
    print(f"figure and values: {out}")
    return 0


def export_command(
    run: Run,
    *,
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    checkpoint: Checkpoint = "auto",
) -> int:
    """Write a run's model as transformers loads it: config.json, safetensors and tokenizer.

    Args:
        out: Folder to write; must be empty or new.
        dtype: Of the weights in the files.
    """
    import torch

    from .lab.export import export_hf
    from .train.run_folder import load_run

    loaded = load_run(run, checkpoint)
    tokenizer, end = loaded.tokenizer_path, loaded.end_of_text
    export_hf(loaded.model, loaded.config, tokenizer, end, out, dtype=getattr(torch, dtype))
    print(f"model as of step {loaded.step}: {out}")
    return 0


def generate_command(
    run: Run,
    *,
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    checkpoint: Checkpoint = "auto",
) -> int:
    """Continue a text with a run's model.

    Args:
        prompt: Text to continue; if empty, a new document begins.
        max_tokens: Most tokens to append.
        temperature: Divides the logits; 0 takes the most probable token each time.
        seed: Seed of the draws.
    """
    from .lab.generate import generate
    from .train.run_folder import load_run

    loaded = load_run(run, checkpoint)
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options |= {"end_of_text": loaded.end_of_text, "positions": loaded.config.latent_tokens}
    print(prompt + generate(loaded.model, loaded.tokenizer(), prompt, **options))
    return 0


def eval_command(
    run: Run,
    *,
    data: tuple[Path, ...] = (),
    text_key: str = "text",
    batch: int = 16,
    device: str = "auto",
    checkpoint: Checkpoint = "auto",
) -> int:
    """Print next-token loss and bits per byte of a text under a run's model.

    Args:
        data: Text, as tst prepare takes it, or the held-out split of one folder of tokens.
            Default: the run's own held-out split.
        text_key: Key or column of the text, where documents have several.
        batch: Sequences at a time.
        device: cpu, cuda, or auto: cuda if there is one.
    """
    from .lab.evaluate import evaluate, evaluate_shard
    from .train.corpus import documents
    from .train.data import Shard, has_tokens
    from .train.distributed import choose_device
    from .train.prepare import prepared_folder
    from .train.run_folder import load_run

    loaded = load_run(run, checkpoint)
    where = choose_device(device)
    options: dict[str, Any] = {"length": loaded.config.latent_tokens, "batch": batch, "device": where}
    model, tokenizer = loaded.model.to(where), loaded.tokenizer()
    source = loaded.config.data
    if data:
        source = dataclasses.replace(source, data=data, text_key=text_key, dataset="", subset="", split="train")
    if not data or has_tokens(data[0]):
        folder = prepared_folder(source)
        shard = Shard(folder, "val", source)
        if shard.tokenizer is None:
            raise UserError(f"data {folder}: it has no tokenizer.json to compare with the run's")
        # With another tokenizer the figures would be wrong.
        if shard.tokenizer.read_bytes() != (run / "tokenizer.json").read_bytes():
            raise UserError(f"data {folder}: its tokenizer.json is not the run's")
        result = evaluate_shard(model, shard, tokenizer, **options)
    else:
        if loaded.end_of_text is None:
            raise UserError(f"run {run}: its data names no end-of-text token")
        result = evaluate(model, tokenizer, loaded.end_of_text, list(documents(source)), **options)
    print(json.dumps({"step": loaded.step, **result}, indent=2))
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
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
