"""Side terms of a packed matrix, ready to be applied: y = (Q + B·A + S)·(R x), with Q·x' by the kernel of the base.

The input is rotated once by a compiled function, then the base's kernel runs as for any matrix, then the low-rank term and the
sparse corrections are added to its output. All of it takes fp32 activations; only the base quantizes them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.formats import QuantizedTensor
from numfit.formats.rotation import turn_native
from numfit.formats.side import Side, check_index, restore
from numfit.native import ERROR_BYTES, declare, library, refusal

_apply = (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_char_p)
declare("nf_add_lowrank", c_int, *_apply)
declare("nf_add_sparse", c_int, *_apply)


class SideTerms:
    """The terms of one matrix [N, K], in fp32 and int32: a little larger than in the file, and read as they are.

    Attributes:
        side: which terms there are.
        shape: (N, K).
        a: [rank, K]; b: [rank, N], B transposed; index, value: [N, count]. None where there is no such term.
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        """Raises FormatError where sparse corrections point out of the row."""
        self.side: Side = weight.format.side
        self.shape = (weight.shape[0], weight.shape[1])
        self._specs = weight.format.planes(weight.shape)
        terms = weight.terms()
        self.a = self.b = self.index = self.value = None
        if self.side.rank:
            self.a = terms["lowrank_a"].float().contiguous()
            self.b = terms["lowrank_b"].float().T.contiguous()
        if self.side.sparse:
            check_index(terms["sparse_index"], self.shape[1])
            self.index = terms["sparse_index"].int().contiguous()
            self.value = terms["sparse_value"].float().contiguous()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.a, self.b, self.index, self.value) if t is not None)

    @property
    def kernel(self) -> str:
        """What is done beside the base's kernel, in words."""
        words = [f"rank {self.side.rank}"] if self.side.rank else []
        words += [f"{self.side.outliers(self.shape[1])} sparse a row"] if self.side.sparse else []
        words += ["rotated input"] if self.side.rotation else []
        return ", ".join(words)

    def inputs(self, x: Tensor) -> Tensor:
        """What the base's kernel gets for x [T, K] (fp32 or bf16): fp32 [T, K]."""
        return x.float() if self.side.rotation is None else turn_native(x, self.side.rotation, False)

    def add(self, x: Tensor, y: Tensor) -> None:
        """y [T, N] += (B·A + S)·x', for x' [T, K] from `inputs`; both fp32 and contiguous."""
        lib, (n, k) = library(), self.shape
        assert lib is not None
        if x.shape != (len(x), k) or y.shape != (len(x), n) or any(
            t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous() for t in (x, y)
        ):
            raise OptionError(f"side terms of shape ({n}, {k}) cannot be added to {tuple(y.shape)} from {tuple(x.shape)}")
        error = ctypes.create_string_buffer(ERROR_BYTES)
        for function, left, right in ((lib.nf_add_lowrank, self.a, self.b), (lib.nf_add_sparse, self.index, self.value)):
            if left is None or right is None:
                continue
            size = len(left) if left is self.a else left.shape[1]
            where = (x.data_ptr(), len(x), k, left.data_ptr(), right.data_ptr(), size, n, y.data_ptr(), n)
            if failed := function(*where, error):
                raise refusal(failed, error, OptionError)

    def planes(self, index: Tensor | None = None) -> dict[str, Tensor]:
        """The planes as the file had them; of some rows, where `index` says so."""
        parts = {
            "lowrank_b": None if self.b is None else self.b.T,
            "lowrank_a": self.a,
            "sparse_index": self.index,
            "sparse_value": self.value,
        }
        out = {}
        for name, part in parts.items():
            if part is not None:
                part = part if index is None or name == "lowrank_a" else part[index]
                out[name] = part.to(self._specs[name].dtype).contiguous()
        return out

    def rows(self, index: Tensor, base: Tensor) -> Tensor:
        """Whole rows from decoded rows of the base [n, K], bit for bit what `QuantizedTensor.dequantize` gives."""
        return restore(self.side, base, self.planes(index), torch.float32)
