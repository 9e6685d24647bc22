"""What a tensor is, judged by its name, type and shape alone: no model is built, so unknown architectures work.

The rules err on the side of keeping: a tensor that is not clearly a matrix of weights stays as it is, `plan` says why,
and `--rule 'regex=format'` quantizes it all the same. What the names cannot tell is an unusual architecture's habits (a
router called `selector`, say); `plan` is there to be read before hours are spent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from numfit.checkpoint.safetensors_file import TensorInfo

FLOATS = ("F32", "F16", "BF16", "F64")
PACKED_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
# What only quantized checkpoints hold: GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8 and mx blocks, numfit.
PACKED_SUFFIXES = (
    ".qweight", ".qzeros", ".g_idx", ".quant_map", ".SCB", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_codes",
)  # fmt: skip
PACKED_INTEGERS = (".weight", "_blocks", "_scales", ".scales")  # the same, where the numbers are integers

_INPUT = {
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "token_embedding",
    "embed_tokens_per_layer", "shared",
}  # fmt: skip
_OUTPUT = {"lm_head", "embed_out", "output_projection"}
_POSITIONS = {
    "wpe",
    "position_embeddings",
    "embed_positions",
    "token_type_embeddings",
    "pos_embed",
    "position_embedding",
}
_ROUTERS = {"gate", "router", "shared_expert_gate", "expert_gate", "wg"}
_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln|ln_\w+)([._]|$)")


@dataclass(frozen=True)
class Role:
    """`kind`: "linear", "experts", "embedding", "head" are quantized by default, "kept" is not; `why` is for people."""

    kind: str
    why: str = ""


def role(info: TensorInfo) -> Role:
    """Judge one tensor by name, type and shape.

    Conventions: a weight's name ends in `.weight` (expert stacks may do without); the last axis is the input dimension.
    """
    parts = info.name.split(".")
    module = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
    rank = len(info.shape)
    if info.dtype not in FLOATS:
        return Role("kept", f"not floating-point weights ({info.dtype})")
    if 0 in info.shape:
        return Role("kept", "empty")
    if rank < 2:
        return Role("kept", "a vector" if rank else "a single number")
    if parts[-1] == "bias" or parts[-1].endswith("_bias"):
        return Role("kept", "a bias")
    if _NORM.search(".".join(parts[-2:])):
        return Role("kept", "a norm")
    if module in _POSITIONS:
        return Role("kept", "a position embedding")
    if module in _ROUTERS or "router" in parts[-3:]:
        return Role("kept", "a router")
    if rank > 3:
        return Role("kept", f"a convolution kernel ({rank} axes)")
    if rank == 3:
        if any("expert" in part for part in parts) and "conv" not in module:
            return Role("experts")
        return Role("kept", "3 axes, and not experts by its name")
    if parts[-1] != "weight":
        return Role("kept", "not a linear layer's weight by its name")
    if module in _INPUT:
        return Role("embedding")
    if module in _OUTPUT or parts[:-1] == ["output"]:
        return Role("head")
    return Role("linear")


def rule_can_apply(info: TensorInfo) -> bool:
    """Whether `--rule` may quantize a tensor: floating-point with rows."""
    return info.dtype in FLOATS and len(info.shape) >= 2 and 0 not in info.shape


def is_packed(info: TensorInfo) -> bool:
    """Whether a tensor is part of an already quantized model."""
    if info.dtype in PACKED_FLOATS or info.name.endswith(PACKED_SUFFIXES):
        return True
    return info.dtype not in FLOATS and len(info.shape) >= 2 and info.name.endswith(PACKED_INTEGERS)
