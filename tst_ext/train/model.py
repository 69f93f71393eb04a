"""Build a Llama-shaped decoder whose embedding reads bags and whose head computes the multi-hot loss.

Nothing between the two knows of bags: both phases have l latent positions, at the same cost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import BagEmbedding, LinearMultiHotCrossEntropy
from .config import ModelConfig
from .experts import Balance, Experts, Router, Routing


class Attention(nn.Module):
    """Apply causal grouped-query attention with rotary positions: `[B, l, d] -> [B, l, d]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, l, head_dim]
        queries_keys, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the gains are float32 and the products bfloat16, for which torch's fused norm warns.
            q, k = queries_keys.to(self.q_norm.weight.dtype).split([self.heads, self.kv_heads], dim=1)
            queries_keys = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1).to(v.dtype)
        q, k = rotate(queries_keys, cos, sin).split([self.heads, self.kv_heads], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Embed positions in `[..., l, head_dim]`; the halves of a head form the pairs, as in Llama's public code."""
    first, second = x.chunk(2, dim=-1)
    # cos, sin and the products are float32; half precision would place distant positions wrongly.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """Add attention and SwiGLU, or experts, each behind an RMSNorm, to the residual stream.

    Return with it what the router of the experts did, None without experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.experts = Experts(config) if config.experts else None
        width = config.ffn_dim * (config.shared_experts if config.experts else 1)
        self.dense = width > 0
        if self.dense:
            self.ffn_in = nn.Linear(config.dim, 2 * width, bias=False)
            self.ffn_out = nn.Linear(width, config.dim, bias=False)
        self.recompute = False  # activation checkpointing: inside the block, where FSDP2 has gathered its parameters

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing | None]:
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is random: to keep and restore the state of the generators would cost time for nothing.
            return checkpoint(self._forward, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, cos, sin)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        h = self.ffn_norm(x)
        routing = None
        if self.experts is not None:
            y, routing = self.experts(h)
            x = x + y
        if self.dense:
            gate, up = self.ffn_in(h).chunk(2, dim=-1)
            x = x + self.ffn_out(F.silu(gate) * up)
        return x, routing


class Transformer(nn.Module):
    """Compute the loss, with the options of `linear_multi_hot_cross_entropy`, or logits `[B, l, V]` without labels.

    Input ids are `[B, l]` tokens or `[B, l, s]` bags, whose empty slots hold `padding_idx`. Labels are `[B, l]` or
    `[B, l, s]`. l is at most `positions`.

    With experts and "loss" balancing, the gradient includes the load-balancing loss, and the value does not. `parts` is
    the number of calls whose gradients make up one step.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocabulary: int, positions: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = BagEmbedding(vocabulary, config.dim, padding_idx=padding_idx)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.balance = Balance(config) if config.experts else None
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = LinearMultiHotCrossEntropy(config.dim, vocabulary)
        half = config.dim // config.heads // 2
        frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # [positions, head_dim / 2]
        self.register_buffer("sin", angles.sin().float(), persistent=False)

        writers = config.layers * (3 if config.shared_experts else 2)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=initial_std(name, writers))

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Return the input of the head, `[B, l, d]`."""
        return self._hidden(input_ids)[0]

    def _hidden(self, input_ids: Tensor) -> tuple[Tensor, list[Routing]]:
        x = self.embedding(input_ids)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        routings = []
        for block in self.blocks:
            x, routing = block(x, cos, sin)
            routings += [] if routing is None else [routing]
        return self.norm(x), routings

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, parts: int = 1, **options: Any) -> Tensor:
        x, routings = self._hidden(input_ids)
        loss = self.head(x, labels, **options)
        if self.balance is not None and labels is not None and torch.is_grad_enabled():
            balance = self.balance(routings, parts)
            # With the gradient of both, and the value of the loss alone, which is what models are compared by.
            return loss if balance is None else loss + (balance - balance.detach())
        return loss

    def end_step(self) -> Tensor | None:
        """Return each expert's load in this step over its even share, `[layers, experts]`, None without experts.

        It is of all calls with labels and gradients since the last one. Call it after each step of the optimiser.
        """
        if self.balance is None:
            return None
        return self.balance.end_step(self.routers())

    def routers(self) -> list[Router]:
        """Return the routers of all layers that have experts."""
        return [module for module in self.modules() if isinstance(module, Router)]


def initial_std(name: str, writers: int) -> float:
    """Return 0.02, less for the layers that write into the residual stream, by their number (GPT-2's rule)."""
    names = ("attention.out.weight", "ffn_out.weight", "experts.ffn_out")
    return 0.02 / writers**0.5 if name.endswith(names) else 0.02
