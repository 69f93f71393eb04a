"""The ops on two processes: FSDP2, and DTensors refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from helpers.cases import IGNORE
from helpers.model import BAG, DIM, VOCABULARY, Model, batch, leaves, normal, tokens
from helpers.processes import in_processes, needs_gloo
from tst_ext import bag_embedding, linear_multi_hot_cross_entropy, multi_hot_cross_entropy

WORLD = 2


def check_fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (WORLD,))
    ids, labels = batch(rows=6)
    share = slice(0, 2) if rank == 0 else slice(2, 6)  # unequal shares, where the mean of the ranks' means is wrong
    valid = int((labels != IGNORE).sum())
    options = dict(bias=True, z_loss=1e-2)
    whole = Model(**options)
    loss = whole(ids, labels, normalizer=valid)
    loss.backward()

    sharded = Model(**options)
    for module in (sharded.embedding, sharded.body, sharded.head, sharded):
        fully_shard(module, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    sharded.head.set_unshard_in_backward(False)
    seen = []  # the head's weight while the loss is computed
    sharded.head.register_forward_pre_hook(lambda head, _: seen.append(head.weight))  # FSDP's own comes before it
    # FSDP averages the gradients of the ranks; the gradient of the whole batch is their sum. With WORLD times less as
    # the divisor each rank's gradient is WORLD times its part, and the average of those is the sum of the parts.
    part = sharded(ids[share], labels[share], normalizer=valid / WORLD)
    # The whole weight of the head exists during the loss alone: not after it, and not in the backward pass.
    assert not isinstance(seen[0], DTensor) and seen[0].shape == whole.head.weight.shape
    assert isinstance(sharded.head.weight, DTensor)
    assert sharded.head.weight.to_local().numel() < whole.head.weight.numel()
    in_backward = []  # FSDP's hook on the loss, which would gather the weight, comes before this one
    part.register_hook(lambda _: in_backward.append(isinstance(sharded.head.weight, DTensor)))
    part.backward()
    assert in_backward == [True]
    total = part.detach() / WORLD
    dist.all_reduce(total)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        difference = (q.grad.full_tensor() - p.grad).norm()
        assert difference <= 1e-6 * p.grad.norm(), f"{name}: {difference} of {p.grad.norm()}"


def check_dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    hidden, weight, labels = normal(8, DIM), normal(VOCABULARY, DIM, seed=1), tokens(8, BAG)
    for placement in (Shard(0), Shard(1), Replicate()):
        head = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
        with pytest.raises(TypeError, match=r"^weight: .*DTensor.*full_tensor"):
            linear_multi_hot_cross_entropy(hidden, head, labels)
        with pytest.raises(TypeError, match=r"^weight: .*DTensor.*full_tensor"):
            bag_embedding(labels, head)
        with pytest.raises(TypeError, match=r"^logits: .*DTensor.*full_tensor"):
            multi_hot_cross_entropy(head, labels)
        # What the message advises works, and the gradient comes back sharded.
        linear_multi_hot_cross_entropy(hidden, head.full_tensor(), labels).backward()
        (plain,) = leaves(weight)
        linear_multi_hot_cross_entropy(hidden, plain, labels).backward()
        assert head.grad.placements == (placement,)
        assert torch.equal(head.grad.full_tensor(), plain.grad)


@needs_gloo
@pytest.mark.parametrize("function", [check_fsdp, check_dtensor])
def test_two_processes(function, tmp_path):
    in_processes(WORLD, function, tmp_path)
