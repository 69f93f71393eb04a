"""A small training loop in the style of nanochat: what the second diff of docs/recipes.md applies to."""

import torch
from torch import nn
from torch.nn import functional as F

sequence_len, vocab_size, padded_vocab_size, n_layer, n_head, n_embd, softcap = 16, 60, 64, 2, 2, 32, 15
device_batch_size, grad_accum_steps, num_iterations = 2, 2, 10
COMPUTE_DTYPE = torch.bfloat16

t = torch.arange(20_000)
tokens = (3 * t + t // 7) % vocab_size


def data_loader(B, T, position=0):
    while True:
        chunk = tokens[position : position + B * T + 1]
        position += B * T
        x, y = chunk[:-1].view(B, T), chunk[1:].view(B, T)
        yield x, y


class Linear(nn.Linear):
    """No autocast: the weight that is trained is float32, and is cast to the dtype of the activations."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, has_value_embedding):
        super().__init__()
        self.c_q, self.c_k, self.c_v, self.c_proj = (Linear(n_embd, n_embd, bias=False) for _ in range(4))
        self.ve_gate = Linear(12, n_head, bias=False) if has_value_embedding else None
        self.c_fc, self.mlp_proj = Linear(n_embd, 4 * n_embd, bias=False), Linear(4 * n_embd, n_embd, bias=False)
        nn.init.zeros_(self.c_proj.weight)
        nn.init.zeros_(self.mlp_proj.weight)

    def forward(self, x, ve, cos, sin):
        y = norm(x)
        q, k, v = (c(y).unflatten(-1, (n_head, -1)) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            v = v + 2 * torch.sigmoid(self.ve_gate(y[..., :12])).unsqueeze(-1) * ve.view(v.shape)
        q, k = norm(rotated(q, cos, sin)), norm(rotated(k, cos, sin))
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.relu(self.c_fc(norm(x))).square())


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(padded_vocab_size, n_embd)
        self.value_embeds = nn.ModuleDict({"1": nn.Embedding(padded_vocab_size, n_embd)})  # of every second layer
        self.h = nn.ModuleList(Block(str(i) in self.value_embeds) for i in range(n_layer))
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((n_layer,), 0.1))
        self.lm_head = Linear(n_embd, padded_vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        self.wte.to(COMPUTE_DTYPE)
        self.value_embeds.to(COMPUTE_DTYPE)
        size = n_embd // n_head
        angles = torch.outer(torch.arange(sequence_len), 100_000 ** -(torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos()[:, None].to(COMPUTE_DTYPE), persistent=False)
        self.register_buffer("sin", angles.sin()[:, None].to(COMPUTE_DTYPE), persistent=False)

    def forward(self, idx, targets=None, loss_reduction="mean"):
        B, T = idx.size()
        cos, sin = self.cos[:T], self.sin[:T]
        x = x0 = norm(self.wte(idx).to(COMPUTE_DTYPE))
        for i, block in enumerate(self.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin)
        x = norm(x)
        logits = self.lm_head(x)[..., :vocab_size].float()
        logits = softcap * torch.tanh(logits / softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)


torch.manual_seed(42)
model = GPT()
groups = [
    dict(params=[model.wte.weight, *model.value_embeds.parameters(), model.lm_head.weight], lr=2e-2),
    dict(params=[*model.h.parameters(), model.resid_lambdas, model.x0_lambdas], lr=1e-2),
]
optimizer = torch.optim.AdamW(groups)
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
        optimizer.step()
        model.zero_grad()
        losses.append(train_loss)
        step += 1
    return losses
