"""How much of the error upstream a layer's linears are to make up for: chosen on windows that took no part in anything else.

The share that is best for the squared error of each linear by itself, which is known in closed form, is nearly 1 everywhere and
ruins the model: a few tokens with huge activations are most of that error. So shares are
tried, and judged by what the whole quantized layer makes of each held-out token, relative to that token's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from numfit.pipeline.linear import Solved, finish
from numfit.pipeline.recipe import Parts

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def best_share(
    parts: Parts, solve: Callable[[Parts, list[str]], list[Solved]], distance: Callable[[Mapping[str, Tensor]], float],
    where: str,
) -> tuple[list[Solved], list[str]]:  # fmt: skip
    """Solve a layer with each of SHARES of `parts.retarget`, and keep the one whose quantized weights come nearest; ties: the
    smaller share.

    Args:
        solve: the layer's linears by a recipe, adding what should be told to a list.
        distance: of the layer with these weights, by the source's names, on held-out windows.
        where: the layer's name.

    Returns:
        (what is solved, what should be told).
    """
    best: tuple[float, float, list[Solved], list[str]] | None = None
    for share in SHARES:
        notes: list[str] = []
        solved = solve(replace(parts, retarget=share * parts.retarget, hold_out=0), notes)
        found = distance({item.name: finish(item).dequantize() for item in solved})
        if best is None or found < best[0]:
            best = found, share * parts.retarget, solved, notes
    assert best is not None
    return best[2], [*best[3], f"'{where}': a share of {best[1]:g} of the error upstream is best on the windows held out"]


def relative_distance(y: Tensor, target: Tensor) -> float:
    """Mean over tokens of ‖y − target‖² / ‖target‖², [..., C] both."""
    size = target.square().sum(-1).clamp_min(1e-30)
    return float(((y - target).square().sum(-1) / size).double().mean())
