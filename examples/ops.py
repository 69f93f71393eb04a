"""The two operations called directly: shapes, results beside plain torch, and the tensors that are never formed.

python examples/ops.py [--vocabulary 32768]
"""

import argparse

import torch
import torch.nn.functional as F

from tst_ext import bag_embedding, fold_inputs, fold_labels, linear_multi_hot_cross_entropy, reference

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--vocabulary", type=int, default=32768)
V = parser.parse_args().vocabulary
B, latent, s, d = 4, 256, 6, 256  # sequences, bags a sequence, tokens a bag, hidden size


def show(name, tensor):
    print(f"{name:28} {list(tensor.shape)}, {tensor.dtype}")


def compare(name, ours, plain):
    print(f"{name:28} relative difference {((ours - plain).norm() / plain.norm()).item():.1e}")


torch.manual_seed(0)
stream = torch.randint(V, (B, s * latent + 1))
table = torch.randn(V, d, requires_grad=True)
head = (torch.randn(V, d) / d**0.5).requires_grad_()

bags = fold_inputs(stream[:, :-1], s)
labels = fold_labels(stream[:, 1:], s, shifted=True)  # of the bag after; -100 past the end
show("bags", bags)
show("labels", labels)
print(f"{'last bag of a sequence':28} {labels[0, -1].tolist()}: one label is left")

hidden = bag_embedding(bags, table)  # between the two a transformer would read and write [B, latent, d]
show("bag_embedding", hidden)
rows = 64  # whose logits exist at a time; without chunk_size docs/ops.md, "Memory and time", has the default
loss = linear_multi_hot_cross_entropy(hidden, head, labels, chunk_size=rows)
print(f"{'loss':28} {loss.item():.4f}")
ours = torch.autograd.grad(loss, (table, head))

plain_hidden = reference.bag_embedding(bags, table)
logits = F.linear(plain_hidden, head).flatten(0, 1)
plain_loss = reference.multi_hot_cross_entropy(logits, labels.flatten(0, 1))
print(f"{'loss, plain torch':28} {plain_loss.item():.4f}")
plain = torch.autograd.grad(plain_loss, (table, head))

compare("hidden", hidden, plain_hidden)
compare("loss", loss, plain_loss)
for name, a, b in zip(("gradient of the table", "gradient of the head"), ours, plain, strict=True):
    show(name, a)
    compare(name, a, b)

MiB = 2**20
print(f"{'plain torch forms':28} {[B, latent, s, d]}, {B * latent * s * d * 4 / MiB:.0f} MiB: an embedding a token")
print(
    f"{'':28} {[B * latent, V]}, {B * latent * V * 4 / MiB:.0f} MiB: logits, and {s} times that for the backward pass"
)
print(f"{'the ops form':28} {[rows, V]}, {rows * V * 4 / MiB:.1f} MiB: logits of a chunk, whatever s is")
