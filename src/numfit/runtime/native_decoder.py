"""A packed decoder run by one native loop (kernels/cpu/decoder.h) instead of a thousand Python calls a token.

One description serves all architectures that are made of the same parts. Whether a model is such a one is not told from its
class but found out, part by part, from its modules and its configuration; what is not understood is a reason to leave the
model to transformers. Norms and activations are tried on numbers, rotary tables are computed by the model's own module, and at
last the whole is proven: on a few tokens its logits must be those of transformers.

The key/value cache is fp16 and grows by doubling. Gives up: batches, other devices than the CPU, gradients.
"""

from __future__ import annotations

import ctypes
import inspect
import warnings
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numfit import native
from numfit.errors import NumfitError, OptionError
from numfit.runtime.modules import QuantModule, packed_modules
from numfit.structure import Decoder, Layer, decoder_map

PROOF_TOKENS = 8
# Largest root mean square difference of the logits, relative to their spread, by the type of the model's activations: native
# sums are fp32 with an fp16 cache, so what is tolerated is mostly the rounding of transformers.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
FIRST_ROOM = 1024  # positions
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


class _Linear(ctypes.Structure):
    """`nf_decoder_linear`"""

    _fields_ = (
        ("packed", c_void_p), ("dense", c_void_p), ("dense_kind", c_int32), ("reserved", c_int32),
        ("rows", c_int64), ("cols", c_int64), ("bias", c_void_p),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    """`nf_decoder_layer`"""

    _fields_ = (
        ("qkv", c_int32), ("o", c_int32), ("gate_up", c_int32), ("down", c_int32), ("linears", POINTER(_Linear)),
        ("input_norm", c_void_p), ("ffn_norm", c_void_p), ("post_attention_norm", c_void_p), ("post_ffn_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("rope", c_int32), ("reserved", c_int32), ("window", c_int64),
    )  # fmt: skip


class _Spec(ctypes.Structure):
    """`nf_decoder_spec`"""

    _fields_ = (
        ("layers", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("hidden", c_int64),
        ("ffn", c_int64), ("vocab", c_int64), ("rotary", c_int64), ("ropes", c_int32), ("activation", c_int32),
        ("eps", c_float), ("embedding_scale", c_float), ("attention_scale", c_float), ("attention_softcap", c_float),
        ("logit_softcap", c_float), ("reserved", c_int32), ("layer", POINTER(_Layer)), ("final_norm", c_void_p),
        ("embedding", _Linear), ("head", _Linear),
    )  # fmt: skip


native.declare("nf_decoder_create", c_void_p, POINTER(_Spec), ctypes.c_char_p)
native.declare("nf_decoder_free", None, c_void_p)
native.declare("nf_decoder_reserve", c_int, c_void_p, c_int64, c_void_p, c_void_p, ctypes.c_char_p)
native.declare("nf_decoder_length", c_int64, c_void_p)
native.declare("nf_decoder_bytes", c_int64, c_void_p)
native.declare("nf_decoder_forward", c_int, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, c_void_p, ctypes.c_char_p)


class _Unsupported(Exception):
    """The model is not of the kind that the native loop serves; the text completes '… because '."""


class NativeDecoder:
    """A model in the native loop. It refers to the model's packed weights and keeps them alive.

    Attributes:
        vocabulary: tokens that the output layer knows.
        exact: fp32 activations instead of int8 ones.
        threads: that a call uses.
    """

    def __init__(self, spec: _Spec, kept: list[Any], ropes: list[tuple[Any, str | None]], exact: bool) -> None:
        library = native.library()
        assert library is not None
        self._library, self._kept, self._ropes, self._rotary = library, kept, ropes, int(spec.rotary)
        self.vocabulary, self.exact, self.threads = int(spec.vocab), exact, torch.get_num_threads()
        self._error = ctypes.create_string_buffer(native.ERROR_BYTES)
        self._room = 0
        self._handle = library.nf_decoder_create(ctypes.byref(spec), self._error)
        if not self._handle:
            raise _Unsupported(self._error.value.decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.nf_decoder_free(self._handle)
            self._handle = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._library.nf_decoder_length(self._handle))

    @property
    def nbytes(self) -> int:
        """Bytes of cache, rotary tables and work space; weights are not counted."""
        return int(self._library.nf_decoder_bytes(self._handle))

    def forward(self, tokens: Sequence[int] | Tensor, start: int, *, every: bool = False, out: Tensor | None = None) -> Tensor:
        """Run tokens that stand at position `start` and after it; what the cache held from there on is forgotten.

        Args:
            tokens: token numbers [T].
            start: at most `length`.
            every: logits of all tokens instead of the last one's.
            out: where to write them.

        Returns:
            fp32 [vocabulary], or [T, vocabulary].

        Raises:
            OptionError: no tokens, one out of the vocabulary, a gap before `start`; `out` does not fit.
            NumfitError: not enough memory.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64).contiguous()
        shape = (len(ids), self.vocabulary) if every else (self.vocabulary,)
        out = torch.empty(shape, dtype=torch.float32) if out is None else out
        if ids.ndim != 1 or out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
            raise OptionError(
                f"the decoder takes tokens [T] and writes fp32 logits {shape}, not {tuple(out.shape)} {out.dtype}"
            )
        if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary or not 0 <= start <= self.length:
            raise OptionError(
                f"the decoder takes one token or more, each below {self.vocabulary}, from a position up to {self.length} on"
            )
        self._reserve(start + len(ids))
        self._library.nf_set_threads(self.threads)
        if self._library.nf_decoder_forward(
            self._handle, ids.data_ptr(), len(ids), start, int(self.exact), int(every), out.data_ptr(), self._error
        ):
            raise NumfitError(self._error.value.decode())
        return out

    def logits(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Logits after each of the tokens of a new text: fp32 [T, vocabulary]."""
        return self.forward(tokens, 0, every=True)

    def _reserve(self, positions: int) -> None:
        if positions <= self._room:
            return
        room = max(FIRST_ROOM, 1 << (positions - 1).bit_length())
        shape = (len(self._ropes), room, self._rotary)
        tables = [torch.cat(part).reshape(shape) if part else torch.empty(shape) for part in self._tables(room)]
        if self._library.nf_decoder_reserve(self._handle, room, tables[0].data_ptr(), tables[1].data_ptr(), self._error):
            raise NumfitError(self._error.value.decode())
        self._room = room

    def _tables(self, room: int) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [_rotary_table(module, kind, room) for module, kind in self._ropes]
        return [cos for cos, _ in pairs], [sin for _, sin in pairs]


def build(model: Any, *, exact: bool = False) -> tuple[NativeDecoder | None, str]:
    """The native loop for a model of transformers, proven on a few tokens.

    Args:
        model: a causal language model whose linears are packed, on the CPU.
        exact: fp32 activations instead of int8 ones.

    Returns:
        (decoder, ""), or (None, why there is none: it completes "transformers' own code runs, because …").
    """
    try:
        if native.library() is None:
            raise _Unsupported("the CPU kernels are not installed")
        with torch.inference_mode():
            decoder = _Builder(model).decoder(exact)
            _prove(model, decoder)
        return decoder, ""
    except _Unsupported as reason:
        return None, str(reason)


def _prove(model: Any, decoder: NativeDecoder) -> None:
    """Compare the logits of a few tokens with those of transformers, both with fp32 activations."""
    ids = torch.randint(0, decoder.vocabulary, (PROOF_TOKENS,), generator=torch.Generator().manual_seed(0))
    want = model(input_ids=ids[None], use_cache=False).logits[0].float()
    wanted, decoder.exact = decoder.exact, True
    have = decoder.logits(ids)
    decoder.exact = wanted
    error = float((have - want).square().mean().sqrt() / want.std())
    if not error <= TOLERANCE.get(model.dtype, 0.0):
        warnings.warn(
            f"the native decoder disagrees with transformers on {type(model).__name__} (relative difference of the logits "
            f"{error:.2g}) and is not used",
            stacklevel=3,
        )
        raise _Unsupported(f"the native decoder's logits differ from those of {type(model).__name__} by {error:.2g}")


def _rotary_table(module: Any, kind: str | None, room: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … room - 1 by the model's own module: fp32 [room, rotary] each."""
    extra = () if kind is None else (kind,)
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(room)[None], *extra)
    return cos[0].contiguous(), sin[0].contiguous()


class _Builder:
    """Reads a model into a description. Everything that the description points to gathers in `kept`."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.kept: list[Any] = [model]
        self.ropes: list[tuple[Any, str | None]] = []
        if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
            raise _Unsupported("the model is not on the CPU")
        packed = packed_modules(model)
        if not packed:
            raise _Unsupported("the model's weights are not packed")
        names = {f"{path}.{name}" for path, module in packed for name in module._packed}
        names |= {name for name, _ in model.named_parameters()}
        try:
            self.map: Decoder = decoder_map(sorted(names), self.config.to_dict())
        except NumfitError as error:
            raise _Unsupported(f"its structure is not understood: {error}") from None
        self.eps: set[float] = set()
        self.activations: set[int] = set()
        self.scales: set[float] = set()
        self.softcaps: set[float] = set()

    def decoder(self, exact: bool) -> NativeDecoder:
        model, config, kept = self.model, self.config, self.kept
        if len(self.map.layers) != config.num_hidden_layers:
            raise _Unsupported(f"it has {len(self.map.layers)} layers and its configuration says {config.num_hidden_layers}")
        if getattr(config, "use_bidirectional_attention", False):
            raise _Unsupported("its attention is not causal")
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or self.map.final_norm is None:
            raise _Unsupported("it has no output layer, or no norm before it")
        layers = (_Layer * len(self.map.layers))(*(self._layer(layer) for layer in self.map.layers))
        kept.append(layers)
        embedding, output = self._matrices(table, packed_only=False), self._matrices(head, packed_only=False)
        if len(embedding) != 1 or len(output) != 1:
            raise _Unsupported("its embedding or its output layer is made of several tensors")
        scale = getattr(table, "embed_scale", 1.0)
        dtype = model.dtype
        spec = _Spec(
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
            final_norm=self._norm(self.map.final_norm.weight.removesuffix(".weight"), self.map.final_norm.offset, None),
            embedding=embedding[0],
            head=output[0],
        )
        spec.eps = _one(self.eps, "epsilons of norms")
        return NativeDecoder(spec, kept, self.ropes, exact)

    def _layer(self, layer: Layer) -> _Layer:
        module = self.model.get_submodule(layer.prefix.removesuffix("."))
        for name, part in module.named_modules():
            known = name in LAYER_PARTS or any(part.children()) or isinstance(part, nn.Identity | nn.Dropout)
            own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            if not known or (own and name not in LAYER_PARTS):
                raise _Unsupported(f"its layers have a part '{name}' that the native decoder does not know")
        attention, mlp = module.self_attn, module.mlp
        if layer.routers or layer.packed_experts or len(layer.feed_forwards) > 1:
            raise _Unsupported("its layers have experts")
        if layer.input_norm is None or layer.ffn_norm is None or layer.ffn_norm == layer.input_norm:
            raise _Unsupported("its norms do not stand before attention and before the feed-forward network")
        if not getattr(attention, "is_causal", True):
            raise _Unsupported("its attention is not causal")
        try:
            down, act = mlp.down_proj, getattr(mlp, "act_fn", None) or mlp.activation_fn
            self.scales.add(float(attention.scaling))
        except AttributeError as error:
            raise _Unsupported(f"its layers have no '{error.name}'") from None
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
        linears = (_Linear * sum(map(len, lists)))(*(linear for group in lists for linear in group))
        self.kept.append(linears)

        def norm(name: str) -> int | None:
            return self._norm(layer.prefix + name, layer.input_norm.offset, module) if layer.input_norm else None

        before_ffn = layer.ffn_norm.weight.removeprefix(layer.prefix).removesuffix(".weight")
        rope, window = self._position(attention, layer.index)
        return _Layer(
            *map(len, lists),
            linears=linears,
            input_norm=norm("input_layernorm"),
            ffn_norm=norm(before_ffn),
            post_attention_norm=norm("post_attention_layernorm") if before_ffn != "post_attention_layernorm" else None,
            post_ffn_norm=norm("post_feedforward_layernorm"),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            rope=rope,
            window=window,
        )

    def _position(self, attention: Any, index: int) -> tuple[int, int]:
        """Which rotary table a layer uses, and its window (0: none)."""
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[index] if kinds else None
        if kind not in (None, "full_attention", "sliding_attention"):
            raise _Unsupported(f"it has layers of type '{kind}'")
        # Where layers do not say what they are, the configuration speaks for all of them (Mistral).
        window = (
            attention.sliding_window if hasattr(attention, "sliding_window") else getattr(self.config, "sliding_window", None)
        )
        if kind == "full_attention":
            window = None
        elif kind == "sliding_attention" and not window:
            raise _Unsupported("it has sliding windows of unknown size")
        if not getattr(attention, "use_rope", True):
            return -1, window or 0
        rotary = getattr(self.model.base_model, "rotary_emb", None)
        if rotary is None:
            raise _Unsupported("it has no rotary positions")
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        parameters = getattr(self.config, "rope_parameters", None) or {}
        parameters = parameters.get(kind) or {} if typed else parameters
        if parameters.get("rope_type", "default") not in ROPE_TYPES or not parameters.keys() <= ROPE_KEYS:
            raise _Unsupported(f"its rotary positions are of an unknown kind ({parameters})")
        use = (rotary, kind if typed else None)
        if use not in self.ropes:
            self.ropes.append(use)
        return self.ropes.index(use), window or 0

    def _rotary(self) -> int:
        return int(_one({_rotary_table(*rope, 1)[0].shape[-1] for rope in self.ropes} or {0}, "sizes of rotary tables"))

    def _norm(self, name: str, offset: float, within: nn.Module | None) -> int | None:
        """The gain of an RMS norm, tried on random numbers; None where the layer has no such norm."""
        owner = self.model
        for step in name.split("."):
            owner = getattr(owner, step, None)
            if owner is None:
                return None
        if within is not None and owner not in set(within.modules()):
            return None
        gain = offset + owner.weight.detach().float()
        eps = getattr(owner, "variance_epsilon", getattr(owner, "eps", None))
        x = torch.randn(4, len(gain), generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [8.0], [1.0]])
        want = F.rms_norm(x, gain.shape, gain, float(eps or 0))
        have = owner(x.to(self.model.dtype)).float()
        rough = 1e-5 if self.model.dtype == torch.float32 else 2e-2
        if (
            not isinstance(eps, float)
            or getattr(owner, "bias", None) is not None
            or not torch.allclose(have, want, rough, rough)
        ):
            raise _Unsupported(f"'{name}' is not a norm that the native decoder knows")
        self.eps.add(eps)
        self.kept.append(gain.contiguous())
        return self.kept[-1].data_ptr()

    def _matrices(self, module: nn.Module, packed_only: bool = True) -> list[_Linear]:
        """The tensors that a linear layer or an embedding is made of, in the order of its rows."""
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach().float().contiguous()
        self.kept.append(bias)
        linears: list[_Linear] = []
        row = 0
        for part in self._pieces(module, packed_only):
            rows, cols = part.shape
            entry = _Linear(rows=rows, cols=cols)
            if isinstance(part, Tensor):
                entry.dense_kind = DENSE_KINDS[part.dtype]
                entry.dense = part.data_ptr()
            else:
                entry.packed = _handle(part)
            if bias is not None:
                entry.bias = bias[row:].data_ptr()
            self.kept.append(part)
            linears.append(entry)
            row += rows
        return linears

    def _pieces(self, module: nn.Module, packed_only: bool) -> list[Any]:
        """Packed pieces and dense ones [rows, K]; dense ones only where they are allowed."""
        if isinstance(module, QuantModule) and isinstance(module, nn.Linear | nn.Embedding):
            packed = module._packed["weight"]
            if packed.transposed:
                raise _Unsupported("its weights are stored transposed")
            pieces: list[Any] = [packed.piece(index) for index in range(len(packed.pieces))]
        elif isinstance(module, nn.Linear | nn.Embedding):
            pieces = [module.weight.detach()]
        else:
            raise _Unsupported(f"it has a {type(module).__name__} where a linear layer was expected")
        for piece in pieces:
            if isinstance(piece, Tensor) and (packed_only or piece.dtype not in DENSE_KINDS or not piece.is_contiguous()):
                raise _Unsupported("some weights of its layers are not packed")
        return pieces


def _handle(piece: Any) -> int:
    """Address of a packed matrix in the kernels' layout."""
    handle = getattr(piece, "handle", None)
    if not handle:
        raise _Unsupported("some of its weights are in a format without a CPU kernel")
    return int(handle)


def _activation(function: Any) -> int:
    """0 for SiLU, 1 for GELU with tanh."""
    x = torch.linspace(-8, 8, 1001)
    for number, known in enumerate((F.silu(x), F.gelu(x, approximate="tanh"))):
        if torch.allclose(function(x), known, 1e-5, 1e-6):
            return number
    raise _Unsupported(f"its activation function ({type(function).__name__}) is neither SiLU nor GELU with tanh")


def _one(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        raise _Unsupported(f"its layers have different {what}: {sorted(values)}")
    return next(iter(values))
