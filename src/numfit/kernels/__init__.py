"""Applying packed weights: by native CPU kernels where a weight is in their layout, else by the reference path in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats import QuantizedTensor
from numfit.kernels import reference
from numfit.kernels.packed import ACTIVATIONS, PackedLinear, kernel_of

__all__ = ["ACTIVATIONS", "PackedLinear", "embedding", "kernel_of", "linear"]


def linear(
    x: Tensor, weight: QuantizedTensor | PackedLinear, bias: Tensor | None = None, activations: str = "int8"
) -> Tensor:
    """x · Ŵᵀ + bias: x [..., K] → [..., N]. `activations` is for the kernels; the reference path is always exact."""
    if isinstance(weight, PackedLinear):
        return weight.apply(x, bias, activations)
    return reference.linear(x, weight, bias)


def embedding(ids: Tensor, weight: QuantizedTensor | PackedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a packed table [N, K]: integers [...] → [..., K] in `dtype`."""
    if isinstance(weight, PackedLinear):
        return weight.rows(ids).to(dtype).view(*ids.shape, weight.shape[1])
    return reference.embedding(ids, weight, dtype)
