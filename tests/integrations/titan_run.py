"""Runs of TorchTitan's trainer on the CPU, for test_torchtitan.py: `torchrun ... titan_run.py CHECK FOLDER`.

TorchTitan 0.3 takes a GPU for granted, and functions of torch later than 2.13. What it calls of both on the way is
given here; FSDP2's reduction by a factor of 1, which gloo does not have, becomes a sum. Its experts cast to bfloat16,
whose rounding would hide errors below 1e-2; here they stay in float32.
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
from torch.nn.functional import embedding

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda *_: "cpu"
torch.cpu.get_device_properties = lambda *_: SimpleNamespace(total_memory=1 << 40)
torch.cpu.memory_stats = lambda *_: {}
torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda *_: None
torch.cpu.current_device = lambda: 0
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = lambda *_: None
torch.Tensor.bfloat16 = lambda self: self

sys.path.insert(0, str(Path(__file__).parents[1]))

import torchtitan.distributed.fsdp  # noqa: E402
import torchtitan.trainer  # noqa: E402
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE  # noqa: E402
from torchtitan.models.deepseek_v3 import MTPLoss, model_registry  # noqa: E402
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3  # noqa: E402
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


def two_depths():
    """TorchTitan's config has one depth, with which a second shift and the mean over depths would not be tested."""
    config = deepseek_v3.deepseek_v3_debugmodel_mtp()
    config.model_spec, config.loss = model_registry("debugmodel", num_mtp_layers=2), MTPLoss.Config(mtp_scale=0.5)
    return config


FAMILIES = dict(
    llama3=llama3.llama3_debugmodel,
    qwen3=qwen3.qwen3_debugmodel,
    qwen3_moe=qwen3.qwen3_moe_debug,
    deepseek_v3=deepseek_v3.deepseek_v3_debugmodel,
    deepseek_v3_mtp=two_depths,
)


def config_of(family="llama3", backend="spmd_types", tp=1, ep=1, folder=None, save=None, steps=STEPS):
    config = FAMILIES[family]()
    model = config.model_spec.model
    model.layers = model.layers[:2]  # of DeepSeek-V3 the second has experts
    for _, experts, _, _ in model.traverse(GroupedExperts.Config):
        experts.hidden_dim = 64  # Qwen3's 64 experts have 38 million parameters in each layer
    for _, _, parent, name in list(model.traverse(FlexAttention.Config)):  # which trains on a GPU alone
        setattr(parent, name, ScaledDotProductAttention.Config())
    config.hf_assets_path, config.dataloader.dataset_path = str(FOLDER / "assets"), str(FOLDER / "data")
    config.dump_folder = str(folder or FOLDER / "none")
    config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, LENGTH, steps
    config.training.mixed_precision_param, config.training.disable_cuda_graphs = "float32", True
    config.parallelism.spmd_backend, config.parallelism.tensor_parallel_degree = backend, tp
    config.parallelism.expert_parallel_degree = ep
    config.debug.seed = 0
    config.checkpoint.enable = save is not None
    if save is not None:
        config.checkpoint.interval, config.checkpoint.enable_first_step_checkpoint = save, False
    return config


def tst(config, bag_size=4, ratio=0.5, **loss):
    return superpose(config, bag_size=bag_size, ratio=ratio, **loss)


def run(config):
    """Loss and gradient norm of each step, and the trainer."""
    trainer = config.build()
    return train(trainer), trainer


def train(trainer):
    log = []
    trainer.metrics_processor.log = lambda step, loss, most, norm, **_: log.append((step, loss, norm))
    trainer.train()
    trainer.close()
    return log


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
    for family in FAMILIES:
        own, plain = run(config_of(family, steps=3))
        ours, trainer = run(tst(config_of(family, steps=3), bag_size=1))
        close(ours, own)
        mine, others = parameters(trainer), parameters(plain)
        assert mine.keys() == others.keys()
        for name, p in others.items():  # Adam divides by gradients, and rounding decides where they are near 0
            assert (mine[name] - p).norm() <= 1e-4 * p.norm(), name


def check_two_phases():
    """A run, the same from checkpoints of either phase, and from that of the switch by TorchTitan's own trainer."""
    for family in ("llama3", "qwen3_moe", "deepseek_v3_mtp"):
        whole, trainer = run(tst(config_of(family, folder=FOLDER / family, save=1)))
        assert [step for step, *_ in whole] == list(range(1, STEPS + 1))
        # Logits of a fresh head have a variance of at most 1, and the text some 40 tokens: up to 0.5 more than log V,
        # give or take 0.5. Two depths at 0.5 add a half.
        first = whole[0][1] / (1.5 if family == "deepseek_v3_mtp" else 1)
        assert abs(first - math.log(2048) - 0.5) < 1
        assert whole[2][1] < whole[0][1] - 1 and whole[5][1] < whole[3][1] - 0.3
        assert trainer.ntokens_seen == 2 * LENGTH * (3 * 4 + 3)
        for name, last, make in (
            ("superposition", 2, tst),
            ("recovery", 4, tst),
            ("switch", 3, lambda config: config),  # TorchTitan's own trainer, model and loss
        ):
            folder = FOLDER / f"{family}-{name}"
            copy_checkpoint(family, last, folder)
            again, other = run(make(config_of(family, folder=folder, save=100)))
            close(again, whole[last:], 1e-5 if make is tst else 1e-4)
            assert type(other).__name__ == ("SuperpositionTrainer" if make is tst else "Trainer")
            assert other.ntokens_seen == trainer.ntokens_seen
        (FOLDER / f"{family}.json").write_text(json.dumps([entry[:2] for entry in whole]))  # for check_tensor_parallel


def copy_checkpoint(family, step, folder):
    shutil.copytree(FOLDER / family / "checkpoint" / f"step-{step}", folder / "checkpoint" / f"step-{step}")


def check_routers():
    """They count a bag once, as one row, and each step of both phases moves their biases by TorchTitan's rule."""
    for family in ("qwen3_moe", "deepseek_v3"):
        config = tst(config_of(family))
        config.activation_checkpoint = None  # which runs the routers twice
        trainer = config.build()
        routers = [layer.moe for layer in trainer.model_parts[0].layers.values() if layer.moe_enabled]
        assert len(routers) == (2 if family == "qwen3_moe" else 1)
        step, steps = trainer.optimizers.step, []

        def checked_step(routers=routers, step=step, steps=steps):
            counts = [router.tokens_per_expert_E.clone() for router in routers]
            biases = [router.expert_bias_E.clone() for router in routers]
            step()
            for router, count, bias in zip(routers, counts, biases, strict=True):
                assert count.sum() == 2 * LENGTH * router.router.top_k
                move = router.load_balance_coeff * torch.sign(count.mean() - count)
                torch.testing.assert_close(router.expert_bias_E - bias, move - move.mean(), rtol=0, atol=1e-7)
                assert move.any() and not router.tokens_per_expert_E.any()
            steps.append(counts)

        trainer.optimizers.step = checked_step
        trainer.train()
        trainer.close()
        assert len(steps) == STEPS


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
    check_gradients("deepseek_v3_mtp", "spmd_types")
    alternatives, _ = run(
        tst(config_of(steps=1), ratio=1.0, objective="mce_alt")
    )  # one loss a bag, of four labels together
    assert abs(alternatives[0][1] - math.log(2048 / 4)) < 1, alternatives


def check_validation():
    """The next-token loss that TorchTitan's own trainer reports, in the superposition phase too, without z-loss.

    Without further depths too: TorchTitan's model without them has the same first weights.
    """
    for family, plain in (("llama3", "llama3"), ("deepseek_v3_mtp", "deepseek_v3")):
        found = []
        for name, make in ((plain, lambda config: config), (family, lambda config: tst(config, z_loss=1e-2))):
            config = config_of(name, steps=2)
            for _, experts, _, _ in config.model_spec.model.traverse(MoE.Config):
                experts.load_balance_coeff = None  # moves biases without a learning rate
            config.optimizer = default_adamw(lr=0.0)
            config.validator = Validator.Config(enable=True, freq=1, steps=2, dataloader=config.dataloader)
            trainer = make(config).build()
            trainer.metrics_processor.log_validation = lambda loss, step, found=found: found.append(loss)
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


def check_expert_parallel():
    """Experts divided over the processes of FSDP2: gradients against one process, both phases against whole experts.

    Validations in between leave out the layers of further depths, for which TorchTitan gathers weights ahead.
    """
    for family in ("qwen3_moe", "deepseek_v3_mtp"):
        check_gradients(family, "partial_dtensor", ep=2)
        logs, validations = [], ([], [])
        for ep, found in zip((1, 2), validations, strict=True):
            config = config_of(family, "partial_dtensor", ep=ep, steps=2)
            config.validator = Validator.Config(enable=True, freq=1, steps=1, dataloader=config.dataloader)
            trainer = tst(config).build()
            trainer.metrics_processor.log_validation = lambda loss, step, found=found: found.append((step, loss))
            logs.append(train(trainer))
            experts = trainer.model_parts[0].layers["1"].moe.routed_experts.inner_experts
            assert ("ep" in experts.w1_EFD.device_mesh.mesh_dim_names) == (ep == 2)
        close(*logs)
        close(*validations)


def check_gradients(family, backend, tp=1, ep=1, sequence_parallel=True):
    config = config_of(family, backend, tp, ep)
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
    missing = {name for name in missing if not name.endswith("expert_bias_E")}  # zeros
    assert not unknown and missing <= {"lm_head.weight"}  # where tied, by its other name
    loss_fn = config_of(family).loss.build() if "mtp" in family else CrossEntropyLoss.Config().build()
    total = 0
    for ids, positions, y in batches:
        # TorchTitan's model on numbers of bags, which it shifts for its further depths; it fills up with number 0.
        bags = embedding(ids, model.tok_embeddings.weight).mean(2).flatten(0, 1)
        table = torch.cat((model.tok_embeddings.weight[:1], bags))
        model.tok_embeddings.forward = lambda number, table=table: table[number]
        logits = model(1 + torch.arange(len(bags)).view_as(positions), positions=positions)
        for i in range(4):
            total = total + loss_fn(logits, y[..., i], positions=positions)[0]
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
            check_gradients(family, "partial_dtensor", 2, sequence_parallel=sequence_parallel)
    for family, ep, sequence_parallel in (
        ("llama3", 1, True),
        ("llama3", 1, False),
        ("qwen3_moe", 2, True),  # TorchTitan's expert parallelism takes its sequences divided
        ("deepseek_v3_mtp", 2, True),
    ):
        folder = FOLDER / f"{family}-tp-{sequence_parallel}"
        if dist.get_rank() == 0:
            copy_checkpoint(family, 1, folder)
        dist.barrier()
        config = tst(config_of(family, "partial_dtensor", 2, ep, folder=folder, save=100))
        config.parallelism.enable_sequence_parallel = sequence_parallel
        log, _ = run(config)
        # Not the norms: torch's of a long float32 tensor errs by 2e-4 on the CPU, by less on a shard of it.
        close([entry[:2] for entry in log], json.loads((FOLDER / f"{family}.json").read_text())[1:])


ONE = (
    check_bags_of_one,
    check_two_phases,
    check_routers,
    check_qwen3,
    check_sums,
    check_validation,
    check_models_without_our_modules,
)
TWO = (check_fsdp, check_expert_parallel, check_tensor_parallel)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in dict(one=ONE, two=TWO)[sys.argv[1]]:
        check()
        sys.stdout.write(f"passed: {check.__name__}\n")  # at once: print's several writes mix with the other process's
        sys.stdout.flush()
    dist.barrier()
    leave()
