"""Random cases for the ops, and their results beside float64 and plain torch: shared by the tests of the ops."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers import emulated
from helpers.numerics import assert_accurate
from tst_ext import (
    _C,
    bag_embedding,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
    position_weights,
    reference,
)
from tst_ext.ops.loss import LossOptions, label_scale_of

# Values of fixtures in conftest.py.
KERNELS = ["compiled", "plain_torch", *(["emulated_cuda"] if emulated.LIBRARY else [])]
CAPABILITIES = _C.cpu_capabilities()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORE = -100
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", CUDA] if torch.cuda.is_available() else ["cpu"]


def pairwise(**values):
    """Parametrize by few cases, in which any value of one name meets any value of another.

    Each case is the one that brings most new pairs. The list `fixtures` has the names that are fixtures.
    """
    fixtures = values.pop("fixtures", [])
    every = list(itertools.product(*(range(len(v)) for v in values.values())))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in every}
    left, cases = set().union(*pairs.values()), []
    while left:
        best = max(every, key=lambda case: len(pairs[case] & left))
        left -= pairs[best]
        cases.append(tuple(v[i] for v, i in zip(values.values(), best, strict=True)))
    return pytest.mark.parametrize(tuple(values), cases, indirect=fixtures, ids=_name)


def _name(value):
    return getattr(value, "__name__", str(value))


each_device = pytest.mark.parametrize("device", DEVICES)  # where Hypothesis draws: it refuses fixtures


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf_ids(shape, vocabulary, seed=0):
    """Token ids as frequent as text's: p(k) ~ 1 / k, so that bags repeat tokens."""
    p = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=torch.long)
    return torch.multinomial(p, count, replacement=True, generator=generator(seed)).reshape(shape)


# ---- bag_embedding ---------------------------------------------------------------------------------------------------


def embedding_case(shape, vocabulary, dim, dtype, device, seed=0):
    g = generator(seed)
    ids = zipf_ids(shape, vocabulary, seed).to(device)
    weight = torch.randn(vocabulary, dim, dtype=torch.float64, generator=g).to(device, dtype)
    grad = torch.randn(*shape[:-1], dim, dtype=torch.float64, generator=g).to(device, dtype)
    return ids, weight, grad


def embedding_and_gradient(function, ids, weight, grad, **options):
    weight = weight.detach().clone().requires_grad_()
    out = function(ids, weight, **options)
    (gradient,) = torch.autograd.grad(out, weight, grad)
    return out.detach(), gradient


def plain_embedding(ids, weight, **options):
    if isinstance(options.get("position_weights"), str):
        options["position_weights"] = position_weights(
            options["position_weights"], ids.shape[-1], device=weight.device, dtype=torch.float64
        )
    return reference.bag_embedding(ids, weight, **options)


def check_embedding(ids, weight, grad, **options):
    out, gradient = embedding_and_gradient(bag_embedding, ids, weight, grad, **options)
    exact = embedding_and_gradient(plain_embedding, ids, weight.double(), grad.double(), **options)
    if weight.element_size() > 2:
        plain = embedding_and_gradient(plain_embedding, ids, weight, grad, **options)
    else:  # torch sums gradients in 16 bits, which drifts: float64 rounded once is what to stand beside
        plain = tuple(t.to(weight.dtype) for t in exact)
    assert out.dtype == gradient.dtype == weight.dtype
    assert out.is_contiguous() and gradient.is_contiguous()
    hits = int(torch.bincount(ids[ids >= 0].flatten()).max()) if (ids >= 0).any() else 0
    squares = embedding_and_gradient(plain_embedding, ids, weight.double().square(), grad.double().square(), **options)
    assert_accurate(out, exact[0], plain[0], ids.shape[-1], squares[0].sqrt())
    assert_accurate(gradient, exact[1], plain[1], hits, squares[1].sqrt())


# ---- the loss --------------------------------------------------------------------------------------------------------


def loss_case(rows, dim, vocabulary, bag_size, dtype, device, seed=0, ignored=0.2, bias=False):
    """hidden, weight, bias (or None), labels"""
    g = generator(seed)
    hidden = torch.randn(rows, dim, dtype=torch.float64, generator=g).to(device, dtype)
    weight = (2 * torch.randn(vocabulary, dim, dtype=torch.float64, generator=g) / max(1, dim) ** 0.5).to(device, dtype)
    labels = zipf_ids((rows, bag_size), vocabulary, seed)
    labels[torch.rand(rows, bag_size, generator=g) < ignored] = IGNORE
    b = torch.randn(vocabulary, dtype=torch.float64, generator=g).to(device, dtype) if bias else None
    return hidden, weight, b, labels.to(device)


def some_weights(labels):
    """A value of the option label_weights for any labels: from 0 to 4, a third of them 0."""
    return torch.randint(-2, 5, labels.shape, generator=generator(labels.numel())).clamp_min(0).to(labels.device) / 3


def resolved(options, labels):
    weights = options.get("label_weights")
    return dict(options, label_weights=weights(labels)) if callable(weights) else options


def fused(hidden, weight, bias, labels, **options):
    return linear_multi_hot_cross_entropy(hidden, weight, labels, bias=bias, **resolved(options, labels))


def on_logits(hidden, weight, bias, labels, chunk_size=None, **options):
    return multi_hot_cross_entropy(F.linear(hidden, weight, bias), labels, **resolved(options, labels))


def on_logits_inplace(hidden, weight, bias, labels, chunk_size=None, **options):
    return on_logits(hidden, weight, bias, labels, inplace=True, **options)


def plain(hidden, weight, bias, labels, chunk_size=None, **options):
    options = dict(resolved(options, labels))
    if isinstance(options.get("position_weights"), str):
        options["position_weights"] = position_weights(
            options["position_weights"], labels.shape[-1], device=hidden.device, dtype=torch.float64
        )
    return reference.multi_hot_cross_entropy(F.linear(hidden, weight, bias), labels, **options)


FUNCTIONS = [fused, on_logits, on_logits_inplace]


def loss_and_gradients(function, hidden, weight, bias, labels, upstream=1.0, **options):
    """The loss, and the gradients of hidden, weight and, if there is one, bias. upstream: a number, or one per row."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = function(*leaves, labels, **options)
    if isinstance(upstream, float | int):  # filled on the device: a copy from the host would wait for it
        upstream = torch.full((), upstream, dtype=loss.dtype, device=loss.device)
    upstream = upstream.to(loss).expand_as(loss)
    return loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream)


def magnitudes(hidden, weight, bias, labels, upstream, options):
    """For the loss and hidden's, weight's and bias's gradient the root of the sum of the squares of its terms."""
    ignored, objective = options.get("ignore_index", IGNORE), options.get("objective", "mce")
    reduction = options.get("reduction", "mean")
    row_options = LossOptions(objective=objective, ignore_index=ignored)
    scale = label_scale_of(  # the weight of one label
        labels, hidden, row_options, reduction, options.get("normalizer"), options.get("position_weights"),
        resolved(options, labels).get("label_weights"),
    )  # fmt: skip
    z, cap = F.linear(hidden, weight, bias), options.get("logit_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    valid = labels != ignored
    lse = z.logsumexp(-1, keepdim=True)
    pull = torch.where(valid, scale, 0)
    total = pull.sum(1, keepdim=True) if objective == "mce" else pull.amax(1, keepdim=True)
    loss = total * (lse.abs() + z.abs().amax(1, keepdim=True))
    terms = total * (1 + 2 * options.get("z_loss", 0.0) * lse.abs()) * z.softmax(-1)
    terms = terms + options.get("label_smoothing", 0.0) * total / max(1, z.shape[1])
    terms = terms.scatter_add(1, torch.where(valid, labels, 0), pull)
    terms = terms * torch.as_tensor(upstream, dtype=torch.float64, device=z.device).abs().reshape(-1, 1)
    terms = terms.square()
    parts = (
        loss.squeeze(1) if reduction == "none" else loss.norm(),
        (terms @ weight.square()).sqrt(),
        (terms.T @ hidden.square()).sqrt(),
        terms.sum(0).sqrt(),
    )
    return parts if bias is not None else parts[:3]


def check_loss(hidden, weight, bias, labels, upstream=1.0, function=fused, **options):
    """Loss and gradients are as close to float64 as plain torch's, label columns and the others judged apart."""
    mine = loss_and_gradients(function, hidden, weight, bias, labels, upstream, **options)
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    exact = loss_and_gradients(plain, *wide, labels, upstream, **options)
    beside = loss_and_gradients(plain, hidden, weight, bias, labels, upstream, **options)
    assert mine[0].dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert all(gradient.dtype == hidden.dtype for gradient in mine[1:])
    terms = max(*hidden.shape, *weight.shape, labels.shape[-1])
    sizes = magnitudes(*wide, labels, upstream, options)
    for actual, wanted, other, size in zip(mine, exact, beside, sizes, strict=True):
        assert_accurate(actual, wanted, other, terms, size)
    # At a label p - 1 cancels: an error there would drown in the other columns, and theirs in the labels'.
    target = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    target[labels[labels != options.get("ignore_index", IGNORE)].long()] = True
    for columns in (target, ~target):
        for actual, wanted, other, size in zip(mine[2:], exact[2:], beside[2:], sizes[2:], strict=True):
            assert_accurate(actual[columns], wanted[columns], other[columns], terms, size[columns])
