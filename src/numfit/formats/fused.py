"""Elementwise chains as one loop: torch.compile where it pays and works, the same function run eagerly elsewhere.

Eager PyTorch writes every intermediate to memory, which makes a chain of compares some 45 times slower than one fused
pass (performance.md section 6). A compilation costs seconds, so callers ask for it on large problems only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_state = {"works": True}


@lru_cache(maxsize=16)
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def try_fused(function: Callable[..., Tensor], *args: object) -> Tensor | None:
    """Run `function` as one compiled loop, or return None (warning once) where no kernel can be built."""
    if not _state["works"]:
        return None
    try:
        with torch._dynamo.config.patch(recompile_limit=256):  # one graph per number of ranks and members
            return _compiled(function)(*args)
    except Exception as error:  # torch raises many kinds here; all mean that no fused kernel can be built
        _state["works"] = False
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"torch.compile cannot build a fused kernel ({reason}); numfit goes on without, several times slower. "
            "A working C++ compiler (g++) and the Python headers would mend it.",
            stacklevel=2,
        )
        return None
