"""What a training step computes, and how fast the device could: the two halves of model FLOPs utilisation (MFU)."""

import time

import torch

from .config import ModelConfig


def matrix_parameters(config: ModelConfig, vocabulary: int) -> int:
    """Weights that every latent position is multiplied by: the blocks' matrices and the head, not the embedding."""
    head_dim = config.dim // config.heads
    attention = config.dim * (config.heads + 2 * config.kv_heads) * head_dim + config.dim * config.dim
    return config.layers * (attention + 3 * config.dim * config.ffn_dim) + vocabulary * config.dim


def parameters(config: ModelConfig, vocabulary: int) -> int:
    """All weights of the model: `matrix_parameters`, the embedding and the gains of the norms."""
    return matrix_parameters(config, vocabulary) + vocabulary * config.dim + (2 * config.layers + 1) * config.dim


def step_flops(config: ModelConfig, vocabulary: int, sequences: int, positions: int) -> int:
    """FLOPs of a step, forward and backward, in either phase: 6 a matrix weight and latent position, and attention's.

    Attention's two products cost 4 * l * d a layer and position forward, half of it under the causal mask, and twice
    as much backward: 6 * l * d. What activation checkpointing computes again is not counted, as MFU has it.
    """
    tokens = sequences * positions
    return 6 * tokens * (matrix_parameters(config, vocabulary) + config.layers * positions * config.dim)


@torch.no_grad()
def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measured speed of a square matrix product, the best of five: what MFU is a share of.

    Its size is 1024 on a CPU, 2 GFLOP, and 8192 on a GPU, 1100 GFLOP.
    """
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are not touched
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
