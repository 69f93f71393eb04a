"""The loss of a head whose rows are divided among 2 and 3 processes, beside the same call in one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tst_ext
from helpers.cases import IGNORE, fused, generator, loss_and_gradients, loss_case, magnitudes, plain, some_weights
from helpers.model import OPTIONS, step
from helpers.numerics import assert_accurate
from helpers.processes import in_processes, needs_gloo
from tst_ext import linear_multi_hot_cross_entropy
from tst_ext.nn import LinearMultiHotCrossEntropy

ROWS, DIM, VOCABULARY, BAG = 14, 16, 29, 3
EPS = torch.finfo(torch.float32).eps
SHARDS = {2: (20, 9), 3: (3, 0, 26)}  # uneven, and one without a row


def own_rows(rank):
    sizes = SHARDS[dist.get_world_size()]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def check_case(case, rank, upstream=1.3, **options):
    """Loss and gradients of the shards are as close to float64 as those of one process."""
    hidden, weight, bias, labels = case
    own, group = own_rows(rank), dist.group.WORLD
    shard = None if bias is None else bias[own]
    mine = loss_and_gradients(fused, hidden, weight[own], shard, labels, upstream, tp_group=group, **options)
    one = loss_and_gradients(fused, hidden, weight, bias, labels, upstream, **options)
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    exact = loss_and_gradients(plain, *wide, labels, upstream, **options)
    sizes = magnitudes(*wide, labels, upstream, options)
    terms = max(ROWS, DIM, VOCABULARY)
    for i, (a, wanted, other, size) in enumerate(zip(mine, exact, one, sizes, strict=True)):
        part = own if i > 1 else slice(None)  # of the gradients of weight and bias
        if a.dim():
            wanted, other, size = wanted[part], other[part], size[part] if size.dim() else size
        assert a.dtype == other.dtype
        assert_accurate(a, wanted, other, terms, size)


ALL = {
    **{name: options for name, options in OPTIONS.items() if not {"return_lse", "return_z_loss"} & options.keys()},
    "none_mce_alt": dict(objective="mce_alt", reduction="none", label_smoothing=0.1, z_loss=1e-2),
    "label_weights": dict(label_weights=some_weights, bias=True, z_loss=1e-2, label_smoothing=0.1, chunk_size=5),
    "none_label_weights": dict(label_weights=some_weights, reduction="none", position_weights="power_law"),
    "softcap_alt": dict(objective="mce_alt", logit_softcap=3.0, normalizer=11, chunk_size=1),
}


def check_options(rank):
    for options in ALL.values():
        options = dict(options)
        bias = options.pop("bias", False)
        upstream = 1.3
        if options.get("reduction") == "none":
            upstream = torch.randn(ROWS, dtype=torch.float64, generator=generator(7))
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            case = loss_case(ROWS, DIM, VOCABULARY, BAG, dtype, "cpu", bias=bias)
            check_case(case, rank, upstream, **options)


def check_hard_cases(rank):
    hidden, weight, bias, labels = loss_case(ROWS, DIM, VOCABULARY, BAG, torch.float32, "cpu", bias=True)
    # Labels ignored by a number that is a token, by all processes, or in whole rows; other integers.
    check_case((hidden, weight, bias, labels.clamp_min(0)), rank, ignore_index=1)
    check_case((hidden, weight, bias, labels.int()), rank)
    check_case((hidden, weight, bias, labels.index_fill(0, torch.arange(5), IGNORE)), rank, z_loss=0.1)
    nothing = loss_and_gradients(
        fused, hidden, weight[own_rows(rank)], None, torch.full_like(labels, IGNORE), tp_group=dist.group.WORLD
    )
    assert all(not t.any() for t in nothing)
    # Entries out of the vocabulary, one process's all.
    masked = bias.clone()
    masked[own_rows(dist.get_world_size() - 1)] = -torch.inf
    masked[0] = -torch.inf
    inside = torch.where(labels == IGNORE, IGNORE, 1 + labels % (SHARDS[dist.get_world_size()][0] - 1))
    own = own_rows(rank)
    for options in ({}, dict(label_smoothing=0.2)):
        one = loss_and_gradients(fused, hidden, weight, masked, inside, **options)
        mine = loss_and_gradients(fused, hidden, weight[own], masked[own], inside, tp_group=dist.group.WORLD, **options)
        for a, b in zip(mine, (one[0], one[1], one[2][own], one[3][own]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    # Labels all out of the vocabulary: an infinite loss, but not a NaN in the gradient that one process does not have.
    for options in (dict(objective="mce_alt"), dict(objective="mce_alt", reduction="none")):
        upstream = 1.3 if len(options) == 1 else torch.zeros(ROWS)
        gone = torch.where(torch.arange(ROWS) == 3, 0, inside.T).T.contiguous()  # token 0 is masked
        one = loss_and_gradients(fused, hidden, weight, masked, gone, upstream, **options)
        mine = loss_and_gradients(
            fused, hidden, weight[own], masked[own], gone, upstream, tp_group=dist.group.WORLD, **options
        )
        for a, b in zip(mine, (one[0], one[1], one[2][own], one[3][own]), strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
    # Rows that are sure of their labels, 1 - p from 7e-7 to 1e-3. Only one label, or p could not be near 1.
    sure = torch.randn(ROWS, DIM, generator=generator(3))
    sure = sure / sure.norm(dim=1, keepdim=True)
    heads = torch.cat([sure, -sure, sure[:1] * 0])[:VOCABULARY] * 24
    # Their gradient is what the other shards have, which the rounding of both lse, near 24, reaches besides.
    ids = torch.arange(ROWS).unsqueeze(1)
    exact = loss_and_gradients(plain, sure.double(), heads.double(), None, ids)
    one = loss_and_gradients(fused, sure, heads, None, ids)
    mine = loss_and_gradients(fused, sure, heads[own], None, ids, tp_group=dist.group.WORLD)
    for i, (a, wanted, other) in enumerate(zip(mine, exact, one, strict=True)):
        part = own if i > 1 else ...
        allowed = 1.1 * (other - wanted)[part].norm() + 2 * EPS * 24 * wanted[part].norm()
        assert (a - wanted[part]).norm() <= allowed, ((a - wanted[part]).norm(), allowed, wanted[part].norm())
    # Logits of 1e4: shares of two processes are compared in float32, whose step there is 1e-3.
    far = (hidden, weight, bias + 1e4, labels)
    one = loss_and_gradients(fused, *far)
    mine = loss_and_gradients(fused, hidden, weight[own], far[2][own], labels, tp_group=dist.group.WORLD)
    for a, b in zip(mine, (one[0], one[1], one[2][own], one[3][own]), strict=True):
        assert (a - b).norm() <= 2 * EPS * 1e4 * max(b.norm(), 1e-3)


def check_new_memory(rank):
    """Shards whose GEMMs read past the last row, where new memory holds NaN."""
    world = dist.get_world_size()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight, _, labels = loss_case(36, 64, 35 * world, BAG, dtype, "cpu")
            own = slice(35 * rank, 35 * rank + 35)
            mine = loss_and_gradients(fused, hidden, weight[own], None, labels, tp_group=dist.group.WORLD)
            one = loss_and_gradients(fused, hidden, weight, None, labels)
            for a, b in zip(mine, (one[0], one[1], one[2][own]), strict=True):
                assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()
    finally:
        torch.use_deterministic_algorithms(False)


def check_lse_and_z_loss(rank):
    own = own_rows(rank)
    hidden, weight, bias, labels = loss_case(ROWS, DIM, VOCABULARY, BAG, torch.float64, "cpu", bias=True)
    upstream = torch.randn(ROWS, dtype=torch.float64, generator=generator(7))
    for reduction in ("mean", "none"):
        options = dict(return_lse=True, return_z_loss=True, z_loss=0.1, reduction=reduction)
        results = []
        for part, group in ((slice(None), None), (own, dist.group.WORLD)):
            leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight[part], bias[part])]
            total = step(lambda h, y: fused(h, *leaves[1:], y, tp_group=group, **options), leaves[0], labels, upstream)  # noqa: B023
            results.append([total.detach(), *torch.autograd.grad(total, leaves)])
        one = [results[0][0], results[0][1], results[0][2][own], results[0][3][own]]
        for a, b in zip(results[1], one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def check_sequence_parallel(rank):
    """Hidden is a part of the sequence, and so is its gradient."""
    world, own = dist.get_world_size(), own_rows(rank)
    hidden, weight, bias, labels = loss_case(2 * 6, DIM, VOCABULARY, BAG, torch.float64, "cpu", bias=True)
    hidden, labels = hidden.view(2, 6, DIM), labels.view(2, 6, BAG)
    part = slice(rank * 6 // world, (rank + 1) * 6 // world)
    for reduction, upstream in (
        ("mean", 1.3),
        ("none", torch.randn(2, 6, dtype=torch.float64, generator=generator(1))),
    ):
        one = loss_and_gradients(fused, hidden, weight, bias, labels, upstream, reduction=reduction)
        options = dict(tp_group=dist.group.WORLD, sequence_parallel=True, reduction=reduction)
        mine_only = hidden[:, part].transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
        mine = loss_and_gradients(fused, mine_only, weight[own], bias[own], labels, upstream, **options)
        for a, b in zip(mine, (one[0], one[1][:, part], one[2][own], one[3][own]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"labels: expected \(2, 6\).*got shape \(2, 2"):
        linear_multi_hot_cross_entropy(
            hidden[:, part], weight[own], labels[:, :2], tp_group=dist.group.WORLD, sequence_parallel=True
        )


def check_exchanges(rank):
    """A few numbers a row are exchanged, and hidden's gradient: neither logits nor anything that grows with the bag."""
    sizes, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **options: (
        sizes.append(tensor.numel()),
        all_reduce(tensor, *args, **options),
    )
    try:
        for bag in (1, 8):
            sizes.clear()
            hidden, weight, _, labels = loss_case(ROWS, DIM, VOCABULARY, bag, torch.float32, "cpu")
            loss_and_gradients(fused, hidden, weight[own_rows(rank)], None, labels, tp_group=dist.group.WORLD)
            assert sizes == [ROWS, 2 * ROWS, ROWS * DIM]
    finally:
        dist.all_reduce = all_reduce


def check_inside_torch(rank):
    """Modules, autocast, no_grad and torch.compile, which breaks the graph there."""
    own = own_rows(rank)
    hidden, weight, _, labels = loss_case(ROWS, DIM, VOCABULARY, BAG, torch.float32, "cpu")
    head = LinearMultiHotCrossEntropy(DIM, own.stop - own.start, tp_group=dist.group.WORLD)
    head.weight = torch.nn.Parameter(weight[own].clone())
    loss = head(hidden, labels)
    torch.testing.assert_close(loss, fused(hidden, weight, None, labels), rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(head(hidden, labels), loss)
    compiled = torch.compile(lambda h, y: 2 * head(h + 0, y), backend="eager")
    assert torch.equal(compiled(hidden, labels), 2 * loss)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(hidden, labels)
        torch.testing.assert_close(low, fused(hidden, weight, None, labels), rtol=1e-6, atol=0)
    low.backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.shape == head.weight.shape


def check_one_row(rank):
    """No batch dimension: hidden [d], labels []."""
    own, group = own_rows(rank), dist.group.WORLD
    hidden, weight, _, labels = loss_case(1, DIM, VOCABULARY, 1, torch.float64, "cpu", ignored=0)
    whole = linear_multi_hot_cross_entropy(hidden[0], weight, labels[0, 0])
    divided = linear_multi_hot_cross_entropy(hidden[0], weight[own], labels[0, 0], tp_group=group)
    torch.testing.assert_close(divided, whole)


def check_errors(rank):
    own, group = own_rows(rank), dist.group.WORLD
    hidden, weight, _, labels = loss_case(ROWS, DIM, VOCABULARY, BAG, torch.float32, "cpu")
    for bad in (VOCABULARY, -1):
        wrong = labels.clone()
        wrong[3, 1] = bad
        with pytest.raises(
            IndexError, match=rf"labels\[3, 1\] = {bad} is out of range: expected 0 <= id < {VOCABULARY}"
        ):
            linear_multi_hot_cross_entropy(hidden, weight[own], wrong, tp_group=group)
    with pytest.raises(ValueError, match="^sequence_parallel: only with tp_group"):
        linear_multi_hot_cross_entropy(hidden, weight, labels, sequence_parallel=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(TypeError, match=r"^tp_group: expected .*ProcessGroup: mesh.get_group\(\).*got DeviceMesh"):
        linear_multi_hot_cross_entropy(hidden, weight[own], labels, tp_group=mesh)
    with pytest.raises(TypeError, match=r"^tp_group: expected .*ProcessGroup, got str"):
        linear_multi_hot_cross_entropy(hidden, weight[own], labels, tp_group="tp")
    first = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="^tp_group: expected a group that this process is in"):
            linear_multi_hot_cross_entropy(hidden, weight, labels, tp_group=first)
    else:  # a group of one process is the ordinary loss
        torch.testing.assert_close(
            linear_multi_hot_cross_entropy(hidden, weight, labels, tp_group=first),
            tst_ext.linear_multi_hot_cross_entropy(hidden, weight, labels),
            rtol=1e-6,
            atol=0,
        )


CHECKS = (
    check_options,
    check_hard_cases,
    check_new_memory,
    check_lse_and_z_loss,
    check_sequence_parallel,
    check_exchanges,
    check_inside_torch,
    check_one_row,
    check_errors,
)


def check_all(rank):
    for check in CHECKS:  # in one start of the processes, which takes longer than the checks
        try:
            check(rank)
        except Exception as error:
            error.add_note(f"in {check.__name__}")
            raise


@needs_gloo
@pytest.mark.parametrize("world", SHARDS)
def test_vocabulary_parallel(world, tmp_path):
    in_processes(world, check_all, tmp_path)
