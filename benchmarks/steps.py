"""A training step of the reference model, and of the same model from the same weights in other code.

All have one function, batch, loss, clipping and optimiser (fused AdamW). Each has its own attention, loss and layout of
the weights.
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import imported
from torch import Tensor, nn

from tst_ext.lab.export import export_hf
from tst_ext.train.config import ModelConfig, OptimizerConfig, TrainConfig
from tst_ext.train.model import Transformer
from tst_ext.train.optimizer import parameter_groups

LARGER = ModelConfig(dim=256, layers=6, heads=4, kv_heads=4, ffn_dim=688)  # 5 M parameters, embedding and head apart
# Model, vocabulary, sequences, latent tokens: the trainer's default, and 22 M parameters with a larger head.
SHAPES = {"default": (ModelConfig(), 4096, 8, 64), "larger": (LARGER, 32768, 8, 128)}
NANOGPT, HUGGING_FACE = "nanoGPT's way, rewritten", "transformers, LlamaForCausalLM"
Step = Callable[[], Tensor]


def step(model: nn.Module, loss: Callable[[], Tensor], device: torch.device, dtype: str = "float32") -> Step:
    """Return a function that takes one training step and returns its loss, 0-d."""
    config = OptimizerConfig()
    # At 1e-5 hundreds of steps leave the weights ordinary, and the first changes the loss by 1e-3 all the same.
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)

    def run() -> Tensor:
        with nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype)):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return run


def reference(config: ModelConfig, vocabulary: int, length: int, device: torch.device) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config, vocabulary, length).to(device)


def contenders(
    config: ModelConfig, ids: Tensor, labels: Tensor, vocabulary: int, dtype: str = "float32"
) -> tuple[Step, dict[str, Step | str]]:
    """Return our step of next-token training on ids and labels `[B, l]`, and its peers by name.

    A string says why a peer does not run here.
    """
    device, length = ids.device, ids.shape[1]
    model = reference(config, vocabulary, length, device)
    rewritten = GPT(config, vocabulary, length).to(device)
    with torch.no_grad():
        for theirs, ours in zip(rewritten.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)
    peers: dict[str, Step | str] = {NANOGPT: step(rewritten, lambda: rewritten(ids, labels)[1], device, dtype)}
    transformers = imported("transformers")
    if isinstance(transformers, str):
        peers[HUGGING_FACE] = transformers
    else:
        llama = hugging_face(transformers, model, TrainConfig(model=config, latent_tokens=length))
        # Labels that are shifted already, so that as many positions count as in the other models.
        loss = lambda: llama(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss  # noqa: E731
        peers[HUGGING_FACE] = step(llama, loss, device, dtype)
    return step(model, lambda: model(ids, labels), device, dtype), peers


def hugging_face(transformers: Any, model: Transformer, config: TrainConfig) -> nn.Module:
    """Export the model and load it as users do."""
    with tempfile.TemporaryDirectory() as name:
        export_hf(model, config, None, None, Path(name) / "model")
        load = transformers.LlamaForCausalLM.from_pretrained
        llama = load(Path(name) / "model", attn_implementation="sdpa", dtype=torch.float32)
    return llama.to(model.head.weight.device).train()


# ---- nanoGPT's way ---------------------------------------------------------------------------------------------------
# The reference model's function in the manner of nanoGPT: one linear for queries, keys and values, attention by torch's
# op, full logits and F.cross_entropy. Not its code: that is a GPT-2, with layer norms, GELU and learned positions.


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.heads
        self.c_attn = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.c_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        q, k = (rotary(y, cos, sin) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.c_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.dim, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.RMSNorm(config.dim, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """As many key heads as query heads; parameters in the order of the reference model's."""

    def __init__(self, config: ModelConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, config.dim)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.RMSNorm(config.dim, eps=1e-5)
        self.lm_head = nn.Linear(config.dim, vocabulary, bias=False)
        half = config.dim // config.heads // 2
        angles = torch.arange(length)[:, None] / config.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(idx)
        for block in self.h:
            x = block(x, self.cos, self.sin)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
