"""What llama.cpp did to a model when it wrote the GGUF file, undone: tensor names, value conventions, configuration.

GGUF renames tensors, permutes the rows of q and k of the `llama` architecture (its rotary embedding pairs neighbours,
Hugging Face's pairs halves), stores Gemma's norms as 1 + w, and keeps the configuration as flat metadata. One table
row an architecture; whatever a row does not explain is an error, because a tensor left out would be a different model.

Gives up: mixtures of experts, per-layer head counts, rotary scaling other than none, linear, and Llama 3.1's.
Source: models-and-data specification §2.3; checked bit for bit against transformers' own GGUF loading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from numfit.checkpoint.gguf_header import GGUFHeader, damaged
from numfit.errors import CheckpointError

ATTENTION = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
FEED_FORWARD = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's rotary scaling, baked into a tensor [head_dim / 2]


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture maps to Hugging Face."""

    class_name: str
    model_type: str
    block: Mapping[str, str]  # name inside `blk.N.` -> name inside `model.layers.N.`
    permuted: frozenset[str] = frozenset()  # Hugging Face names whose rows are permuted for the rotary embedding
    norm_offset: float = 0.0  # what GGUF added to every norm weight
    extra: Mapping[str, Any] = field(default_factory=dict)  # configuration entries that GGUF leaves unsaid


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "llama",
        ATTENTION | FEED_FORWARD | NORMS,
        permuted=frozenset({"self_attn.q_proj", "self_attn.k_proj"}),
        extra={"hidden_act": "silu"},
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", ATTENTION | FEED_FORWARD | NORMS, extra={"hidden_act": "silu"}),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        ATTENTION | FEED_FORWARD | GEMMA_NORMS,
        norm_offset=1.0,
        extra={"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
    ),
}


def architecture(header: GGUFHeader) -> tuple[str, Architecture]:
    """The file's architecture: its GGUF name and its row of the table; CheckpointError for one we cannot convert."""
    name = header.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: the GGUF architecture '{name}' is not supported (only {', '.join(sorted(ARCHITECTURES))} "
            "are); quantize the model's original safetensors instead"
        )
    return name, ARCHITECTURES[name]


def hugging_face_names(header: GGUFHeader, arch: Architecture) -> dict[str, str]:
    """Hugging Face name -> GGUF name, in the order of the model: embedding, blocks, final norm, head.

    Raises:
        CheckpointError: a tensor that the architecture's table does not explain, or one of its tensors is missing.
    """
    blocks = _number(header, "block_count")
    if blocks * len(arch.block) > len(header.tensors):
        raise damaged(
            header.path, f"metadata 'block_count' is {blocks}, but there are only {len(header.tensors)} tensors"
        )
    found: dict[str, str] = {}
    for name in header.tensors:
        stem, _dot, suffix = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match and int(match[1]) < blocks and match[2] in arch.block and suffix in ("weight", "bias"):
            found[f"model.layers.{int(match[1])}.{arch.block[match[2]]}.{suffix}"] = name
        elif stem in OUTSIDE and suffix == "weight":
            found[f"{OUTSIDE[stem]}.{suffix}"] = name
        elif name != ROPE_FACTORS:
            raise CheckpointError(
                f"{header.path}: tensor '{name}' does not belong to a {arch.model_type} model of {blocks} blocks as "
                "numfit knows it; quantize the model's original safetensors instead"
            )
    outer = ["model.embed_tokens.weight", "model.norm.weight"]
    order = outer[:1]
    for layer in range(blocks):
        for part in arch.block.values():
            order.append(f"model.layers.{layer}.{part}.weight")
            if f"model.layers.{layer}.{part}.bias" in found:
                order.append(f"model.layers.{layer}.{part}.bias")
    order += outer[1:]
    missing = [name for name in order if name not in found]
    if missing:
        raise CheckpointError(f"{header.path}: the GGUF file lacks '{missing[0]}' ({len(missing)} tensors are missing)")
    if "lm_head.weight" in found:
        order.append("lm_head.weight")
    return {name: found[name] for name in order}


def to_hugging_face(header: GGUFHeader, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Undo the value conventions of GGUF for the tensor with Hugging Face name `name`."""
    _, arch = architecture(header)
    module, _, _suffix = name.rpartition(".")
    if arch.norm_offset and module.endswith("norm"):
        return tensor - arch.norm_offset
    part = re.sub(r"^model\.layers\.\d+\.", "", module)
    if part not in arch.permuted:
        return tensor
    heads = _number(header, "attention.head_count_kv" if part.endswith("k_proj") else "attention.head_count")
    if tensor.shape[0] % (2 * heads):
        raise damaged(header.path, f"'{name}' has {tensor.shape[0]} rows, which {heads} heads cannot share")
    # [heads, head_dim/2, 2, ...]: GGUF's rotary pairs are neighbours; Hugging Face's halves, [heads, 2, head_dim/2].
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def hugging_face_config(header: GGUFHeader, names: Mapping[str, str], tied: bool) -> dict[str, Any]:
    """The `config.json` of the model.

    Raises:
        CheckpointError: metadata that is missing, contradicts the tensors, or describes what numfit cannot express.
    """
    gguf_name, arch = architecture(header)
    hidden, heads = _number(header, "embedding_length"), _number(header, "attention.head_count")
    kv_heads = _number(header, "attention.head_count_kv", heads)
    head_dim = _number(header, "attention.key_length", hidden // heads)
    blocks = _number(header, "block_count")
    expected = {
        "model.embed_tokens.weight": (None, hidden),
        "model.layers.0.self_attn.q_proj.weight": (heads * head_dim, hidden),
        "model.layers.0.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "model.layers.0.mlp.up_proj.weight": (_number(header, "feed_forward_length"), hidden),
    }
    for name, want in expected.items():
        shape = header.tensors[names[name]].shape
        if len(shape) != 2 or shape[1] != want[1] or want[0] not in (None, shape[0]):
            raise damaged(header.path, f"tensor '{names[name]}' is {shape}, but the metadata say {want}")
    if header.metadata.get(f"{gguf_name}.expert_count", 0):
        raise CheckpointError(
            f"{header.path}: GGUF mixtures of experts are not supported; quantize the original safetensors"
        )
    config: dict[str, Any] = {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "hidden_size": hidden,
        "intermediate_size": _number(header, "feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _number(header, "context_length"),
        "rms_norm_eps": shortest(header.need(f"{gguf_name}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": shortest(header.value(f"{gguf_name}.rope.freq_base", float, 10000.0)),
        "vocab_size": header.tensors[names["model.embed_tokens.weight"]].shape[0],
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **arch.extra,
    }
    scaling = _rope_scaling(header, gguf_name, head_dim, config["rope_theta"])
    if scaling:
        config["rope_scaling"] = scaling
    if arch.model_type == "llama":
        config |= _llama_biases(header, names)
    if arch.model_type == "gemma3_text":
        config["sliding_window"] = _number(header, "attention.sliding_window")
        # The 27B model alone (62 blocks) scales its scores by hidden / heads; the file does not say so.
        config["query_pre_attn_scalar"] = hidden // heads if blocks == 62 else head_dim
    for key in ("bos", "eos", "padding"):
        token = header.value(f"tokenizer.ggml.{key}_token_id", int)
        if token is not None:
            config[f"{'pad' if key == 'padding' else key}_token_id"] = token
    return config


def shortest(number: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05 for the 9.999999747378752e-06 that GGUF stores."""
    return float(str(np.float32(number)))


def _number(header: GGUFHeader, key: str, default: int | None = None) -> int:
    key = f"{header.metadata['general.architecture']}.{key}"
    number = header.need(key, (int, list)) if default is None else header.value(key, (int, list), default)
    if isinstance(number, list):
        if len(set(number)) != 1:
            raise CheckpointError(f"{header.path}: '{key}' differs from layer to layer, which numfit cannot convert")
        number = number[0]
    if not isinstance(number, int) or not 0 < number < 2**31:
        raise damaged(header.path, f"metadata '{key}' is {number!r}")
    return number


def _llama_biases(header: GGUFHeader, names: Mapping[str, str]) -> dict[str, bool]:
    flags = {}
    for flag, parts in (("attention_bias", ATTENTION), ("mlp_bias", FEED_FORWARD)):
        present = {f"model.layers.0.{part}.bias" in names for part in parts.values()}
        if len(present) == 2:
            raise CheckpointError(
                f"{header.path}: only some linears have a bias, which no Hugging Face llama can express"
            )
        flags[flag] = present == {True}
    return flags


def _rope_scaling(header: GGUFHeader, gguf_name: str, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = header.value(f"{gguf_name}.rope.scaling.type", str, "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(header.need(f"{gguf_name}.rope.scaling.factor", float))}
    if kind != "none":
        raise CheckpointError(
            f"{header.path}: rotary scaling '{kind}' is not supported; quantize the original safetensors"
        )
    if ROPE_FACTORS not in header.tensors:
        return None
    tensor = header.tensors[ROPE_FACTORS]
    with open(header.path, "rb") as file:
        file.seek(tensor.offset)
        factors = np.frombuffer(file.read(tensor.nbytes), "<f4").astype(np.float64)
    scaling = {"rope_type": "llama3", "factor": shortest(float(factors.max())), "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if tensor.type_name != "F32" or not np.allclose(factors, _llama3_factors(scaling, head_dim, theta), rtol=1e-4):
        raise CheckpointError(
            f"{header.path}: '{ROPE_FACTORS}' holds a rotary scaling other than Llama 3.1's, which numfit cannot "
            "express; quantize the original safetensors"
        )
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """What each rotary frequency is divided by under Llama 3.1's rule. [head_dim / 2]"""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = smooth.clip(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
