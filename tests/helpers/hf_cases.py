"""Tiny models of each family, rows and arguments: shared by the tests and the script they start."""

import torch
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

VOCABULARY, LENGTH = 97, 12
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SIZES |= dict(
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "gemma": transformers.GemmaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, final_logit_softcapping=1.0, query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        dropout=0.0,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "phi": transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 4}),  # a head with a bias
}

ROUTED = dict(output_router_logits=True, router_aux_loss_coef=0.5, num_experts_per_tok=2)
MIXTURES = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, **ROUTED),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, **ROUTED),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=4, **ROUTED),
}


def build(family, seed=0, **changes):
    torch.manual_seed(seed)
    config = (FAMILIES | MIXTURES)[family]
    config = config.__class__(**{**config.to_diff_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # biases are 0 in a fresh model, and its logits too small for a softcap to matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
        model.get_output_embeddings().weight.mul_(10)
    return model


def tokens(*shape, seed=0):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class Rows(Dataset):
    """Packed rows whose tokens tell the row: predictable, so that a loss falls."""

    def __init__(self, count=64, length=LENGTH):
        starts = torch.randint(3, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(1))
        self.ids = 3 + (starts + torch.arange(length)) % 20

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return dict(input_ids=self.ids[i].tolist(), labels=self.ids[i].tolist())


def arguments(folder, **options):
    options = dict(max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1) | options
    options = dict(save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=3) | options
    return TrainingArguments(str(folder), **options)
