"""The quantized cache as transformers knows caches, and attention over it. Imported only where transformers is used.

`QuantizedCache` is passed as `past_key_values` to a model or to `generate`. By itself it decodes everything for every step,
which any attention understands; inside `packed_attention(model)` the model's attention function is numfit's own, reached by
transformers' registry of them, and reads the packed cache block by block.

A pass's own tokens are attended to as they are and join the cache behind it: a prompt taken at once is computed in full
precision, as by KIVI and by transformers' quantized cache, and in chunks it sees what later tokens will see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from numfit.errors import OptionError, require
from numfit.kvcache.attention import View, attend
from numfit.kvcache.names import preset, stream
from numfit.kvcache.store import Store
from numfit.kvcache.stream import Stream

require("transformers", "hf")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

ATTENTION = "numfit_kv"  # the name in transformers' registry
_VIEW = "_numfit_view"


class QuantizedLayer(DynamicLayer):
    """Keys and values of one layer."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, key: Stream, value: Stream, sink: int, residual: int, staging: torch.dtype | None, index: int,
                 config: Any) -> None:  # fmt: skip
        super().__init__()
        self.stores = tuple(
            Store(codec, sink, residual, f"{what} of layer {index}") for what, codec in (("keys", key), ("values", value))
        )
        self.staging, self.config = staging, config

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        sixteen = self.dtype in (torch.bfloat16, torch.float16)
        self.stage = self.staging or (self.dtype if sixteen else torch.bfloat16)
        for store, states in zip(self.stores, (key_states, value_states)):
            store.append(states[:, :, :0].to(self.stage))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in tokens [B, H, T, D]; give all keys and values, or, to numfit's attention, what stands for them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stores
        view = View(keys.snapshot(), values.snapshot(), key_states, value_states)
        for store, states in zip(self.stores, (key_states, value_states)):
            store.append(states.detach().to(self.stage))
        if not view.packed:
            return tuple(
                torch.cat([old.sinks.to(new.dtype), old.tail.to(new.dtype), new], 2)
                for old, new in ((view.keys, key_states), (view.values, value_states))
            )  # type: ignore[return-value]
        if getattr(self.config, "_attn_implementation", None) != ATTENTION:
            return view.materialize(key_states.dtype)
        return _stand_in(view, view.new_keys), _stand_in(view, view.new_values)

    def get_seq_length(self) -> int:
        return self.stores[0].length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + count, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.2

    def reset(self) -> None:
        for store in self.stores:
            store.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last −tokens_to_remove tokens; OptionError where they are encoded already."""
        if tokens_to_remove > 0:  # the older meaning: the length to keep
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        for store in self.stores:
            store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.map(change)


def _stand_in(view: View, new: Tensor) -> Tensor:
    """A tensor of the right shape that takes no memory and holds NaN, so that nobody computes with it unnoticed."""
    out = new.new_full((1, 1, 1, 1), math.nan).expand(*new.shape[:2], view.length, new.shape[-1])
    setattr(out, _VIEW, view)
    return out


class QuantizedCache(Cache):
    """A cache of encoded keys and values.

    Args:
        config: the model's own configuration (`model.config`).
        kv: a preset, or "KEYS,VALUES" (numfit.kvcache.names).
        key, value: a name or a `Stream`, instead of the preset's.
        sink: first tokens, never encoded.
        residual: last tokens, not encoded yet; there may be a step of 64 to 128 more.
        skip_first, skip_last: so many layers at either end keep their cache as it is.
        per_layer: layer → a preset, "KEYS,VALUES", a pair of streams, or None to keep it as it is.
        staging: dtype of sinks and residual; the model's own where that has 16 bits, else bfloat16.

    Only layers with full attention are encoded; sliding windows, linear attention and the like keep transformers' own.

    Raises:
        OptionError: an unknown name, a layer that is not there, or no layer to encode.
    """

    def __init__(
        self,
        config: Any,
        kv: str = "kv4",
        *,
        key: str | Stream | None = None,
        value: str | Stream | None = None,
        sink: int = 4,
        residual: int = 64,
        skip_first: int = 0,
        skip_last: int = 0,
        per_layer: Mapping[int, str | tuple[Stream, Stream] | None] | None = None,
        staging: torch.dtype | None = None,
    ) -> None:
        if min(sink, residual, skip_first, skip_last) < 0:
            raise OptionError("sink, residual, skip_first and skip_last count tokens and layers, and none is negative")
        decoder = config.get_text_config(decoder=True)
        pair = preset(kv)
        pair = (_stream(key, pair[0]), _stream(value, pair[1]))
        plain = DynamicCache(config=config).layers
        full = [i for i, layer in enumerate(plain) if type(layer) is DynamicLayer]
        chosen: dict[int, tuple[Stream, Stream] | None] = dict.fromkeys(
            full[skip_first : len(full) - skip_last], pair
        )
        for index, what in (per_layer or {}).items():
            if index not in full:
                raise OptionError(f"layer {index} has no cache that can be encoded; those that have are {full}")
            chosen[index] = preset(what) if isinstance(what, str) else what
        layers = list(plain)
        for index, codecs in chosen.items():
            if codecs is not None:
                layers[index] = QuantizedLayer(*codecs, sink, residual, staging, index, decoder)
        if not any(isinstance(layer, QuantizedLayer) for layer in layers):
            raise OptionError(
                "no layer's cache would be encoded: only layers of full attention are (sliding windows keep little already), "
                f"and this model has {len(full)}, of which {skip_first + skip_last} are skipped at the ends"
            )
        self.streams = pair
        super().__init__(layers=layers)

    def memory(self) -> dict[str, Any]:
        """Bytes of the encoded layers.

        Returns:
            packed: codes; metadata: scales, offsets, types, means; residual: sinks and the tail as they came; idle: allocated
            for tokens to come; plain: other layers; equivalent: the encoded layers' tokens in 16 bits; tokens; bits_per_value
            of what is encoded, and resident_bits of everything the encoded layers keep.
        """
        out: dict[str, Any] = {"packed": 0, "metadata": 0, "residual": 0, "idle": 0, "plain": 0, "equivalent": 0, "tokens": 0}
        encoded = values = 0
        for layer in self.layers:
            if not isinstance(layer, QuantizedLayer):
                tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
                out["plain"] += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
                continue
            for store in layer.stores:
                for name, count in store.memory().items():
                    out[name] += count
                if store.sinks is not None:
                    width = store.sinks.shape[0] * store.sinks.shape[1] * store.sinks.shape[-1]
                    encoded += width * store.count
                    values += width * store.length
            out["tokens"] = max(out["tokens"], layer.get_seq_length())
        out["equivalent"] = 2 * values
        out["bits_per_value"] = 8 * (out["packed"] + out["metadata"]) / encoded if encoded else None
        out["resident_bits"] = 8 * (out["packed"] + out["metadata"] + out["residual"]) / values if values else None
        return out


def _stream(given: str | Stream | None, default: Stream) -> Stream:
    return default if given is None else stream(given) if isinstance(given, str) else given


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
              scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
              position_bias: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the signature of transformers' interface: [B, H, T, D] in, [B, T, H, D] out."""
    view = getattr(key, _VIEW, None)
    special = softcap is not None or s_aux is not None
    if view is None and not special:  # nothing encoded: the same function, and bits, as without numfit
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs
        )
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask, key.shape[2])
    if view is None:
        empty = Store(stream("sym8-g32"), 0, 0, "")
        empty.append(key[:, :, :0])
        past, held = empty.snapshot(), Store(stream("sym8-g32"), 0, 0, "")
        held.append(value[:, :, :0])
        view = View(past, held.snapshot(), key, value)
        if attention_mask is None and query.shape[2] != key.shape[2]:
            attention_mask = _causal(query.shape[2], key.shape[2], query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query, view, scale, attention_mask, softcap, s_aux)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _causal(queries: int, length: int, device: torch.device) -> Tensor:
    """bool [1, 1, queries, length]: the queries are the last ones."""
    own = torch.arange(length - queries, length, device=device)[:, None]
    return (torch.arange(length, device=device) <= own)[None, None]


def _biased(bias: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """A bias and a mask as numbers to add."""
    if mask is None:
        mask = _causal(bias.shape[-2], length, bias.device)
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask


def register() -> None:
    """Tell transformers about the attention function, under the name `ATTENTION`."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """While inside, `model` attends to a `QuantizedCache` block by block instead of decoding it whole.

    Raises:
        OptionError: the model does not call its attention through transformers' registry.
    """
    register()
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, AttributeError) as error:
        raise OptionError(f"{type(model).__name__} cannot use another attention function: {error}") from None
    try:
        yield
    finally:
        model.set_attn_implementation(before)
