"""Count the FLOPs of a training step, and measure the device's speed: the two halves of FLOPs utilisation (MFU)."""

import time

import torch

from .config import ModelConfig


def matrix_parameters(config: ModelConfig, vocabulary: int) -> int:
    """Count the weights that multiply each latent position: the blocks' matrices and the head, not the embedding.

    Of the experts they are those that a position chooses or that are shared, and the router.
    """
    head_dim = config.dim // config.heads
    attention = config.dim * (config.heads + 2 * config.kv_heads) * head_dim + config.dim * config.dim
    ffn = 3 * config.dim * config.ffn_dim
    if config.experts:
        ffn = (config.experts_per_token + config.shared_experts) * ffn + config.experts * config.dim
    return config.layers * (attention + ffn) + vocabulary * config.dim


def parameters(config: ModelConfig, vocabulary: int) -> int:
    """Count all weights of the model: `matrix_parameters`, the other experts, the embedding, the gains of the norms."""
    idle = (config.experts - config.experts_per_token) * 3 * config.dim * config.ffn_dim if config.experts else 0
    gains = 2 * config.dim + (2 * config.dim // config.heads if config.qk_norm else 0)
    rest = vocabulary * config.dim + config.layers * (idle + gains) + config.dim
    return matrix_parameters(config, vocabulary) + rest


def step_flops(config: ModelConfig, vocabulary: int, sequences: int, positions: int) -> int:
    """Count the FLOPs of a step, forward and backward, in either phase, without what checkpointing computes again.

    They are 6 per matrix weight and latent position, and 6 * l * d per layer and position for attention: its products
    cost 4 * l * d forward, of which the causal mask leaves half, and twice as much backward.
    """
    tokens = sequences * positions
    return 6 * tokens * (matrix_parameters(config, vocabulary) + config.layers * positions * config.dim)


@torch.no_grad()
def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the speed of a square matrix product, the best of five, of which MFU is a share."""
    n = 8192 if device.type == "cuda" else 1024  # 1100 and 2 GFLOP
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are not touched
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
