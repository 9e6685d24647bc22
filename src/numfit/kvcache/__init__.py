"""The KV cache: streaming codecs for keys and values, a quantized cache for transformers, attention over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numfit.kvcache.attention import View, attend
from numfit.kvcache.names import PRESETS, doubt, preset, stream
from numfit.kvcache.stream import Stream, constants, decode, encode

if TYPE_CHECKING:
    from numfit.kvcache.cache import QuantizedCache as QuantizedCache
    from numfit.kvcache.cache import packed_attention as packed_attention
    from numfit.kvcache.cache import register as register

__all__ = [
    "PRESETS",
    "QuantizedCache",
    "Stream",
    "View",
    "attend",
    "constants",
    "decode",
    "doubt",
    "encode",
    "packed_attention",
    "preset",
    "register",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in ("QuantizedCache", "packed_attention", "register"):  # they need transformers
        from numfit.kvcache import cache

        return getattr(cache, name)
    raise AttributeError(f"module 'numfit.kvcache' has no attribute '{name}'")
