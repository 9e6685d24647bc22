"""One weight and what is known of its inputs → its planes: rotation, solver, corrections, packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from numfit.calibration import Statistics
from numfit.corrections import low_rank, outliers
from numfit.errors import FormatError, OptionError
from numfit.formats import Format, Params, QuantizedTensor, decode, pack, quantize_tensor
from numfit.formats.rotation import rotate
from numfit.pipeline.planning import PlannedTensor, rule_for
from numfit.pipeline.recipe import Parts
from numfit.solvers import SolverOptions, solve

FEW = 32  # tokens below which an expert's statistics say nothing


@dataclass
class Solved:
    """A weight whose codes are found, before it is packed.

    Attributes:
        name: of the tensor. shape: of the weight, [N, K] or [E, N, K]. format: with its side terms.
        weight: what the codes stand for, in their own (rotated) coordinates, fp32 [R, K].
        h: second moment of its inputs in those coordinates [K, K]; None where there is none, or one an expert, or no side
            term needs it.
        codes, params: of `format.base`, for all R rows.
        mean: of the inputs, unrotated [K], or None.
        packed: the finished tensor, where it was rounded without statistics; nothing else is looked at then.
        notes: what should be told.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    weight: Tensor
    h: Tensor | None
    codes: Tensor
    params: Params
    mean: Tensor | None = None
    packed: QuantizedTensor | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Layer:
    """A decoder layer on its way: its tensors and those of them that are to be quantized, what a rewrite has changed, what is
    solved, and what should be told."""

    k: int
    tensors: dict[str, Tensor]
    mine: list[PlannedTensor]
    rewritten: dict[str, Tensor]
    solved: list[Solved]
    notes: list[str]


def round_only(name: str, w: Tensor, fmt: Format, rule: str) -> Solved:
    """What can be done without statistics."""
    try:
        packed = quantize_tensor(w, fmt, scale_rule=rule_for(fmt, rule))
    except FormatError as error:
        raise FormatError(f"tensor '{name}': {error}") from None
    empty = torch.empty(0)
    return Solved(name, tuple(w.shape), fmt, empty, None, empty, Params(empty), packed=packed)


def solve_linear(
    name: str, w: Tensor, statistics: Sequence[Statistics], fmt: Format, parts: Parts, rule: str = "mse"
) -> Solved:
    """Find the codes of a weight.

    Args:
        w: [N, K], or [E, N, K]; fp32.
        statistics: one of the inputs, or one for each expert.
        rule: the run's scale rule.

    Raises:
        FormatError: the format cannot hold the weight; names the tensor.
    """
    shape, flat = tuple(w.shape), w.reshape(-1, w.shape[-1])
    rows = len(flat) // len(statistics)
    parts_of = [
        _solve_matrix(name, flat[i * rows : (i + 1) * rows], stats, fmt, parts, rule)
        for i, stats in enumerate(statistics)
    ]
    if len(parts_of) == 1:
        return replace(parts_of[0], shape=shape)

    def join(field: str) -> Tensor | None:
        values = [getattr(part.params, field) for part in parts_of]
        return None if values[0] is None else torch.cat(values)

    scale = torch.cat([p.params.scale for p in parts_of])
    params = Params(scale, join("parent"), join("member"), join("zero"), levels=join("levels"))
    return Solved(
        name, shape, fmt, torch.cat([p.weight for p in parts_of]), None, torch.cat([p.codes for p in parts_of]), params,
        notes=tuple(dict.fromkeys(note for p in parts_of for note in p.notes)),
    )  # fmt: skip


def _solve_matrix(name: str, w: Tensor, stats: Statistics, fmt: Format, parts: Parts, rule: str) -> Solved:
    h, cross, rotation = stats.h, stats.cross, fmt.side.rotation
    if rotation is not None:
        w, h = rotate(w, rotation), _rotate_both(h, rotation)
        cross = None if cross is None else _rotate_both(cross, rotation)
    options = solver_options(fmt, parts, rule)
    try:
        found = solve(w, h, fmt.base, options, cross=cross)
    except (FormatError, OptionError) as error:
        raise type(error)(f"tensor '{name}': {error}") from None
    notes = tuple(f"'{name}': {note}" for note in found.notes)
    kept = h if fmt.side.stored else None  # only side terms ask for it
    return Solved(name, tuple(w.shape), fmt, w, kept, found.codes, found.params, stats.mean, notes=notes)


def best_chain(fmt: Format) -> str:
    """The solver steps that suit a format: blocks can be improved one by one where there are several in a row, learned levels
    only for a whole row."""
    if fmt.learned:
        return "gptq+alternate+descent+refit"
    return "gptq+blocks+descent+refit" if isinstance(fmt.block, int) else "gptq+alternate+descent"


def solver_options(fmt: Format, parts: Parts, rule: str = "mse") -> SolverOptions:
    """What a recipe asks of the solver for a format; `rule`: the run's scale rule.

    Raises:
        OptionError: an unknown step, or one that does not apply to the format.
    """
    rule = rule_for(fmt, rule)
    if rule != "mse" and parts.reconstruct != "none":
        raise OptionError(
            f"--scale-rule {rule} does not go with --reconstruct {parts.reconstruct}, which learns the scales; leave one "
            "of them out"
        )
    chain = best_chain(fmt) if parts.solver == "best" else parts.solver
    options = SolverOptions.parse(
        chain, order=parts.order, damp=parts.damp, ridge=parts.ridge, importance=parts.importance, beta=parts.retarget,
        gptaq=parts.gptaq, rescomp=parts.rescomp, scale_rule=rule,
    )  # fmt: skip
    options.check(fmt.base)
    return options


def _rotate_both(h: Tensor, rotation: object) -> Tensor:
    """R H Rᵀ."""
    return rotate(rotate(h, rotation).T.contiguous(), rotation).T.contiguous()  # type: ignore[arg-type]


def finish(solved: Solved) -> QuantizedTensor:
    """Add the side terms and pack."""
    if solved.packed is not None:
        return solved.packed
    side, base = solved.format.side, solved.format.base
    terms: dict[str, Tensor] = {}
    if side.stored:
        error = solved.weight - decode(base, solved.codes, solved.params)
        if side.rank:
            terms["lowrank_b"], terms["lowrank_a"] = b, a = low_rank(error, side.rank, solved.h)
            error -= b.half().float() @ a.half().float()
        if side.sparse:
            columns = side.outliers(error.shape[1])
            terms["sparse_index"], terms["sparse_value"] = outliers(error, columns, solved.h)
    return pack(solved.format, solved.shape, solved.codes, solved.params, terms)

