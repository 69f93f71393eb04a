"""A whole step of the reference trainer in the superposition phase, over one of the baseline with the same FLOPs."""

import torch

from conftest import DEVICE, zipf_ids
from tst_ext import fold_inputs, fold_labels
from tst_ext.train.config import ModelConfig, OptimizerConfig
from tst_ext.train.model import Transformer
from tst_ext.train.optimizer import parameter_groups

BATCH, LENGTH, BAG_SIZE, VOCABULARY = 8, 64, 4, 4096  # the trainer's defaults


def test_superposition_step(race):
    config = OptimizerConfig()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(), VOCABULARY, LENGTH).to(DEVICE)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step(bag_size):
        tokens = zipf_ids((BATCH, LENGTH * bag_size + 1), VOCABULARY)

        def run():
            ids, labels = tokens[:, :-1], tokens[:, 1:]
            if bag_size > 1:
                ids, labels = fold_inputs(ids, bag_size), fold_labels(labels, bag_size, shifted=True)
            model(ids, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()

        return run

    race(
        step(BAG_SIZE),
        {},
        {"baseline step": step(1)},
        rounds=50,
        op="training step",
        shape=f"{BATCH}x{LENGTH} latent tokens, V {VOCABULARY}",
        s=BAG_SIZE,
        dtype="float32",
    )
