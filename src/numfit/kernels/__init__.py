"""Applying packed weights: `linear` and `embedding`. The PyTorch path of `reference` is the one that all others are tested against."""

from numfit.kernels.reference import embedding, linear

__all__ = ["embedding", "linear"]
