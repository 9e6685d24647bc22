"""Applying packed weights: `linear` and `embedding`, for now by the reference path in PyTorch."""

from numfit.kernels.reference import embedding, linear

__all__ = ["embedding", "linear"]
