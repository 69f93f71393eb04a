"""A whole training loop through both phases, on the source of Python's standard library.

    pip install '.[train]'
    python examples/plain_loop.py [--steps 2000] [--bag-size 2] [--ratio 0.3]

The extra is for the corpus: it is tokenised once and kept in ~/.cache/tst-ext. --ratio 0 is the baseline, which with so
few steps is ahead (3.43 against 3.56 nats): examples/tst.ipynb shows from where on TST pays.
"""

import argparse

import torch
from torch import nn

from tst_ext import SuperpositionSchedule, fold_inputs, fold_labels
from tst_ext.nn import BagEmbedding, LinearMultiHotCrossEntropy
from tst_ext.train.config import DataConfig
from tst_ext.train.data import Shard
from tst_ext.train.prepare import prepared_folder

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--bag-size", type=int, default=2)
parser.add_argument("--ratio", type=float, default=0.3)
parser.add_argument("--held-out-tokens", type=int, default=131072)
args = parser.parse_args()
BATCH, LATENT, DIM = 8, 64, 96  # sequences a step, positions a sequence in either phase, hidden size

corpus = prepared_folder(DataConfig(vocabulary=1024))
training, held_out = Shard(corpus, "train"), Shard(corpus, "val")
torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = BagEmbedding(vocabulary, DIM)  # in place of nn.Embedding
        self.positions = nn.Embedding(LATENT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 3, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = LinearMultiHotCrossEntropy(DIM, vocabulary)  # in place of nn.Linear and the cross-entropy
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LATENT))

    def forward(self, ids, labels):  # [B, l] tokens or [B, l, s] bags
        x = self.embedding(ids) + self.positions.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True), labels)


@torch.no_grad()
def validate():  # next-token loss, in both phases
    losses = [model(ids, labels) for ids, labels in held_out.windows(args.held_out_tokens, 32, LATENT)]
    return torch.stack(losses).mean().item()


model = Model(training.vocabulary)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1)
schedule = SuperpositionSchedule(args.steps, args.ratio, args.bag_size)

for step in range(args.steps):
    s = schedule.bag_size_at(step)
    ids, labels = training.batch(
        seed=0, step=step, batch=BATCH, length=s * LATENT
    )  # labels[t] is the token after ids[t]
    if s > 1:
        ids, labels = fold_inputs(ids, s), fold_labels(labels, s, shifted=True)
    loss = model(ids, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if (step + 1) % 100 == 0 or step + 1 in (schedule.switch_step, args.steps):
        print(f"step {step + 1:5}  bag size {s}  training loss {loss.item():.3f}", flush=True)
    if step + 1 in (schedule.switch_step, args.steps):
        print(f"step {step + 1:5}  held-out next-token loss {validate():.3f}", flush=True)
