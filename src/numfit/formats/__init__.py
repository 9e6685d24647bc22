"""Formats: the ground floor. Values describe numeric types; verbs fit, encode, decode, pack."""

from numfit.formats.catalogue import bases, register
from numfit.formats.codec import decode, encode
from numfit.formats.fit import fit
from numfit.formats.format import Format, PlaneSpec
from numfit.formats.grid import Grid
from numfit.formats.names import format
from numfit.formats.params import Params
from numfit.formats.scale import Scale
from numfit.formats.tensor import QuantizedTensor, pack, quantize_tensor

__all__ = [
    "Format",
    "Grid",
    "Params",
    "PlaneSpec",
    "QuantizedTensor",
    "Scale",
    "bases",
    "decode",
    "encode",
    "fit",
    "format",
    "pack",
    "quantize_tensor",
    "register",
]
