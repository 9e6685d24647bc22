"""The obvious way to apply a packed weight: decode a run of rows, multiply, go on.

Decoding costs a multiple of the multiplication when there is only one token, and every call pays it again: this path is
the yardstick for faster ones, not a fast one. What it does promise: works on every device and for every format, exactly
the decoded weights in the dtype of the input, and no decoded matrix larger than `CHUNK` weights at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from numfit.formats import QuantizedTensor

CHUNK = 1 << 24  # weights decoded at a time: 64 MiB in fp32, so that an output layer never stands in memory whole


def linear(x: Tensor, packed: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x · Ŵᵀ + bias, with Ŵ rounded to the dtype of `x`.

    Args:
        x: [..., K], any float dtype.
        packed: a weight of shape [N, K] on the device of `x`.
        bias: [N].

    Returns:
        [..., N] in the dtype of `x`.
    """
    rows, k = packed.shape
    step = max(1, CHUNK // max(k, 1))
    if rows <= step:
        return F.linear(x, packed.dequantize(x.dtype), bias)
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = packed.rows(slice(start, stop), x.dtype)  # [step, K]
        out[..., start:stop] = F.linear(x, weight, None if bias is None else bias[start:stop])
    return out


def embedding(ids: Tensor, packed: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a packed table; each row that occurs is decoded once, the others not at all.

    Args:
        ids: integers [...], each below the number of rows.
        packed: a table of shape [N, K] on the device of `ids`.
        dtype: of the result.

    Returns:
        [..., K].
    """
    rows, place = torch.unique(ids, return_inverse=True)
    return F.embedding(place, packed.rows(rows, dtype))
