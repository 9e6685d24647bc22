"""Reading a model of transformers into the description that the native decoder runs from (kernels/cpu/decoder.h).

Whether a model can be described is not told from its class but found out, part by part, from its modules and its
configuration; what is not understood is a reason to refuse. Norms and activations are tried on numbers.
"""

from __future__ import annotations

import ctypes
import inspect
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numfit.errors import NumfitError
from numfit.formats import QuantizedTensor
from numfit.formats.rotation import Rotation, constants
from numfit.kernels.side import SideTerms
from numfit.runtime.modules import QuantModule, packed_modules
from numfit.structure import Decoder, Layer, decoder_map

DENSE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum nf_dense
ROPE_TYPES = frozenset(["default", "linear", "llama3", "yarn"])  # tables that do not depend on the length of the text
ROPE_KEYS = frozenset(
    [
        "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    ]
)  # fmt: skip
LAYER_PARTS = frozenset(
    [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.act_fn", "mlp.activation_fn",
    ]
)  # fmt: skip


class RotationSpec(ctypes.Structure):
    """`nf_decoder_rotation`"""

    _fields_ = (("m", c_int64), ("signs", c_void_p), ("mixing", c_void_p))


class TermsSpec(ctypes.Structure):
    """`nf_decoder_terms`"""

    _fields_ = (
        ("rank", c_int64), ("sparse", c_int64), ("a", c_void_p), ("b", c_void_p), ("index", c_void_p), ("value", c_void_p),
    )  # fmt: skip


class LinearSpec(ctypes.Structure):
    """`nf_decoder_linear`"""

    _fields_ = (
        ("packed", c_void_p), ("dense", c_void_p), ("dense_kind", c_int32), ("reserved", c_int32),
        ("rows", c_int64), ("cols", c_int64), ("bias", c_void_p), ("rotation", c_void_p), ("terms", c_void_p),
    )  # fmt: skip


class LayerSpec(ctypes.Structure):
    """`nf_decoder_layer`"""

    _fields_ = (
        ("qkv", c_int32), ("o", c_int32), ("gate_up", c_int32), ("down", c_int32), ("linears", POINTER(LinearSpec)),
        ("input_norm", c_void_p), ("ffn_norm", c_void_p), ("post_attention_norm", c_void_p), ("post_ffn_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("rope", c_int32), ("reserved", c_int32), ("window", c_int64),
    )  # fmt: skip


class Spec(ctypes.Structure):
    """`nf_decoder_spec`"""

    _fields_ = (
        ("layers", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("hidden", c_int64),
        ("ffn", c_int64), ("vocab", c_int64), ("rotary", c_int64), ("ropes", c_int32), ("activation", c_int32),
        ("eps", c_float), ("embedding_scale", c_float), ("attention_scale", c_float), ("attention_softcap", c_float),
        ("logit_softcap", c_float), ("reserved", c_int32), ("layer", POINTER(LayerSpec)), ("final_norm", c_void_p),
        ("embedding", LinearSpec), ("head", LinearSpec),
    )  # fmt: skip


class Unsupported(Exception):
    """The model is not of the kind that the native loop serves; the text completes '… because '."""


@dataclass(frozen=True)
class Description:
    """`nf_decoder_spec` and what it does not hold.

    Attributes:
        kept: everything that the description points to.
        ropes: the rotary modules behind its tables, with the type of layer that they want to be told.
        activations: "int8" or "exact", as the model's layers have it.
    """

    spec: Spec
    kept: list[Any]
    ropes: list[tuple[Any, str | None]]
    activations: str


def describe(model: Any) -> Description:
    """Describe a causal language model of transformers.

    Raises:
        Unsupported: it is not of the kind that the native decoder serves.
    """
    return _Builder(model).description()


def rotary_table(module: Any, kind: str | None, room: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … room - 1 by the model's own module: fp32 [room, rotary] each."""
    extra = () if kind is None else (kind,)
    cos, sin = module(torch.zeros(1, dtype=torch.float32, device="cpu"), torch.arange(room, device="cpu")[None], *extra)
    return cos[0].contiguous(), sin[0].contiguous()


class _Builder:
    """Reads a model into a description. Everything that the description points to gathers in `kept`."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.kept: list[Any] = [model]
        self.ropes: list[tuple[Any, str | None]] = []
        if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
            raise Unsupported("the model is not on the CPU")
        packed = packed_modules(model)
        if not packed:
            raise Unsupported("the model's weights are not packed")
        names = {f"{path}.{name}" for path, module in packed for name in module._packed}
        names |= {name for name, _ in model.named_parameters()}
        try:
            self.map: Decoder = decoder_map(sorted(names), self.config.to_dict())
        except NumfitError as error:
            raise Unsupported(f"its structure is not understood: {error}") from None
        self.eps: set[float] = set()
        self.modes: set[str] = set()
        self.activations: set[int] = set()
        self.scales: set[float] = set()
        self.softcaps: set[float] = set()
        self.rotations: dict[tuple[int, Rotation], RotationSpec] = {}

    def description(self) -> Description:
        model, config, kept = self.model, self.config, self.kept
        if len(self.map.layers) != config.num_hidden_layers:
            raise Unsupported(f"it has {len(self.map.layers)} layers and its configuration says {config.num_hidden_layers}")
        if getattr(config, "use_bidirectional_attention", False):
            raise Unsupported("its attention is not causal")
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        final = self.map.final_norm
        if head is None or final is None:
            raise Unsupported("it has no output layer, or no norm before it")
        layers = (LayerSpec * len(self.map.layers))(*(self._layer(layer) for layer in self.map.layers))
        kept.append(layers)
        embedding, output = self._matrices(table, packed_only=False), self._matrices(head, packed_only=False)
        if len(embedding) != 1 or len(output) != 1:
            raise Unsupported("its embedding or its output layer is made of several tensors")
        scale = getattr(table, "embed_scale", 1.0)
        dtype = model.dtype
        spec = Spec(
            layers=len(layers),
            heads=self.map.heads,
            kv_heads=self.map.kv_heads,
            head_dim=self.map.head_dim,
            hidden=embedding[0].cols,
            ffn=self.ffn,
            vocab=embedding[0].rows,
            rotary=self._rotary(),
            ropes=len(self.ropes),
            activation=_one(self.activations, "activation functions"),
            embedding_scale=float(scale.to(dtype)) if isinstance(scale, Tensor) else float(scale),
            attention_scale=_one(self.scales, "attention scales"),
            attention_softcap=_one(self.softcaps, "soft caps"),
            logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0),
            layer=layers,
            final_norm=self._norm(final.weight.removesuffix(".weight"), final.offset, config.hidden_size),
            embedding=embedding[0],
            head=output[0],
        )
        spec.eps = _one(self.eps, "epsilons of norms")
        return Description(spec, kept, self.ropes, _one(self.modes, "kinds of activations"))

    def _layer(self, layer: Layer) -> LayerSpec:
        module = self.model.get_submodule(layer.prefix.removesuffix("."))
        for name, part in module.named_modules():
            known = name in LAYER_PARTS or any(part.children()) or isinstance(part, nn.Identity | nn.Dropout)
            own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            if not known or (own and name not in LAYER_PARTS):
                raise Unsupported(f"its layers have a part '{name}' that the native decoder does not know")
        attention, mlp = module.self_attn, module.mlp
        if layer.routers or layer.packed_experts or len(layer.feed_forwards) > 1:
            raise Unsupported("its layers have experts")
        if layer.input_norm is None or layer.ffn_norm is None or layer.ffn_norm == layer.input_norm:
            raise Unsupported("its norms do not stand before attention and before the feed-forward network")
        if not getattr(attention, "is_causal", True):
            raise Unsupported("its attention is not causal")
        try:
            down, act = mlp.down_proj, getattr(mlp, "act_fn", None) or mlp.activation_fn
            self.scales.add(float(attention.scaling))
        except AttributeError as error:
            raise Unsupported(f"its layers have no '{error.name}'") from None
        self.activations.add(_activation(act))
        self.softcaps.add(float(getattr(attention, "attn_logit_softcapping", None) or 0))
        parts = [
            [self.model.get_submodule(name) for name in layer.attention_inputs],
            [attention.o_proj],
            [self.model.get_submodule(name) for name in layer.ffn_inputs],
            [down],
        ]
        lists = [[linear for part in parts_of for linear in self._matrices(part)] for parts_of in parts]
        self.ffn = lists[3][0].cols
        linears = (LinearSpec * sum(map(len, lists)))(*(linear for group in lists for linear in group))
        self.kept.append(linears)

        def norm(name: str, size: int = self.config.hidden_size) -> int | None:
            return self._norm(layer.prefix + name, layer.input_norm.offset, size, module) if layer.input_norm else None

        before_ffn = layer.ffn_norm.weight.removeprefix(layer.prefix).removesuffix(".weight")
        rope, window = self._position(attention, layer.index)
        return LayerSpec(
            *map(len, lists),
            linears=linears,
            input_norm=norm("input_layernorm"),
            ffn_norm=norm(before_ffn),
            post_attention_norm=norm("post_attention_layernorm") if before_ffn != "post_attention_layernorm" else None,
            post_ffn_norm=norm("post_feedforward_layernorm"),
            q_norm=norm("self_attn.q_norm", self.map.head_dim),
            k_norm=norm("self_attn.k_norm", self.map.head_dim),
            rope=rope,
            window=window,
        )

    def _position(self, attention: Any, index: int) -> tuple[int, int]:
        """Which rotary table a layer uses, and its window (0: none)."""
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[index] if kinds else None
        if kind not in (None, "full_attention", "sliding_attention"):
            raise Unsupported(f"it has layers of type '{kind}'")
        # Where layers do not say what they are, the configuration speaks for all of them (Mistral).
        window = (
            attention.sliding_window if hasattr(attention, "sliding_window") else getattr(self.config, "sliding_window", None)
        )
        if kind == "full_attention":
            window = None
        elif kind == "sliding_attention" and not window:
            raise Unsupported("it has sliding windows of unknown size")
        if not getattr(attention, "use_rope", True):
            return -1, window or 0
        rotary = getattr(self.model.base_model, "rotary_emb", None)
        if rotary is None:
            raise Unsupported("it has no rotary positions")
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        parameters = getattr(self.config, "rope_parameters", None) or {}
        parameters = parameters.get(kind) or {} if typed else parameters
        if parameters.get("rope_type", "default") not in ROPE_TYPES or not parameters.keys() <= ROPE_KEYS:
            raise Unsupported(f"its rotary positions are of an unknown kind ({parameters})")
        use = (rotary, kind if typed else None)
        if use not in self.ropes:
            self.ropes.append(use)
        return self.ropes.index(use), window or 0

    def _rotary(self) -> int:
        return int(_one({rotary_table(*rope, 1)[0].shape[-1] for rope in self.ropes} or {0}, "sizes of rotary tables"))

    def _norm(self, name: str, offset: float, size: int, within: nn.Module | None = None) -> int | None:
        """The gain of an RMS norm over `size` numbers, tried on random numbers; None where the layer has no such norm."""
        owner = self.model
        for step in name.split("."):
            owner = getattr(owner, step, None)
            if owner is None:
                return None
        if within is not None and owner not in set(within.modules()):
            return None
        gain = offset + owner.weight.detach().float()
        if gain.shape != (size,):
            raise Unsupported(f"'{name}' is a norm over {gain.numel()} numbers, and the native decoder has it over {size}")
        eps = getattr(owner, "variance_epsilon", getattr(owner, "eps", None))
        plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
        x = torch.randn(4, len(gain), generator=torch.Generator().manual_seed(0), **plain)
        x *= torch.tensor([[1e-3], [1.0], [8.0], [1.0]], **plain)
        want = F.rms_norm(x, gain.shape, gain, float(eps or 0))
        have = owner(x.to(self.model.dtype)).float()
        rough = 1e-5 if self.model.dtype == torch.float32 else 2e-2
        if (
            not isinstance(eps, float)
            or getattr(owner, "bias", None) is not None
            or not torch.allclose(have, want, rough, rough)
        ):
            raise Unsupported(f"'{name}' is not a norm that the native decoder knows")
        self.eps.add(eps)
        self.kept.append(gain.contiguous())
        return self.kept[-1].data_ptr()

    def _matrices(self, module: nn.Module, packed_only: bool = True) -> list[LinearSpec]:
        """The tensors that a linear layer or an embedding is made of, in the order of its rows."""
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach().float().contiguous()
        self.kept.append(bias)
        linears: list[LinearSpec] = []
        row = 0
        for part in self._pieces(module, packed_only):
            rows, cols = part.shape
            entry = LinearSpec(rows=rows, cols=cols)
            if isinstance(part, Tensor):
                entry.dense_kind = DENSE_KINDS[part.dtype]
                entry.dense = part.data_ptr()
            else:
                entry.packed = part.handle
                if part.side is not None:
                    self._side(entry, part.side)
            if bias is not None:
                entry.bias = bias[row:].data_ptr()
            self.kept.append(part)
            linears.append(entry)
            row += rows
        return linears

    def _side(self, entry: LinearSpec, terms: SideTerms) -> None:
        """Point `entry` to its rotation, one for all matrices that have it, and to its other terms."""
        side, columns = terms.side, int(entry.cols)
        if side.rotation is not None:
            key = (columns, side.rotation)
            if key not in self.rotations:
                signs, mixing = constants(*key)
                self.kept += [signs, mixing]
                self.rotations[key] = RotationSpec(len(mixing), signs.data_ptr(), mixing.data_ptr())
                self.kept.append(self.rotations[key])
            entry.rotation = ctypes.addressof(self.rotations[key])
        if side.stored:
            count = side.outliers(columns)
            places = (None if t is None else t.data_ptr() for t in (terms.a, terms.b, terms.index, terms.value))
            spec = TermsSpec(side.rank, count, *places)
            self.kept += [terms, spec]
            entry.terms = ctypes.addressof(spec)

    def _pieces(self, module: nn.Module, packed_only: bool) -> list[Any]:
        """Packed pieces and dense ones [rows, K]; dense ones only where they are allowed."""
        if isinstance(module, QuantModule) and isinstance(module, nn.Linear | nn.Embedding):
            packed = module._packed["weight"]
            if packed.transposed:
                raise Unsupported("its weights are stored transposed")
            pieces: list[Any] = [packed.piece(index) for index in range(len(packed.pieces))]
            if any(isinstance(piece, QuantizedTensor) for piece in pieces):
                why = next(iter(packed.refused.values()), "the reference path was asked for")
                raise Unsupported(f"'{packed.pieces[0].source}' is not in the layout of the CPU kernels: {why}")
            if packed.activations:
                self.modes.add(packed.activations)
        elif isinstance(module, nn.Linear | nn.Embedding):
            pieces = [module.weight.detach()]
        else:
            raise Unsupported(f"it has a {type(module).__name__} where a linear layer was expected")
        for piece in pieces:
            if isinstance(piece, Tensor) and (packed_only or piece.dtype not in DENSE_KINDS or not piece.is_contiguous()):
                raise Unsupported("some weights of its layers are not packed")
        return pieces


def _activation(function: Any) -> int:
    """0 for SiLU, 1 for GELU with tanh."""
    x = torch.linspace(-8, 8, 1001, dtype=torch.float32, device="cpu")
    for number, known in enumerate((F.silu(x), F.gelu(x, approximate="tanh"))):
        if torch.allclose(function(x), known, 1e-5, 1e-6):
            return number
    raise Unsupported(f"its activation function ({type(function).__name__}) is neither SiLU nor GELU with tanh")


def _one(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        raise Unsupported(f"its layers have different {what}: {sorted(values)}")
    return next(iter(values))
