"""A Llama-shaped decoder whose embedding reads bags and whose head computes the multi-hot loss.

Between the two nothing knows of bags: attention, positions and cost are those of l latent positions in both phases.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import BagEmbedding, LinearMultiHotCrossEntropy
from .config import ModelConfig

__all__ = ["Transformer"]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: `[B, l, d] -> [B, l, d]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, l, head_dim]
        queries_keys, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(queries_keys, cos, sin).split([self.heads, self.kv_heads], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[..., l, head_dim]`; halves of a head form the pairs, as in Llama's public code."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.ffn_in = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        gate, up = self.ffn_in(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn_out(F.silu(gate) * up)


class Transformer(nn.Module):
    """The model.

    Args:
        config: sizes.
        vocabulary: V.
        positions: most latent positions of a sequence.
        position_weights: weights of the bag positions in the loss, by name.

    Shapes: input ids `[B, l]` tokens or `[B, l, s]` bags; labels `[B, l]` or `[B, l, s]`. Returns the scalar loss, or
    logits `[B, l, V]` without labels.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocabulary: int, positions: int, position_weights: str = "uniform") -> None:
        super().__init__()
        self.embedding = BagEmbedding(vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = LinearMultiHotCrossEntropy(config.dim, vocabulary, position_weights=position_weights)
        half = config.dim // config.heads // 2
        frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # [positions, head_dim / 2]
        self.register_buffer("sin", angles.sin().float(), persistent=False)

        # Normal, 0.02; what writes into the residual stream less, by the number of its writers (GPT-2's rule).
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("attention.out.weight", "ffn_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x), labels)
