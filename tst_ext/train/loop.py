"""The training loop."""

import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import SuperpositionSchedule, __version__, fold_inputs, fold_labels
from .config import OptimizerConfig, TrainConfig, UserError, check_out, save_config
from .data import Shard, prepared_folder
from .model import Transformer
from .plot import plot_run

__all__ = ["learning_rate", "train"]


def learning_rate(config: OptimizerConfig, steps: int, step: int) -> float:
    """Warmup-Stable-Decay at `step` (0-based): linear to the peak, flat, linear to zero just past the end.

    The phase switch does not appear here: the schedule runs through it (arXiv 2605.06546).
    """
    warmup, decay = round(config.warmup * steps), round(config.decay * steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / decay if steps - step <= decay else 1.0
    return config.learning_rate * min(rise, fall)


def choose_device(name: str) -> torch.device:
    """The device of that name, with "auto" the GPU where there is one; UserError where it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # names or devices torch lacks
        raise UserError(f"device: expected auto, cpu or cuda, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, embedding and head among them, with weight decay; the gains of the norms without.

    Embedding and head are untied and feed normalised layers, so their scale carries nothing and decay bounds it, as it
    does for the other matrices. Shrinking a gain instead would shrink the signal.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def validate(model: Transformer, shard: Shard, config: TrainConfig, device: torch.device) -> float:
    """Mean next-token loss in nats over the first `eval_tokens` held-out tokens, whatever phase the training is in."""
    total, count = 0.0, 0
    for ids, labels in shard.windows(config.eval_tokens, batch=16, length=config.latent_tokens):
        total += model(ids.to(device), labels.to(device)).item() * labels.numel()
        count += labels.numel()
    return total / count


def train(config: TrainConfig, folder: Path, *, progress: bool = True) -> dict[str, Any]:
    """Trains one model and leaves everything about the run in `folder`.

    Writes config.json, environment.json, metrics.jsonl, loss.png, model.pt (the state dict) and result.json.

    Returns:
        What result.json holds: steps, data tokens, seconds, final validation loss in nats, and more.

    Raises:
        UserError: the folder, the device or the data cannot be used (nothing is written then), or the loss is no
            longer finite.
    """
    check_out(folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    data = prepared_folder(config.data)
    training, held_out = Shard(data, "train"), Shard(data, "val")
    schedule = SuperpositionSchedule(config.steps, config.superposition.ratio, config.superposition.bag_size)
    training.check_length(config.latent_tokens * schedule.bag_size_at(0))
    held_out.check_length(config.latent_tokens)
    if len(held_out.tokens) <= config.eval_tokens:
        got = f"{len(held_out.tokens):,} of the {config.eval_tokens:,} tokens wanted (--eval-tokens, --holdout)"
        print(f"validation: the held-out text has only {got}", file=sys.stderr)

    torch.manual_seed(config.seed)
    model = Transformer(
        config.model, training.vocabulary, config.latent_tokens, config.superposition.position_weights
    ).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer.weight_decay), betas=(0.9, 0.95), fused=True)

    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.json")
    environment = {
        "tst_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": training.vocabulary,
        "switch_step": schedule.switch_step,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")

    data_tokens = 0
    start = logged = time.perf_counter()
    tokens_logged = 0
    val_loss = math.nan
    bar = tqdm(range(config.steps), disable=not progress, unit="step", mininterval=1.0, dynamic_ncols=True)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as metrics:
        for step in bar:
            # Equal FLOPs: in the superposition phase a sequence has s times more tokens, and as many positions.
            bag_size = schedule.bag_size_at(step)
            ids, labels = training.batch(config.seed, step, config.batch, config.latent_tokens * bag_size)
            data_tokens += ids.numel()
            if bag_size > 1:
                ids, labels = fold_inputs(ids, bag_size), fold_labels(labels, bag_size, shifted=True)

            lr = learning_rate(config.optimizer, config.steps, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = model(ids.to(device), labels.to(device))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()

            last = step + 1 == config.steps
            if last or (step + 1) % config.log_every == 0:
                value = loss.item()
                if not math.isfinite(value):
                    raise UserError(f"step {step}: the loss is {value}; a lower learning rate or clip may help")
                now = time.perf_counter()
                # Since the last line: a mean over the run would mix the phases, whose speeds differ s times.
                speed = (data_tokens - tokens_logged) / (now - logged)
                logged, tokens_logged = now, data_tokens
                phase = "superposition" if step < schedule.switch_step else "recovery"
                line = {"step": step + 1, "phase": phase, "loss": value, "lr": lr, "grad_norm": norm.item()}
                progressed = {
                    "data_tokens": data_tokens,
                    "seconds": round(now - start, 3),
                    "tokens_per_s": round(speed),
                }
                metrics.write(json.dumps({**line, **progressed}) + "\n")
                bar.set_postfix_str(f"{phase} loss {value:.3f} lr {lr:.1e} val {val_loss:.3f} {speed:,.0f} tokens/s")
            if last or (step + 1) % config.eval_every == 0:
                val_loss = validate(model, held_out, config, device)
                if not math.isfinite(val_loss):
                    raise UserError(f"step {step}: the held-out loss is {val_loss}; a lower learning rate may help")
                metrics.write(json.dumps({"step": step + 1, "val_loss": val_loss}) + "\n")
                logged, tokens_logged = time.perf_counter(), data_tokens  # validation is no training time

    result = {
        "steps": config.steps,
        "switch_step": schedule.switch_step,
        "data_tokens": data_tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "val_loss": val_loss,
    }
    torch.save(model.state_dict(), folder / "model.pt")
    plot_run(folder)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
