"""Plain Hugging Face directories of random weights, made without transformers: usual names, tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCAB, LAYERS = 64, 128, 96, 3


def llama_weights(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = LAYERS) -> dict[str, Tensor]:
    """A llama's state dict: 7 linears and 2 norms a layer, embedding, final norm, head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    weights = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        }.items():  # fmt: skip
            weights[f"{prefix}{name}.weight"] = normal(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=dtype)
    weights["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    weights["lm_head.weight"] = normal(VOCAB, HIDDEN)
    return weights


def save_directory(
    path: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Write a Hugging Face directory; several shards get an index."""
    path.mkdir(parents=True, exist_ok=True)
    content = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        **(config or {}),
    }
    (path / "config.json").write_text(json.dumps(content))
    if tokenizer:
        (path / "tokenizer.json").write_text('{"a tokenizer": 1}')
        (path / "tokenizer_config.json").write_text("{}")
        (path / "generation_config.json").write_text('{"eos_token_id": 2}')
        (path / "chat_template.jinja").write_text("{{ messages }}")
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def llama_directory(path: Path, **options: Any) -> Path:
    """A plain llama directory in fp32; `options` as for `save_directory`."""
    return save_directory(path, llama_weights(), **options)


def quantize_small(source: Path, out: Path) -> None:
    """The run that is killed; here, because a forked process imports the module of its function first."""
    from numfit.pipeline import quantize

    quantize(source, "int4-g32", out, shard_size="40KB", scale_rule="absmax", threads=1, progress=False)


def files_of(path: Path) -> dict[str, bytes]:
    """Relative name → content of every file below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
