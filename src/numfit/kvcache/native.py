"""The packed part of attention by the compiled kernel."""

from __future__ import annotations

from torch import Tensor

from numfit.kvcache.store import Snapshot


def attend(query: Tensor, keys: Snapshot, values: Snapshot, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    return None
