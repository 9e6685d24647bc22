"""The tokens of one layer's keys, or of its values: sinks and a residual window as they came, everything between encoded.

    [ sinks | packed, in blocks of a fixed number of tokens | tail ]

New tokens join the tail. When the tail holds the residual window and a whole step beside it, its oldest steps are encoded,
once and for all. How many tokens are encoded depends on how many have come and on nothing else, and a token's codes on its
own numbers (and its window's, and the layer's constants, which come from fixed positions): in what chunks the tokens came
does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.kvcache.coders import Planes
from numfit.kvcache.stream import Constants, Stream, constants, decode, encode

STEP = 64  # tokens encoded together at least: Python's overhead is paid once a step
BLOCK = 256  # tokens of a block at least: what attention decodes at a time, and what may lie idle at the end
_PIECE = 1024  # tokens encoded at a time, to bound the memory of doing so


def step(stream: Stream) -> int:
    """Tokens by which the packed part grows."""
    return stream.unit * -(-STEP // stream.unit)


def block_tokens(stream: Stream) -> int:
    """Tokens of a block."""
    return step(stream) * -(-BLOCK // step(stream))


def packed_count(stream: Stream, body: int, residual: int) -> int:
    """How many of `body` tokens after the sinks are encoded."""
    if body < stream.calibration:
        return 0
    return max(0, (body - residual) // step(stream) * step(stream))


@dataclass(frozen=True)
class Snapshot:
    """The tokens at one moment. Blocks are shared with the store, which only ever writes behind `count`."""

    stream: Stream
    dim: int
    const: Constants
    sinks: Tensor  # [B, H, s, D]
    blocks: list[Planes]
    count: int  # packed tokens
    tail: Tensor  # [B, H, r, D]

    @property
    def sink(self) -> int:
        return self.sinks.shape[2]

    @property
    def length(self) -> int:
        return self.sink + self.count + self.tail.shape[2]

    def cuts(self) -> list[int]:
        """Positions at which one region ends and the next begins, blocks included."""
        size = block_tokens(self.stream)
        return [0, self.sink, *range(self.sink + size, self.sink + self.count, size), self.sink + self.count, self.length]

    def is_packed(self, start: int) -> bool:
        return self.sink <= start < self.sink + self.count

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start … stop, which must not cross a cut: fp32 [B, H, n, D], packed ones in the stream's basis."""
        if start < self.sink:
            return self.sinks[:, :, start:stop].float()
        if start >= self.sink + self.count:
            behind = self.sink + self.count
            return self.tail[:, :, start - behind : stop - behind].float()
        size = block_tokens(self.stream)
        block, first = divmod(start - self.sink, size)
        unit = self.stream.unit
        rows = slice(first // unit, -(-(first + stop - start) // unit))
        tokens = decode(self.stream, {k: p[:, :, rows] for k, p in self.blocks[block].items()}, self.dim, self.const)
        skip = first % unit
        return tokens[:, :, skip : skip + stop - start]


class Store:
    """Keys or values of one layer, growing."""

    def __init__(self, stream: Stream, sink: int, residual: int, where: str) -> None:
        self.stream, self.sink, self.residual, self.where = stream, sink, residual, where
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.const: Constants = {}
        self.blocks: list[Planes] = []
        self.count = 0
        self.sinks: Tensor | None = None
        self.tail: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.sinks is None or self.tail is None else self.sinks.shape[2] + self.count + self.tail.shape[2]

    def snapshot(self) -> Snapshot:
        assert self.sinks is not None and self.tail is not None
        return Snapshot(self.stream, self.sinks.shape[-1], self.const, self.sinks, self.blocks, self.count, self.tail)

    def append(self, x: Tensor) -> None:
        """Take in tokens [B, H, T, D], already in the dtype of the staging."""
        if self.sinks is None or self.tail is None:
            self.sinks = self.tail = x[:, :, :0]
        missing = min(self.sink - self.sinks.shape[2], x.shape[2])
        if missing > 0:
            self.sinks = torch.cat([self.sinks, x[:, :, :missing]], 2)
            x = x[:, :, missing:]
        if x.shape[2]:
            self.tail = torch.cat([self.tail, x], 2)
            self._pack()

    def _pack(self) -> None:
        assert self.tail is not None
        due = packed_count(self.stream, self.count + self.tail.shape[2], self.residual) - self.count
        if due <= 0:
            return
        if self.stream.calibration and not self.const:
            self.const = constants(self.stream, self.tail[:, :, : self.stream.calibration])
        size = block_tokens(self.stream)
        done = 0
        piece = _PIECE // step(self.stream) * step(self.stream) or step(self.stream)
        while done < due:
            first = self.count % size
            n = min(due - done, size - first, piece)
            where = f"{self.where}, position {self.sink + self.count}"
            planes = encode(self.stream, self.tail[:, :, done : done + n], self.const, where)
            if first == 0:
                rows_of_block = size // self.stream.unit
                self.blocks.append({k: p.new_empty((*p.shape[:2], rows_of_block, *p.shape[3:])) for k, p in planes.items()})
            rows = slice(first // self.stream.unit, (first + n) // self.stream.unit)
            for name, plane in planes.items():
                self.blocks[-1][name][:, :, rows] = plane
            self.count += n
            done += n
        self.tail = self.tail[:, :, due:].clone()  # or the view would keep all of it

    def crop(self, remove: int) -> None:
        """Drop the last `remove` tokens.

        Raises:
            OptionError: some of them are encoded.
        """
        if self.sinks is None or self.tail is None:
            return
        loose = self.tail.shape[2] + (0 if self.count else self.sinks.shape[2])
        if remove > loose:
            raise OptionError(
                f"{self.where}: {remove} tokens cannot be taken back, only the {loose} that are not encoded yet; make the "
                "cache with a larger residual"
            )
        kept = self.tail.shape[2] - remove
        if kept < 0:
            self.sinks = self.sinks[:, :, :kept]
        self.tail = self.tail[:, :, : max(kept, 0)]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor: its batch reordered, or on another device."""
        if self.sinks is None or self.tail is None:
            return
        self.sinks, self.tail = change(self.sinks), change(self.tail)
        self.const = {k: change(t) for k, t in self.const.items()}
        self.blocks = [{k: change(p) for k, p in block.items()} for block in self.blocks]

    def memory(self) -> dict[str, int]:
        """Bytes in use: packed codes, metadata (scales and the like, and the layer's constants), residual (sinks and tail); and
        how many more are allocated for tokens to come."""
        out = {"packed": 0, "metadata": sum(t.nbytes for t in self.const.values()), "residual": 0, "idle": 0}
        if self.sinks is None or self.tail is None:
            return out
        out["residual"] = self.sinks.nbytes + self.tail.nbytes
        heads = self.sinks.shape[0] * self.sinks.shape[1]
        rows = heads * self.count * self.sinks.shape[-1] // self.stream.row(self.sinks.shape[-1])
        for name, spec in self.stream.planes(self.sinks.shape[-1]).items():
            out["packed" if name == "codes" else "metadata"] += rows * spec.nbytes
        allocated = sum(p.nbytes for block in self.blocks for p in block.values())
        used = out["packed"] + out["metadata"] - sum(t.nbytes for t in self.const.values())
        out["idle"] = allocated - used
        return out
