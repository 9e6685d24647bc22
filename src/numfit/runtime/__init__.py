"""Loading and running models whose weights stay packed. Nothing here imports transformers until asked to load."""

from numfit.runtime.generate import Generated, generate
from numfit.runtime.loading import load
from numfit.runtime.modules import activations_in_use, decode_model, kernels_in_use, packed_bytes, use_kernels

__all__ = [
    "Generated",
    "activations_in_use",
    "decode_model",
    "generate",
    "kernels_in_use",
    "load",
    "packed_bytes",
    "use_kernels",
]
