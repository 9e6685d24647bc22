"""Reconstruction: codes and scales learned against the outputs of the unquantized block."""

from numfit.reconstruction.blockwise import fast_bf16, reconstruct, weight
from numfit.reconstruction.progressive import progressive
from numfit.reconstruction.state import Options, Report, State

__all__ = ["Options", "Report", "State", "fast_bf16", "progressive", "reconstruct", "weight"]
