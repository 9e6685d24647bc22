"""What a decoder is, told from tensor names and config alone: which norm feeds which linears, what follows what.

One map, read by all who rewrite, calibrate or reconstruct a model, so that no room carries its own idea of an
architecture. It is built from a table of the names that Hugging Face uses for roles, not from model classes: a new
architecture with the usual names needs nothing, one with new names a word in ROLES.

What names cannot tell stands in two sets of model types: where a norm's gain is 1 + w, and for which types the map has
been checked by an exact rewrite (`Decoder.verified`). Everything the table does not know is listed in
`Layer.unexplained`, so that a rewrite can refuse instead of guessing. Gives up: encoders, state-space mixers, cross-
attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from numfit.errors import CheckpointError

# role -> names inside a layer, without ".weight" and ".bias"
ROLES: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_layernorm",),
    "post_attention_norm": ("post_attention_layernorm",),
    "pre_ffn_norm": ("pre_feedforward_layernorm",),
    "post_ffn_norm": ("post_feedforward_layernorm",),
    "head_norms": ("self_attn.q_norm", "self_attn.k_norm"),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "qkv": ("self_attn.qkv_proj", "attention.query_key_value"),
    "o": ("self_attn.o_proj", "self_attn.dense", "attention.dense"),
    "gate_up": ("mlp.gate_up_proj",),
    "router": ("mlp.gate", "mlp.router", "block_sparse_moe.gate", "mlp.shared_expert_gate"),
    "packed_experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),  # [E, ., .] in one tensor
    # what old files save beside the weights: positions and causal masks, computed anew by whoever loads them
    "buffers": ("attention", "attention.masked_bias", "attention.rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq"),
}
PART_OF = {name: role for role, names in ROLES.items() for name in names}
# The linears of a feed-forward network, once a layer or once an expert. w1, w2, w3 are Mixtral's.
FEED_FORWARD = re.compile(
    r"(?P<network>mlp|(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)|mlp\.shared_experts?)"
    r"\.(?P<part>gate_proj|up_proj|down_proj|fc1|fc2|w1|w2|w3|dense_h_to_4h|dense_4h_to_h)"
)
FEED_FORWARD_PART = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down"}
FEED_FORWARD_PART |= {"w1": "gate", "w3": "up", "w2": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down"}
EMBEDDING = ("embed_tokens", "embed_in")
LAYER = re.compile(r"(?P<stack>(?:.+\.)?layers)\.(?P<index>\d+)\.(?P<inside>.+)")

# Model types whose RMSNorm multiplies by 1 + weight (their modelling code says so; names do not).
ONE_PLUS_WEIGHT = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "vaultgemma",
        "recurrent_gemma",
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_5_moe",
    ]
)
# Model types whose norms subtract the mean first (LayerNorm); one with a bias does so in any case.
SUBTRACTS_MEAN = frozenset(["gpt_neox"])
# Model types whose map an exact rewrite has confirmed (tests/test_degrid.py, tests/test_transforms.py). Others may hide
# norms without weights.
VERIFIED = frozenset(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mixtral", "gpt_neox"])
# How the rows of one fused query/key/value linear lie: [query, key, value] head by head.
QKV_BY_HEAD = frozenset(["gpt_neox"])


@dataclass(frozen=True)
class Norm:
    """A normalisation: its gain is `offset + weight`, per channel."""

    weight: str
    bias: str | None
    offset: float  # 0, or 1 for the Gemma convention
    centred: bool = False  # subtracts the mean first (LayerNorm), where an RMSNorm does not


@dataclass(frozen=True)
class FeedForward:
    """down(act(gate x) * up x). Module names; `gate` is None where the network has none."""

    gate: str | None
    up: str
    down: str
    expert: int | None  # None: the layer's own network, or a shared expert


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Linears are module names (no ".weight")."""

    index: int
    prefix: str  # "model.layers.3."
    input_norm: Norm | None  # feeds attention_inputs; None where the architecture normalises afterwards
    attention_inputs: tuple[str, ...]  # q, k, v (or one fused qkv): they share their input
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None  # the three of them in one linear; `value_rows` says which rows are v
    o: str | None
    ffn_norm: Norm | None  # feeds ffn_inputs
    ffn_inputs: tuple[str, ...]  # gates, ups and routers: they share their input
    feed_forwards: tuple[FeedForward, ...]  # the layer's own, or its experts in order, then shared ones
    routers: tuple[str, ...]
    post_norms: tuple[Norm, ...]  # act on what attention and feed-forward network add to the residual stream
    packed_experts: tuple[str, ...]  # tensor names of experts stored as one 3-D tensor
    unexplained: tuple[str, ...]  # tensors of the layer whose role is not known here


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model."""

    model_type: str
    layers: tuple[Layer, ...]
    embedding: str  # tensor names
    final_norm: Norm | None
    lm_head: str | None  # None: tied to the embedding
    heads: int
    kv_heads: int
    head_dim: int
    verified: bool  # the map of this model type has been confirmed by an exact rewrite

    @property
    def queries_per_kv(self) -> int:
        """Query heads served by one key/value head; they lie next to each other."""
        return self.heads // self.kv_heads


def decoder_map(names: Iterable[str], config: Mapping[str, Any]) -> Decoder:
    """Build the map from a checkpoint's tensor names and its config.json.

    Raises:
        CheckpointError: no decoder layers, a gap in them, no embedding, head counts missing or not dividing.
    """
    names = list(names)
    text = config.get("text_config") or config
    model_type = str(text.get("model_type", "unknown"))
    norm_of = partial(_norm, 1.0 if model_type in ONE_PLUS_WEIGHT else 0.0, model_type in SUBTRACTS_MEAN)
    stack, layers = _find_layers(names)
    present = set(names)
    root = stack.removesuffix("layers")
    embedding = _first(present, *(f"{root}{name}.weight" for name in EMBEDDING), "model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"no embedding was found beside '{stack}' (looked for '{root}embed_tokens.weight')")
    heads = _count(text, "num_attention_heads")
    kv_heads = _count(text, "num_key_value_heads", heads)
    head_dim = text.get("head_dim") or _count(text, "hidden_size") // heads
    if heads % kv_heads:
        raise CheckpointError(f"the config's {heads} attention heads cannot share {kv_heads} key/value heads")
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return Decoder(
        model_type=model_type,
        layers=tuple(_layer(f"{stack}.{index}.", index, layers[index], norm_of) for index in sorted(layers)),
        embedding=embedding,
        final_norm=norm_of(f"{root}norm", present) or norm_of(f"{root}final_layer_norm", present),
        lm_head=None if tied else _first(present, "lm_head.weight", "model.lm_head.weight", "embed_out.weight"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        verified=model_type in VERIFIED,
    )


def value_rows(decoder: Decoder, layer: Layer) -> tuple[str, list[int] | None]:
    """Where a layer's values come from.

    Returns:
        The linear, and which of its rows they are [kv_heads * head_dim], head by head; None for all of them in order.

    Raises:
        CheckpointError: the layer has no value linear, or a fused one whose rows lie in an order not known here.
    """
    if layer.v is not None:
        return layer.v, None
    if layer.qkv is None:
        raise CheckpointError(f"the attention of '{layer.prefix}*' has no linear of its own for the values")
    if decoder.model_type not in QKV_BY_HEAD or decoder.heads != decoder.kv_heads:
        raise CheckpointError(
            f"how queries, keys and values lie in '{layer.qkv}' is not known for models of type '{decoder.model_type}'"
        )
    d = decoder.head_dim
    return layer.qkv, [(3 * head + 2) * d + i for head in range(decoder.heads) for i in range(d)]


def _find_layers(names: list[str]) -> tuple[str, dict[int, set[str]]]:
    """The stack of decoder layers and, per index, the names inside. Of several stacks (vision towers) the one with an
    embedding beside it, else the one with most tensors."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = LAYER.fullmatch(name)
        if match:
            stacks.setdefault(match["stack"], {}).setdefault(int(match["index"]), set()).add(match["inside"])
    if not stacks:
        raise CheckpointError("no tensor is called '….layers.N.…', so this is not a decoder that numfit understands")
    embedded = [s for s in stacks if any(f"{s.removesuffix('layers')}{name}.weight" in names for name in EMBEDDING)]
    stack = max(embedded or stacks, key=lambda s: sum(map(len, stacks[s].values())))
    layers = stacks[stack]
    gaps = set(range(len(layers))) - set(layers)
    if gaps:
        raise CheckpointError(f"layer {min(gaps)} of '{stack}' has no tensors although later layers have")
    return stack, layers


def _layer(prefix: str, index: int, inside: set[str], norm_of: Callable[[str, set[str]], Norm | None]) -> Layer:
    modules = {re.sub(r"\.(weight|bias)$", "", name) for name in inside}
    by_role: dict[str, list[str]] = {}
    networks: dict[tuple[int, str], dict[str, str]] = {}
    explained: set[str] = set()
    for module in sorted(modules):
        match = FEED_FORWARD.fullmatch(module)
        if match:
            order = int(match["expert"]) if match["expert"] else -1 if match["network"] == "mlp" else 10**9
            networks.setdefault((order, match["network"]), {})[FEED_FORWARD_PART[match["part"]]] = prefix + module
            explained.add(module)
        elif module in PART_OF:
            by_role.setdefault(PART_OF[module], []).append(module)
            explained.add(module)
    feed_forwards = tuple(
        FeedForward(parts.get("gate"), parts["up"], parts["down"], order if 0 <= order < 10**9 else None)
        for (order, _), parts in sorted(networks.items())
        if {"up", "down"} <= set(parts)
    )
    for (_, network), parts in networks.items():
        if not {"up", "down"} <= set(parts):
            explained -= {module for module in modules if module.startswith(network)}
    one = {role: prefix + found[0] for role, found in by_role.items()}
    norms = {role: norm_of(prefix + by_role[role][0], {prefix + n for n in inside})
             for role in by_role if role.endswith("_norm")}  # fmt: skip
    input_norm, ffn_norm = norms.get("input_norm"), norms.get("pre_ffn_norm")
    if ffn_norm is None and "post_ffn_norm" not in norms:
        # Llama's post_attention_layernorm is the FFN's input norm; beside a post-FFN norm it is attention's own.
        # Where there is neither, attention and FFN run in parallel on one norm.
        ffn_norm = norms.get("post_attention_norm", input_norm)
    after = [norms.get("post_attention_norm"), norms.get("post_ffn_norm")]
    routers = tuple(prefix + name for name in by_role.get("router", ()))
    fused = [one["gate_up"]] if "gate_up" in one else []
    ffn_inputs = [name for ff in feed_forwards for name in (ff.gate, ff.up) if name is not None]
    return Layer(
        index=index,
        prefix=prefix,
        input_norm=input_norm,
        attention_inputs=tuple(one[role] for role in ("q", "k", "v", "qkv") if role in one),
        q=one.get("q"),
        k=one.get("k"),
        v=one.get("v"),
        qkv=one.get("qkv"),
        o=one.get("o"),
        ffn_norm=ffn_norm,
        ffn_inputs=(*ffn_inputs, *fused, *routers),
        feed_forwards=feed_forwards,
        routers=routers,
        post_norms=tuple(norm for norm in after if norm and norm != ffn_norm),
        packed_experts=tuple(prefix + name for name in by_role.get("packed_experts", ())),
        unexplained=tuple(sorted(prefix + n for n in inside if re.sub(r"\.(weight|bias)$", "", n) not in explained)),
    )


def _norm(offset: float, centred: bool, module: str, present: set[str]) -> Norm | None:
    if f"{module}.weight" not in present:
        return None
    bias = f"{module}.bias" if f"{module}.bias" in present else None
    return Norm(f"{module}.weight", bias, offset, centred or bias is not None)


def _first(present: set[str], *names: str) -> str | None:
    return next((name for name in names if name in present), None)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the config's '{key}' is {value!r}; it must be a positive number")
    return value
