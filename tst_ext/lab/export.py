"""Export a trained model to files that transformers, and what reads its format, load as a Llama or a Qwen3.

Only names and layout change: each fused matrix becomes the matrices it stands for. In float32 the weights are those of
the run, bit for bit. The pairs of the rotary embedding already are the halves of a head, as Llama's and Qwen3's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..train.config import ModelConfig, TrainConfig
from ..train.data import load_tokenizer
from ..train.files import UserError, check, check_out, whole_folder
from ..train.model import Transformer


def export_hf(
    model: Transformer,
    config: TrainConfig,
    tokenizer_path: Path | None,
    end_of_text: int | None,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    file_bytes: int = 5_000_000_000,
) -> None:
    """Write `folder`, whole or not at all, as `transformers.AutoModelForCausalLM.from_pretrained` reads it.

    Args:
        model: on any device, with its whole parameters (not sharded over processes).
        config: of the run that trained it. `latent_tokens` becomes the longest sequence, max_position_embeddings.
        tokenizer_path: the run's tokenizer.json, or None.
        end_of_text: id of the token that ends a document, which becomes the model's eos and bos token, or None.
        folder: empty or new.
        dtype: of the weights in the files.
        file_bytes: most bytes of tensors in a file; a larger tensor has a file of its own. Several files get an index.

    Raises:
        UserError: the folder is not empty or cannot be written, the tokenizer cannot be read, or transformers has no
            such model: experts without `qk_norm`, with shared experts or with "bias" balancing.
    """
    check_out(folder)
    if config.model.experts:
        wanted = "{} for experts, as in transformers' Qwen3MoeForCausalLM"
        check("qk_norm", config.model.qk_norm, config.model.qk_norm, wanted.format("True"))
        check("shared_experts", config.model.shared_experts, not config.model.shared_experts, wanted.format("0"))
        check("balance", config.model.balance, config.model.balance == "loss", wanted.format("loss"))
    tokenizer_files = {} if tokenizer_path is None else _tokenizer_files(tokenizer_path, end_of_text, config)
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}  # null too: Llama's defaults are 1 and 2
    files: dict[str, Any] = {
        "config.json": _hf_config(config, model.embedding.num_embeddings, dtype) | special,
        "generation_config.json": special,
        **tokenizer_files,
    }
    try:
        with whole_folder(folder) as unfinished:
            _save_weights(list(_hf_tensors(model, config.model)), unfinished, dtype, file_bytes)
            for name, content in files.items():
                _write_json(unfinished / name, content)
    except SafetensorError as error:
        raise UserError(f"out {folder}: {error}") from error


def _hf_config(config: TrainConfig, vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    model, name = config.model, str(dtype).removeprefix("torch.")
    architecture, kind = ("Qwen3ForCausalLM", "qwen3") if model.qk_norm else ("LlamaForCausalLM", "llama")
    own: dict[str, Any] = {} if model.qk_norm else {"mlp_bias": False}
    if model.experts:
        architecture, kind = "Qwen3MoeForCausalLM", "qwen3_moe"
        own = {
            "num_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.ffn_dim,
            "norm_topk_prob": True,
            "router_aux_loss_coef": model.balance_rate,
        }
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.dim // model.heads,
        "max_position_embeddings": config.latent_tokens,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},  # transformers 5
        "rope_theta": model.rope_theta,  # transformers 4, which would use 10000 without; 5 prefers the entry above
        "hidden_act": "silu",
        "attention_bias": False,
        **own,
        "tie_word_embeddings": False,
        "dtype": name,  # transformers from 4.56 on
        "torch_dtype": name,  # and before
    }


def _hf_tensors(model: Transformer, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by Llama's and Qwen3's names, as views."""
    state = model.state_dict()
    head_dim = config.dim // config.heads
    heads = [n * head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
    yield "model.embed_tokens.weight", state["embedding.weight"]
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        q, k, v = state[f"{ours}.attention.qkv.weight"].split(heads)
        yield f"{theirs}.input_layernorm.weight", state[f"{ours}.attention_norm.weight"]
        yield f"{theirs}.self_attn.q_proj.weight", q
        yield f"{theirs}.self_attn.k_proj.weight", k
        yield f"{theirs}.self_attn.v_proj.weight", v
        yield f"{theirs}.self_attn.o_proj.weight", state[f"{ours}.attention.out.weight"]
        yield f"{theirs}.post_attention_layernorm.weight", state[f"{ours}.ffn_norm.weight"]
        if config.qk_norm:
            yield f"{theirs}.self_attn.q_norm.weight", state[f"{ours}.attention.q_norm.weight"]
            yield f"{theirs}.self_attn.k_norm.weight", state[f"{ours}.attention.k_norm.weight"]
        if config.experts:
            yield f"{theirs}.mlp.gate.weight", state[f"{ours}.experts.router.weight"]
            stacks = (state[f"{ours}.experts.{name}"].unbind() for name in ("ffn_in", "ffn_out"))
            ffns = [(f"{theirs}.mlp.experts.{i}", *ffn) for i, ffn in enumerate(zip(*stacks, strict=True))]
        else:
            ffns = [(f"{theirs}.mlp", state[f"{ours}.ffn_in.weight"], state[f"{ours}.ffn_out.weight"])]
        for name, ffn_in, ffn_out in ffns:
            gate, up = ffn_in.chunk(2)
            yield f"{name}.gate_proj.weight", gate
            yield f"{name}.up_proj.weight", up
            yield f"{name}.down_proj.weight", ffn_out
    yield "model.norm.weight", state["norm.weight"]
    yield "lm_head.weight", state["head.weight"]


def _save_weights(tensors: list[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, file_bytes: int) -> None:
    sizes = [tensor.numel() * dtype.itemsize for _, tensor in tensors]
    files: list[dict[str, Tensor]] = [{}]
    filled = 0
    for (name, tensor), size in zip(tensors, sizes, strict=True):
        if files[-1] and filled + size > file_bytes:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += size

    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        path = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        # Converted file by file, so that a copy takes the memory of one file at most. transformers asks for "pt".
        save_file({n: t.to("cpu", dtype) for n, t in file.items()}, folder / path, metadata={"format": "pt"})
        (folder / path).chmod(0o644)  # safetensors 0.8 makes it 0600
        weight_map |= dict.fromkeys(file, path)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tokenizer_files(path: Path, end_of_text: int | None, config: TrainConfig) -> dict[str, Any]:
    tokenizer = load_tokenizer(path)
    return {
        # The model has never seen the tokens of a post-processor, such as Llama 3's <|begin_of_text|>.
        "tokenizer.json": json.loads(tokenizer.to_str()) | {"post_processor": None},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": None if end_of_text is None else tokenizer.id_to_token(end_of_text),
            "model_max_length": config.latent_tokens,
            "clean_up_tokenization_spaces": False,  # transformers 4 would remove the space before punctuation
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
