"""Runs of TorchTitan's trainer on the CPU, for test_torchtitan.py: `torchrun ... titan_run.py CHECK FOLDER`.

TorchTitan 0.3 takes a GPU for granted, and functions of torch later than 2.13. What it calls of both on the way is
given here; FSDP2's reduction by a factor of 1, which gloo does not have, becomes a sum.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._utils
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, embedding

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda *_: "cpu"
torch.cpu.get_device_properties = lambda *_: SimpleNamespace(total_memory=1 << 40)
torch.cpu.memory_stats = lambda *_: {}
torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda *_: None
torch.cpu.current_device = lambda: 0
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = lambda *_: None


sys.path.insert(0, str(Path(__file__).parents[1]))

import torchtitan.distributed.fsdp  # noqa: E402
import torchtitan.trainer  # noqa: E402
from torchtitan.components.loss import IGNORE_INDEX  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import config_registry as llama3  # noqa: E402
from torchtitan.models.qwen3 import config_registry as qwen3  # noqa: E402

from helpers.processes import leave  # noqa: E402
from tst_ext.integrations.torchtitan import superpose  # noqa: E402

FOLDER = Path(sys.argv[2])
without_division = torchtitan.distributed.fsdp.disable_fsdp_gradient_division


def without_division_by_gloo(model):
    without_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


torchtitan.distributed.fsdp.disable_fsdp_gradient_division = without_division_by_gloo
LENGTH, STEPS = 32, 6
torchtitan.trainer.time.sleep = lambda seconds: None  # two seconds at the end of each run


def config_of(family="llama3", backend="spmd_types", tp=1, folder=None, save=None, steps=STEPS, warmup=2):
    config = dict(llama3=llama3.llama3_debugmodel, qwen3=qwen3.qwen3_debugmodel)[family]()
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for _, _, parent, name in list(model.traverse(FlexAttention.Config)):  # which trains on a GPU alone
        setattr(parent, name, ScaledDotProductAttention.Config())
    config.hf_assets_path, config.dataloader.dataset_path = str(FOLDER / "assets"), str(FOLDER / "data")
    config.dump_folder = str(folder or FOLDER / "none")
    config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, LENGTH, steps
    config.training.mixed_precision_param, config.training.disable_cuda_graphs = "float32", True
    config.parallelism.spmd_backend, config.parallelism.tensor_parallel_degree = backend, tp
    config.debug.seed = 0
    config.checkpoint.enable = save is not None
    if save is not None:
        config.checkpoint.interval, config.checkpoint.enable_first_step_checkpoint = save, False
    return config


def tst(config, bag_size=4, ratio=0.5, **loss):
    return superpose(config, bag_size=bag_size, ratio=ratio, **loss)


def run(config):
    """Loss and gradient norm of each step, and the trainer."""
    trainer, log = config.build(), []
    trainer.metrics_processor.log = lambda step, loss, most, norm, **_: log.append((step, loss, norm))
    trainer.train()
    trainer.close()
    return log, trainer


def close(a, b, tolerance=1e-5):
    assert [step for step, *_ in a] == [step for step, *_ in b], (a, b)
    for (step, *x), (_, *y) in zip(a, b, strict=True):
        assert all(math.isclose(p, q, rel_tol=tolerance) for p, q in zip(x, y, strict=True)), (step, x, y)


def parameters(trainer):
    return {
        name.replace("_checkpoint_wrapped_module.", ""): (p.full_tensor() if hasattr(p, "full_tensor") else p)
        .detach()
        .clone()
        for name, p in trainer.model_parts[0].named_parameters()
    }


def check_bags_of_one():
    """Without bags, TorchTitan's own numbers, the logits chunk by chunk and all at once."""
    for family in ("llama3", "qwen3"):
        own, plain = run(config_of(family, steps=3))
        ours, trainer = run(tst(config_of(family, steps=3), bag_size=1))
        close(ours, own)
        mine, others = parameters(trainer), parameters(plain)
        assert mine.keys() == others.keys()
        for name, p in others.items():  # Adam divides by gradients, and rounding decides where they are near 0
            assert (mine[name] - p).norm() <= 1e-4 * p.norm(), name


def check_two_phases():
    """A run, the same from checkpoints of either phase, and from that of the switch by TorchTitan's own trainer."""
    whole, trainer = run(tst(config_of(folder=FOLDER / "whole", save=1)))
    assert [step for step, *_ in whole] == list(range(1, STEPS + 1))
    # Logits of a fresh head have a variance of 1, and the text some 40 tokens: 0.5 more than log V, give or take 0.5.
    assert abs(whole[0][1] - math.log(2048) - 0.5) < 1
    assert whole[2][1] < whole[0][1] - 1 and whole[5][1] < whole[3][1] - 0.5
    assert trainer.ntokens_seen == 2 * LENGTH * (3 * 4 + 3)
    for name, last, make in (
        ("superposition", 2, tst),
        ("recovery", 4, tst),
        ("switch", 3, lambda config: config),  # TorchTitan's own trainer and loss
    ):
        folder = FOLDER / name
        shutil.copytree(FOLDER / "whole/checkpoint" / f"step-{last}", folder / "checkpoint" / f"step-{last}")
        again, other = run(make(config_of(folder=folder, save=100)))
        close(again, whole[last:], 1e-5 if make is tst else 1e-4)
        assert type(other).__name__ == ("SuperpositionTrainer" if make is tst else "Trainer")
        assert other.ntokens_seen == trainer.ntokens_seen


def check_qwen3():
    """Tied weights get the gradients of both ends."""
    config = tst(config_of("qwen3"), position_weights="power_law", z_loss=1e-4)
    assert config.model_spec.model.enable_weight_tying
    log, trainer = run(config)
    assert log[2][1] < log[0][1] and log[5][1] < log[3][1]
    model = trainer.model_parts[0]
    assert model.tok_embeddings.weight is model.lm_head.weight


def check_sums():
    """The trainer's gradients are those of the batch written out: mean of embeddings, full logits, s losses."""
    check_gradients("llama3", "spmd_types")
    alternatives, _ = run(
        tst(config_of(steps=1), ratio=1.0, objective="mce_alt")
    )  # one loss a bag, of four labels together
    assert abs(alternatives[0][1] - math.log(2048 / 4)) < 1, alternatives


def check_validation():
    """The next-token loss that TorchTitan's own trainer reports, in the superposition phase too, without z-loss."""
    found = []
    for make in (lambda config: config, lambda config: tst(config, z_loss=1e-2)):
        config = config_of(steps=2)
        config.optimizer = default_adamw(lr=0.0)
        config.validator = Validator.Config(enable=True, freq=1, steps=2, dataloader=config.dataloader)
        trainer = make(config).build()
        trainer.metrics_processor.log_validation = lambda loss, step: found.append(loss)
        trainer.train()
        trainer.close()
    assert len(found) == 4 and all(math.isclose(loss, found[0], rel_tol=1e-5) for loss in found), found


def check_models_without_our_modules():
    for name in ("tok_embeddings", "lm_head"):
        config = tst(config_of())
        setattr(config.model_spec.model, name, getattr(config_of().model_spec.model, name))
        with pytest.raises(ValueError, match=f"^model_spec.model.{name}: expected a "):
            config.build()


def check_fsdp():
    for family in ("llama3", "qwen3"):
        own, _ = run(config_of(family, "partial_dtensor", steps=3))
        ours, _ = run(tst(config_of(family, "partial_dtensor", steps=3), bag_size=1))
        close(ours, own)
        check_gradients(family, "partial_dtensor")


def check_gradients(family, backend, tp=1, sequence_parallel=True):
    config = config_of(family, backend, tp)
    config.parallelism.enable_sequence_parallel = sequence_parallel
    trainer = tst(config).build()
    trainer.dataset.seq_len = 4 * LENGTH
    inputs, labels = next(trainer.batch_generator(trainer.dataloader))
    batches = [None] * dist.get_world_size()
    dist.all_gather_object(batches, (inputs["input"], inputs["positions"], labels))
    batches = batches[::tp]  # the processes of one tensor-parallel group share theirs
    assert labels.shape == (2, LENGTH, 4) and inputs["positions"].shape == (2, LENGTH)
    valid = sum((y != IGNORE_INDEX).sum() for *_, y in batches)
    loss = trainer.forward_backward_step(input_dict=dict(inputs), labels=labels, global_valid_tokens=valid).detach()
    dist.all_reduce(loss)
    loss /= tp

    plain = config_of(family).model_spec.model
    plain.update_from_config(config=config_of(family))
    model = plain.build()
    model.init_states()
    missing, unknown = model.load_state_dict(parameters(trainer), strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}  # where tied, by its other name
    total = 0
    for ids, positions, y in batches:
        hidden = embedding(ids, model.tok_embeddings.weight).mean(2)
        model.tok_embeddings.forward = lambda _, hidden=hidden: hidden
        logits = model(ids, positions=positions)
        for i in range(4):
            total = total + cross_entropy(logits.flatten(0, 1), y[..., i].flatten(), reduction="sum")
    (total / valid).backward()
    assert math.isclose(loss, total / valid, rel_tol=1e-5), (loss, total / valid)
    for (name, p), q in zip(model.named_parameters(), trainer.model_parts[0].parameters(), strict=True):
        gradient = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
        assert (gradient - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    trainer.close()


def check_tensor_parallel():
    """Vocabulary-parallel embedding, head and loss; then, from a checkpoint of one process, both phases beside it."""
    for sequence_parallel in (True, False):
        for family in ("llama3", "qwen3"):
            check_gradients(family, "partial_dtensor", 2, sequence_parallel)
        folder = FOLDER / f"tp-{sequence_parallel}"
        config = tst(config_of(backend="partial_dtensor", tp=2, folder=folder, save=100))
        config.parallelism.enable_sequence_parallel = sequence_parallel
        log, _ = run(config)
        # Not the norms: torch's of a long float32 tensor errs by 2e-4 on the CPU, by less on a shard of it.
        close([entry[:2] for entry in log], json.loads((FOLDER / "one.json").read_text()))


def write_one():
    log, _ = run(tst(config_of(folder=FOLDER / "one", save=1)))
    (FOLDER / "one.json").write_text(json.dumps([entry[:2] for entry in log[1:]]))
    for name in ("tp-True", "tp-False"):
        shutil.copytree(FOLDER / "one/checkpoint/step-1", FOLDER / name / "checkpoint/step-1")


ONE = (
    check_bags_of_one,
    check_two_phases,
    check_qwen3,
    check_sums,
    check_validation,
    check_models_without_our_modules,
    write_one,
)
TWO = (check_fsdp, check_tensor_parallel)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in dict(one=ONE, two=TWO)[sys.argv[1]]:
        check()
        sys.stdout.write(f"passed: {check.__name__}\n")  # at once: print's several writes mix with the other process's
        sys.stdout.flush()
    dist.barrier()
    leave()
