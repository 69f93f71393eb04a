"""Whole steps of the reference model: a superposition step over one of the baseline with the same FLOPs, a step whose
positions have several labels over a next-token step, and that next to the same model in other code.
"""

import pytest
from steps import SHAPES, contenders, reference, step

from conftest import DEVICE, zipf_ids
from tst_ext import _C, fold_inputs, fold_labels, position_weights, slide_labels

BAG_SIZE = 4
ROUNDS = {"default": 50, "larger": 6}
# Of the loss of the third step, which holds two updates. Rounding changes it by 1e-7 in float32 and 5e-6 in bfloat16.
# Rotary angles of the other sign change it by 8e-6, a model without attention, another eps or one label less per
# sequence by 5e-5 or more.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-5}


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("quick")
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", ["default"] if quick else SHAPES)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", ["float32"] if quick else TOLERANCE)


def facts(shape, s, dtype="float32"):
    _, vocabulary, batch, length = SHAPES[shape]
    return dict(shape=f"{batch}x{length} latent tokens, V {vocabulary}", s=s, dtype=dtype, rounds=ROUNDS[shape])


def test_superposition_step(race):
    config, vocabulary, batch, length = SHAPES["default"]
    model = reference(config, vocabulary, length, DEVICE)

    def loss(bag_size):
        tokens = zipf_ids((batch, length * bag_size + 1), vocabulary)

        def run():
            ids, labels = tokens[:, :-1], tokens[:, 1:]
            if bag_size > 1:
                ids, labels = fold_inputs(ids, bag_size), fold_labels(labels, bag_size, shifted=True)
            return model(ids, labels)

        return run

    ours, baseline = (silent(step(model, loss(s), DEVICE)) for s in (BAG_SIZE, 1))
    race(ours, {}, {"baseline step": baseline}, op="training step", **facts("default", BAG_SIZE))


def test_next_tokens_step(race, shape):
    """Output-only superposition, annealed: the model reads tokens, and each position predicts the next s."""
    config, vocabulary, batch, length = SHAPES[shape]
    model = reference(config, vocabulary, length, DEVICE)
    tokens = zipf_ids((batch, length + 1), vocabulary)
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    weights = position_weights("annealed", BAG_SIZE, progress=0.5, device=DEVICE)

    def several():
        return model(ids, slide_labels(labels, BAG_SIZE, shifted=True), position_weights=weights)

    ours, one = (silent(step(model, loss, DEVICE)) for loss in (several, lambda: model(ids, labels)))
    op = "training step, s labels per position"
    race(ours, {}, {"next-token step": one}, op=op, **facts(shape, BAG_SIZE))


def silent(run):
    """One model takes both steps, so their losses are not to be compared."""
    return lambda: run() and None


def test_step_next_to_other_code(race, shape, dtype):
    if dtype == "bfloat16" and DEVICE.type == "cpu" and not _C.cpu_bfloat16_gemms():
        pytest.skip("this CPU has no instructions for bfloat16")
    config, vocabulary, batch, length = SHAPES[shape]
    tokens = zipf_ids((batch, length + 1), vocabulary)
    ours, peers = contenders(config, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), vocabulary, dtype)
    for run in (ours, *peers.values()):
        if callable(run):
            run(), run()  # the race compares the losses of the third
    op = "training step of one model"
    race(ours, peers, {}, tolerance=TOLERANCE[dtype], op=op, **facts(shape, 1, dtype))
