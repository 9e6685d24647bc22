"""Loading and running models whose weights stay packed. Nothing here imports transformers until asked to load."""

from numfit.runtime.generate import Generated, generate
from numfit.runtime.loading import load
from numfit.runtime.modules import decode_model

__all__ = ["Generated", "decode_model", "generate", "load"]
