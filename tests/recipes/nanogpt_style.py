"""A small training loop in the style of nanoGPT: what the first diff of docs/recipes.md applies to."""

import torch
from torch import nn
from torch.nn import functional as F

block_size, vocab_size, n_layer, n_head, n_embd = 16, 64, 2, 2, 32
batch_size, max_iters, learning_rate = 4, 10, 1e-2

t = torch.arange(20_000)
train_data, val_data = ((3 * t + t // 7) % vocab_size).tensor_split([18_000])


def get_batch(split):
    data = train_data if split == "train" else val_data
    ix = torch.randint(len(data) - block_size, (batch_size, 1))
    windows = data[ix + torch.arange(block_size + 1)]
    return windows[:, :-1], windows[:, 1:]


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, 0.0, "gelu", batch_first=True, norm_first=True)
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.TransformerEncoder(layer, n_layer, nn.LayerNorm(n_embd), enable_nested_tensor=False)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for p in (self.wte.weight, self.wpe.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None):
        b, t = idx.size()
        x = self.wte(idx) + self.wpe(torch.arange(t))
        x = self.h(x, mask=nn.Transformer.generate_square_subsequent_mask(t), is_causal=True)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


torch.manual_seed(1337)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), learning_rate)


@torch.no_grad()
def estimate_loss():
    return torch.stack([model(*get_batch("val"))[1] for _ in range(4)]).mean().item()


def train(iter_num=0):
    losses = []
    while iter_num < max_iters:
        X, Y = get_batch("train")
        logits, loss = model(X, Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        iter_num += 1
    return losses
