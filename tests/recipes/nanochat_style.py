"""A small training loop in the style of nanochat: what the second diff of docs/recipes.md applies to."""

import torch
from torch import nn
from torch.nn import functional as F

sequence_len, vocab_size, n_layer, n_head, n_embd, softcap = 16, 64, 2, 2, 32, 15
device_batch_size, grad_accum_steps, num_iterations = 2, 2, 10

t = torch.arange(20_000)
tokens = (3 * t + t // 7) % vocab_size


def data_loader(B, T, position=0):
    while True:
        chunk = tokens[position : position + B * T + 1]
        position += B * T
        x, y = chunk[:-1].view(B, T), chunk[1:].view(B, T)
        yield x, y


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, 0.0, F.relu, batch_first=True, norm_first=True)
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.h = nn.TransformerEncoder(layer, n_layer, nn.RMSNorm(n_embd), enable_nested_tensor=False)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.001)

    def forward(self, idx, targets=None, loss_reduction="mean"):
        x = self.wte(idx)
        x = self.h(x, mask=nn.Transformer.generate_square_subsequent_mask(x.size(1)), is_causal=True)
        logits = softcap * torch.tanh(self.lm_head(x) / softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)


torch.manual_seed(42)
model = GPT()
optimizers = [
    torch.optim.AdamW([model.wte.weight, model.lm_head.weight], 2e-2),
    torch.optim.AdamW(model.h.parameters(), 1e-2),
]
train_loader = data_loader(device_batch_size, sequence_len)


def train(step=0):
    losses = []
    x, y = next(train_loader)
    while step < num_iterations:
        train_loss = 0.0
        for _ in range(grad_accum_steps):
            loss = model(x, y) / grad_accum_steps
            train_loss += loss.item()
            loss.backward()
            x, y = next(train_loader)
        for opt in optimizers:
            opt.step()
        model.zero_grad()
        losses.append(train_loss)
        step += 1
    return losses
