"""Train a model through both phases."""

import dataclasses
import math
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from .. import _C, SuperpositionSchedule, bag_entropy, position_weights
from . import checkpoint
from .batches import PADDING, Batch, ahead, check_batches, read_batch
from .config import SuperpositionConfig, TrainConfig, config_dict
from .data import Shard
from .distributed import Processes
from .files import UserError
from .flops import gemm_flops_per_second, step_flops
from .metrics import Meter, Metrics, load_range, load_table
from .model import Transformer
from .optimizer import build_optimizer, learning_rate, reinitialise
from .prepare import prepared_folder
from .run_folder import RunFolder
from .signals import Stopped, stop_signals
from .tokens import data_tokens

__all__ = ["train"]


@lru_cache(maxsize=16)  # the counts are the same in every step, unless bags end with documents
def loss_options(
    options: SuperpositionConfig, counts: tuple[int, ...], world: int, device: torch.device | None = None
) -> dict[str, Any]:
    """Return the options of the loss that make the parts of a batch add up to the loss of the whole, and its gradient.

    The loss is the mean over the rows of each position, then the weighted mean over positions (docs/ops.md).

    Args:
        counts: for each of the s bag positions how many of its labels count, of the whole batch.
        world: processes, over which DDP and FSDP2 average gradients instead of adding them.
        device: of the weights of the positions, by default the CPU.
    """
    if len(counts) > 1 and options.objective == "mce_alt":
        return {"objective": "mce_alt", "normalizer": max(counts) / world}
    rows = torch.tensor(counts)
    weights = position_weights(options.position_weights, len(counts), fitted=options.fitted, dtype=torch.float64)
    weights = torch.where(rows > 0, weights, 0.0)
    # CUDA takes so few bytes along with the call. A copy that blocks, as the op's own would in each part of each batch,
    # waits for all the work before it, and the device is idle until the host has enqueued more.
    return {
        "position_weights": (weights / rows.clamp(min=1)).float().to(device, non_blocking=True),
        "normalizer": weights.sum().item() / world,
    }


def loss_floor(labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the least that the loss of `labels` `[b, l]` or `[b, l, s]` under `loss_options` can be: a 0-d tensor.

    A bag's loss is at least its entropy, times the weight of its labels in the loss. For next tokens, and for
    "mce_alt", which asks only that a bag's labels have probability 1 together, it is 0.
    """
    if labels.dim() == 2 or "objective" in options:
        return torch.zeros((), device=labels.device)
    weights = options["position_weights"]
    row = torch.where(labels == PADDING, 0, weights).sum(-1)
    return (row * bag_entropy(labels, position_weights=weights)).sum() / options["normalizer"]


@torch.no_grad()
def validate(model: nn.Module, shard: Shard, config: TrainConfig, processes: Processes) -> float:
    """Return the mean next-token loss in nats over the first `eval_tokens` held-out tokens, in either phase."""
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    size = config.run.micro_batch or config.batch // processes.world
    for ids, labels in shard.windows(config.eval_tokens, size * processes.world, config.latent_tokens):
        mine = slice(processes.rank, None, processes.world)
        if processes.rank < len(ids):
            ids, labels = ids[mine], labels[mine]
        else:  # a sequence that counts for nothing: FSDP2 needs every process in every forward pass
            ids, labels = ids[:1], torch.full_like(labels[:1], PADDING)
        with processes.autocast(config):
            loss = model(ids.to(processes.device), labels.to(processes.device))
        count = int((labels != PADDING).sum())
        sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
    total, count = processes.sum(sums).tolist()
    return total / count


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: str = "auto",
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train one model and leave everything about the run in `folder`. Under torchrun every process calls it.

    Write config.json, environment.json, tokenizer.json, metrics.jsonl, checkpoints/, loss.png and result.json.

    Args:
        resume: "auto" resumes from the latest checkpoint in `folder`, bit for bit, or begins if there is none. The name
            of a checkpoint resumes from that one. "never" takes no folder that holds anything.
        on_step: called before each step with its number, from 0. What it raises ends the run without a checkpoint.

    Returns:
        What result.json holds: steps, data tokens, seconds, final validation loss in nats, and more.

    Raises:
        UserError: the folder, the device or the data cannot be used (nothing is written then); a checkpoint cannot be
            used or written; the disk is full; the loss is no longer finite.
        Stopped: SIGTERM or SIGINT came; the run has been saved.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    # A CPU is slow on denormal gradients: on noise the backward pass of a 7 M parameter model went from 50 to 83 ms in
    # 450 steps. As zeros they change no digit of the loss.
    torch.set_flush_denormal(True)
    with Processes(config.run.device) as processes:
        run = RunFolder(processes.share(folder), processes)
        try:
            with run:
                return _train(config, run, resume, progress, on_step, processes)
        except OSError as error:
            raise UserError(f"out {run.path}: {error}; {checkpoint.last_good(run.path)}") from error


def _train(
    config: TrainConfig,
    run: RunFolder,
    resume: str,
    progress: bool,
    on_step: Callable[[int], None] | None,
    processes: Processes,
) -> dict[str, Any]:
    found = run.open(config, resume)
    data = processes.first_only(lambda: prepared_folder(config.data, progress))  # made once, found by the others
    training, held_out = Shard(data, "train", config.data), Shard(data, "val", config.data)
    options = config.superposition
    schedule = SuperpositionSchedule(config.steps, options.ratio, options.bag_size, options.stages)
    check_batches(config, training, processes.world)
    held_out.check_length(config.latent_tokens, "; --holdout takes a larger share of the text")
    if len(held_out) <= config.eval_tokens and processes.first:
        got = f"{len(held_out):,} of the {config.eval_tokens:,} tokens wanted (--eval-tokens, --holdout)"
        print(f"validation: the held-out text has only {got}", file=sys.stderr)

    torch.manual_seed(config.seed)
    padding = None if options.straddle else PADDING
    model = Transformer(config.model, training.vocabulary, config.latent_tokens, padding).to(processes.device)
    parallel = processes.parallelise(model, config)
    optimizer = build_optimizer(model, config.optimizer)

    state: dict[str, Any] = {"step": 0, "data_tokens": 0, "seconds": 0.0, "val_loss": None}
    identity = {
        "config": config_dict(config),
        "data": training.sha256,
        "held_out": held_out.sha256,
        "vocabulary": training.vocabulary,
        "end_of_text": training.end_of_text,
    }
    if found:
        run.check_same(found, identity, len(training))
        checkpoint.load(found.path, model, optimizer, processes)
        state = {key: found.manifest[key] for key in state}
    peak = gemm_flops_per_second(processes.device, getattr(torch, config.dtype)) * processes.world
    if config.dtype == "bfloat16" and processes.device.type == "cpu" and not _C.cpu_bfloat16_gemms():
        factor = gemm_flops_per_second(processes.device, torch.float32) * processes.world / peak
        peak *= max(1, factor)  # the head's products are float32
        if processes.first and factor >= 1.05:
            got = f"the model's matrix products take {factor:.1f} times as long as with --dtype float32"
            print(f"dtype bfloat16: this CPU has no instructions for it, so {got}", file=sys.stderr)
    facts = {
        "device": str(processes.device),
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: identity[name] for name in ("vocabulary", "data", "held_out")},
        "epochs": round(data_tokens(config) / len(training), 4),
        "switch_step": schedule.switch_step,
        "gemm_flops_per_s": round(peak),
    }
    processes.first_only(lambda: run.begin(config, found, training.tokenizer, facts))

    def read(step: int) -> Batch:
        batch = read_batch(training, config, schedule.bag_size_at(step), step, processes.rank, processes.world)
        if processes.device.type != "cuda":
            return batch
        return dataclasses.replace(batch, ids=batch.ids.pin_memory(), labels=batch.labels.pin_memory())

    share = config.batch // processes.world
    parts = share // (config.run.micro_batch or share)
    flops = step_flops(config.model, training.vocabulary, config.batch, config.latent_tokens)
    meter = Meter(state["seconds"], state["step"], state["data_tokens"], flops, peak)
    with (
        Metrics(run.path if processes.first else None, state["step"], config.run.tensorboard) as metrics,
        tqdm(total=config.steps, initial=state["step"], unit="step", mininterval=1.0, dynamic_ncols=True,
             disable=not (progress and processes.first)) as bar,
        ahead(read, state["step"], config.steps) as batches,
        stop_signals() as signals,
    ):  # fmt: skip
        for step in range(state["step"], config.steps):
            if on_step:
                on_step(step)
            with meter.waiting_for_data():
                batch = next(batches)
            if 0 < step == schedule.switch_step and options.reinitialise:
                reinitialise(model, optimizer, config.seed)
            # One exchange of what every process must know of the others: labels, tokens, a request to stop.
            *counts, tokens, stop = processes.sum_numbers([*batch.counts, batch.tokens, len(signals)])
            if not any(counts):
                raise UserError(f"step {step}: no bag has a label: documents are shorter than bags (--no-straddle)")
            loss_arguments = loss_options(options, tuple(counts), processes.world, processes.device)
            lr = learning_rate(config.optimizer, config.steps, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            loss = torch.zeros((), device=processes.device)
            for i, (ids, labels) in enumerate(zip(batch.ids.chunk(parts), batch.labels.chunk(parts), strict=True)):
                ids, labels = (t.to(processes.device, non_blocking=True) for t in (ids, labels))
                with processes.accumulate(parallel, last=i == parts - 1):
                    with processes.autocast(config):
                        part = parallel(ids, labels, parts=parts, **loss_arguments)
                    part.backward()
                loss += part.detach()
                del part  # and with it the graph, before the next one is built: 2 % of a small model's step
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            load = model.end_step()

            state["step"], state["data_tokens"] = step + 1, state["data_tokens"] + tokens
            last = step + 1 == config.steps
            report = last or (step + 1) % config.run.log_every == 0
            save = last or stop or (step + 1) % config.run.checkpoint_every == 0
            if report or save:
                value = processes.sum(loss).item() / processes.world
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                if not (math.isfinite(value) and norm.isfinite()):  # before a checkpoint of it replaces a good one
                    values = f"the loss is {value}, the norm of its gradient {norm.item()}"
                    raise UserError(f"step {step}: {values}; a lower learning rate or clip may help")
            if report:
                phase = "superposition" if step < schedule.switch_step else "recovery"
                # In logged steps only: 16,384 bags of 6 take 5 ms on one core.
                floor = processes.sum(loss_floor(batch.labels.to(processes.device), loss_arguments)).item()
                line = {"step": step + 1, "phase": phase, "loss": value, "excess_loss": value - floor / processes.world}
                line |= {"lr": lr, "grad_norm": norm.item()}
                line |= load_range(load) | meter.report(step + 1, state["data_tokens"])
                metrics.write(line)
                held = "" if state["val_loss"] is None else f" held-out {state['val_loss']:.3f}"
                shown = f"{phase} loss {value:.3f} lr {lr:.1e}{held}"
                bar.set_postfix_str(f"{shown} {line['tokens_per_s']:,} tokens/s", refresh=False)
            if last or (step + 1) % config.run.eval_every == 0:
                processes.finish()
                with meter.pause():
                    state["val_loss"] = validate(parallel, held_out, config, processes)
                if not math.isfinite(state["val_loss"]):
                    raise UserError(f"step {step}: the held-out loss is {state['val_loss']}; try a lower learning rate")
                metrics.write({"step": step + 1, "val_loss": state["val_loss"], **load_table(load)})
            if save:
                processes.finish()
                with meter.pause():
                    metrics.sync()
                    state["seconds"] = meter.seconds
                    checkpoint.save(run.path, model, optimizer, {**state, **identity}, processes, config.run.keep)
            if stop and not last:
                raise Stopped(signals[0] if signals else signal.SIGTERM, step + 1, run.path)
            if processes.first and (ends := meter.estimate(step + 1, config.steps, processes.finish)):
                bar.write(ends, file=sys.stderr)
            bar.update()

    result = {"steps": config.steps, "switch_step": schedule.switch_step}
    result |= {key: state[key] for key in ("data_tokens", "seconds", "val_loss")}
    run.end(result)
    return result
