"""Configure runs by name: the paper's models (arXiv 2605.06546), as far as it describes them."""

import dataclasses

from .config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SuperpositionConfig, TrainConfig
from .files import check


def _paper(model: ModelConfig, learning_rate: float) -> TrainConfig:
    """Configure 20,000 steps of 2**21 latent tokens, 6,000 of them with s = 6, and the tokenizer of Llama 3."""
    return TrainConfig(
        model=model,
        data=DataConfig(vocabulary=128256, end_of_text="<|end_of_text|>"),
        superposition=SuperpositionConfig(bag_size=6, ratio=0.3),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup=2000, decay=0.1),
        run=RunConfig(micro_batch=4, compile=True, activation_checkpointing=True, log_every=10),
        steps=20_000,
        batch=512,
        latent_tokens=4096,  # ours: the paper's text does not give it
        dtype="bfloat16",
        eval_tokens=2**21,
    )


# The mixture of experts: 49,983 steps of 2**23 latent tokens, 12,483 of them with s = 16. The paper gives its kind
# (Qwen3), 10 B parameters and 1 B active. Its shape is ours: experts, choices and groups of heads as in Qwen3-30B-A3B
# (arXiv 2505.09388), smaller in width and depth. 10.27 B parameters, of which 1.01 B multiply each position, the head
# among them and the embedding not. Ours too: the vocabulary, the warm-up and the decay, which are those of the
# paper's dense models; the weights of the positions, which are the paper's from s = 8 on; the length of a sequence, as
# above. The weight of the load-balancing loss is Qwen3's, and so is the RoPE base, before it extends the context.
_EXPERTS = ModelConfig(
    dim=1536,
    layers=32,
    heads=12,
    kv_heads=4,
    ffn_dim=512,
    rope_theta=10_000.0,
    qk_norm=True,
    experts=128,
    experts_per_token=8,
    balance_rate=1e-3,
)
_MIXTURE = dataclasses.replace(
    _paper(_EXPERTS, 3e-4),
    superposition=SuperpositionConfig(bag_size=16, ratio=12_483 / 49_983, position_weights="power_law"),
    steps=49_983,
    batch=2048,
)

# Widths and depths of SmolLM2 at 135M and 360M, and SmolLM3 at 3B. A key-value head per query head gives the first two
# 267 M and 600 M parameters, as the paper's names; SmolLM2's grouped heads 254 M and 561 M. SmolLM3's give 3.3 B.
PRESETS: dict[str, TrainConfig] = {
    "270m": _paper(ModelConfig(576, layers=30, heads=9, kv_heads=9, ffn_dim=1536, rope_theta=500_000.0), 2e-3),
    "600m": _paper(ModelConfig(960, layers=32, heads=15, kv_heads=15, ffn_dim=2560, rope_theta=500_000.0), 1e-3),
    "3b": _paper(ModelConfig(2048, layers=36, heads=16, kv_heads=4, ffn_dim=11008, rope_theta=500_000.0), 2e-4),
    "10b-a1b": _MIXTURE,
}


def preset(name: str) -> TrainConfig:
    """Return the preset of that name; raise UserError if there is none."""
    check("preset", name, name in PRESETS, f"one of {', '.join(PRESETS)}")
    return PRESETS[name]
