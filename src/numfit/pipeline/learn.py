"""A layer as a whole: learning its linears' codes, scales or remaining weights against its output in full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from numfit.formats import Format, Grid
from numfit.formats.rotation import unrotate
from numfit.formats.trellis import LEVEL
from numfit.formats.trellis_codec import decode_levels
from numfit.pipeline.linear import Solved
from numfit.pipeline.recipe import Parts
from numfit.reconstruction import Options, State, progressive, reconstruct

# The layer with weights by tensor name put in: (weights, hidden states [b, T, C]) → [b, T, C].
Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Solve = Callable[[Sequence[str], Mapping[str, Tensor]], list[Solved]]
# What a trellis decodes to: int8 levels under one scale a row.
LEVELS = Format("levels", 8, (Grid("levels", tuple(LEVEL * level for level in range(-128, 128))),), block="row")
CPU = torch.device("cpu")
HOLDOUT = 4  # of the windows, which choose the best step and are not learned from


def learn(
    run: Run, solved: Sequence[Solved], inputs: Tensor, targets: Tensor, parts: Parts, device: torch.device = CPU
) -> list[Solved]:
    """Learn the codes and scales of a layer whose linears are solved.

    Args:
        inputs: hidden states of the model quantized so far [n, T, C]. targets: of the original model, behind the layer.
        device: where `run` computes, and where what is learned lies while it is; the result is on the CPU.
    """
    states = {item.name: state(item, device) for item in solved if item.packed is None}
    fixed = {item.name: item.packed.dequantize().to(device) for item in solved if item.packed is not None}
    if not states:
        return list(solved)
    how = options(parts, len(inputs), solved[0].format.bits)
    after, _ = reconstruct(lambda w, x: run({**fixed, **w}, x), states, inputs, targets, how)
    return [updated(item, after) for item in solved]


def learn_in_turn(
    run: Run, groups: Sequence[Sequence[str]], weights: Mapping[str, Tensor], solve: Solve, inputs: Tensor, targets: Tensor,
    parts: Parts, bits: int, device: torch.device = CPU,
) -> list[Solved]:  # fmt: skip
    """Solve groups of linears in turn; after each, what is not solved yet learns to make up for the loss.

    Args:
        groups: names, in the order in which the layer applies them. weights: of all of them, fp32.
        solve: the linears of a group, given all weights as they stand. bits: of their codes. device: as for `learn`.
    """
    items: dict[str, Solved] = {}

    def states(group: Sequence[str], current: Mapping[str, Tensor]) -> dict[str, State]:
        found = {item.name: item for item in solve(group, current)}
        items.update(found)
        return {name: state(item, device) for name, item in found.items()}

    there = {name: weight.to(device) for name, weight in weights.items()}
    after, _ = progressive(run, groups, there, states, inputs, targets, options(parts, len(inputs), bits))
    return [updated(item, after) for item in items.values()]


def options(parts: Parts, windows: int, bits: int) -> Options:
    """Reconstruction's options from a recipe, for codes of so many bits."""
    holdout = HOLDOUT if windows >= 4 * HOLDOUT else 0
    steps = parts.iterations
    if parts.reconstruct == "progressive":
        step = 0.01 if bits <= 2 else 0.005
        return Options("tune", steps, batch=1, holdout=holdout, extra_lr=step, scale_lr=0.003, checks=1)
    return Options(parts.reconstruct, steps, batch=1, holdout=holdout, trust=0.75)


def state(item: Solved, device: torch.device = CPU) -> State:
    """What reconstruction needs of a linear, on a device."""
    rotation = item.format.side.rotation

    def effective(w: Tensor) -> Tensor:
        return (w if rotation is None else unrotate(w, rotation)).view(item.shape)

    base, codes, trellis = item.format.base, item.codes, item.format.trellis
    if trellis is not None:  # to learning it is a row scale and fixed levels
        base, codes = LEVELS, (decode_levels(trellis, codes).int() + 128).to(torch.uint8)
    return State(item.name, base, codes.to(device), item.params.to(device), item.weight.to(device), effective)


def updated(item: Solved, after: Mapping[str, State]) -> Solved:
    """A linear with what was learned."""
    if item.name not in after:
        return item
    codes = item.codes if item.format.trellis is not None else after[item.name].codes.cpu()
    return replace(item, codes=codes, params=after[item.name].params.to(CPU))
