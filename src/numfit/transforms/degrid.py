"""Take a dequantized model off its grid, exactly and without changing what it computes.

A model that came out of a 4-bit file lies on that file's grid, and a quantizer of the same structure then looks
perfect (error 0), another one better or worse than it is. Rescaling channels by random factors between two linear
maps, and undoing them in the next, gives every weight of a block its own factor while the function stays the same:

    norm gain / s1, columns of q k v * s1        up rows * s3, down columns / s3
    norm gain / s2, columns of gate up * s2      v rows (and bias) * s4, o columns / s4

s4 has one value per (kv head, dim), shared by the query heads that this head serves; gate is left alone because its
activation is not homogeneous. A rotation would do as well but also remove the outliers, which are wanted.

All factors are drawn first (they are few), so that tensors can then be rewritten one at a time and in any order.
What it gives up: it widens the weights' distribution a little (3-7 % more error in every format); logits move by the
rounding of fp32. Specification: models-and-data §3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from numfit.errors import CheckpointError
from numfit.structure import Decoder, Layer, Norm

WIDTH = math.log(1.25)  # factors are log-uniform in [0.8, 1.25]


@dataclass(frozen=True)
class Rescale:
    """What happens to one tensor: w[i, j] * rows[i] * columns[j], or for a norm (offset + w) / gain - offset."""

    rows: Tensor | None = None  # [out]
    columns: Tensor | None = None  # [in]
    gain: Tensor | None = None  # [channels]
    offset: float = 0.0

    def __call__(self, w: Tensor) -> Tensor:
        """The rewritten tensor in fp32, rounded once; shape and device of `w`."""
        out = w.double()
        if self.gain is not None:
            out = (self.offset + out) / self.gain.to(w.device) - self.offset
        if self.rows is not None:
            rows = self.rows.to(w.device)
            out = out * (rows[:, None] if w.ndim == 2 else rows)  # a bias is one number a row
        if self.columns is not None:
            out = out * self.columns.to(w.device)
        return out.float()


def degrid_plan(
    decoder: Decoder, shape: Callable[[str], tuple[int, ...]], has: Callable[[str], bool], seed: int = 0
) -> dict[str, Rescale]:
    """Draw all factors; returns tensor name -> what to do to it (tensors not named stay as they are).

    One CPU generator for the whole model; per layer s1, s2, s3 (per feed-forward network, experts in order), s4.

    Args:
        shape: the shape of a tensor of the checkpoint.
        has: whether the checkpoint has a tensor of that name (biases).

    Raises:
        CheckpointError: the model is not one for which the rewrite is known to be exact.
    """
    if not decoder.verified:
        raise CheckpointError(
            f"models of type '{decoder.model_type}' have not been checked to survive this rewrite unchanged; "
            "add the type to numfit.structure.decoder.VERIFIED after a test like those in tests/test_degrid.py"
        )
    plan: dict[str, Rescale] = {}
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        uniform = torch.rand(count, generator=generator).double()
        return ((2 * uniform - 1) * WIDTH).exp()

    def change(name: str, **what: Any) -> None:
        if has(name):
            plan[name] = replace(plan.get(name, Rescale()), **what)

    def feed(norm: Norm, linears: tuple[str, ...]) -> None:
        factor = draw(shape(norm.weight)[0])
        change(norm.weight, gain=factor, offset=norm.offset)
        if norm.bias:
            change(norm.bias, gain=factor)
        for linear in linears:
            change(f"{linear}.weight", columns=factor)

    for layer in decoder.layers:
        _require_plain(layer)
        assert layer.input_norm and layer.ffn_norm and layer.v and layer.o  # _require_plain
        feed(layer.input_norm, layer.attention_inputs)
        feed(layer.ffn_norm, layer.ffn_inputs)
        for network in layer.feed_forwards:
            factor = draw(shape(f"{network.up}.weight")[0])
            change(f"{network.up}.weight", rows=factor)
            change(f"{network.up}.bias", rows=factor)
            change(f"{network.down}.weight", columns=1 / factor)
        factor = draw(decoder.kv_heads * decoder.head_dim)
        change(f"{layer.v}.weight", rows=factor)
        change(f"{layer.v}.bias", rows=factor)
        # [kv_heads, head_dim] -> each kv head repeated for the query heads it serves -> [heads * head_dim]
        served = factor.reshape(decoder.kv_heads, 1, -1).expand(-1, decoder.queries_per_kv, -1).reshape(-1)
        change(f"{layer.o}.weight", columns=1 / served)
    return plan


def _require_plain(layer: Layer) -> None:
    obstacle = next(iter(layer.unexplained + layer.packed_experts), None)
    if obstacle:
        raise CheckpointError(
            f"tensor '{obstacle}' has no place in the rewrite, so the model would change; it is refused"
        )
    if not (
        layer.input_norm and layer.ffn_norm and layer.q and layer.k and layer.v and layer.o and layer.feed_forwards
    ):
        raise CheckpointError(f"layer '{layer.prefix}*' lacks a norm, q, k, v, o or a feed-forward network of its own")
    if layer.ffn_norm == layer.input_norm:
        raise CheckpointError(
            f"in '{layer.prefix}*' one norm feeds attention and feed-forward network; this is not covered"
        )
    if any(network.gate is None for network in layer.feed_forwards):
        raise CheckpointError(
            f"the feed-forward network of '{layer.prefix}*' has no gate, so it cannot be rescaled exactly"
        )
