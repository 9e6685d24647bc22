"""The module ↔ tensor index: which rows of which tensors of the file make up each packed parameter of the model.

transformers renames, fuses, splits and permutes tensors between file and model, by rules of its own for every
architecture. Those rules are not repeated here: its renaming is applied to the names, and its conversion operations are
run on tensors of *row numbers* instead of weights. What comes out says where every row went. That is all one needs to
hold a packed parameter, as long as rows stay whole, and it is checked that they do.

Row-number tensors are [..., 1] in place of [..., K]: nothing of the size of a weight is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from numfit.errors import CheckpointError


@dataclass(frozen=True)
class Run:
    """Rows of one tensor of the file. `rows` is None for all of them in order, else their numbers [n]."""

    source: str
    rows: Tensor | None
    count: int


@dataclass(frozen=True)
class Target:
    """One parameter of the model: the runs that fill it, laid end to end.

    Attributes:
        name: of the parameter.
        shape: as the model has it.
        transposed: the runs fill it with its last two axes exchanged.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    runs: tuple[Run, ...]

    @property
    def row(self) -> int:
        """Weights in a row of the file's tensors."""
        return self.shape[-2] if self.transposed else self.shape[-1]


@dataclass(frozen=True)
class Index:
    """What `map_tensors` found.

    Attributes:
        targets: the parameters that are made of at least one packed tensor.
        kept: parameter or buffer of the model that is fed without packing → the tensor of the file, or None where
            it comes out of a conversion.
        ignored: tensors of the file that this model leaves out on purpose (multi-token prediction layers, say).
    """

    targets: tuple[Target, ...]
    kept: dict[str, str | None]
    ignored: frozenset[str]


def map_tensors(model: Any, leads: Mapping[str, tuple[int, ...]], packed: frozenset[str]) -> Index:
    """Find the place of every tensor of a checkpoint in a transformers model.

    Args:
        model: a PreTrainedModel, on the meta device, not yet converted.
        leads: name of each tensor of the unquantized file → its shape without the last axis.
        packed: those of them that are stored packed.

    Raises:
        CheckpointError: the model has no place for a tensor, two tensors claim the same place, or a conversion does
            something to a packed tensor that does not leave its rows whole.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    meta = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix

    groups: dict[str, list[tuple[str, str | None]]] = {}  # model's name → (file's name, pattern of the converter)
    homeless: dict[str, str] = {}  # model's name → file's name
    for name in sorted(leads, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in meta and name in meta:
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        if renamed in meta:
            groups.setdefault(renamed, []).append((name, pattern))
        else:
            homeless[renamed] = name
    unexpected = _not_ignored(model, set(homeless))
    if unexpected:
        raise CheckpointError(
            f"the checkpoint has {some([homeless[name] for name in sorted(unexpected)])}, for which "
            f"{type(model).__name__} has no place; the file belongs to another architecture, or to another version of "
            "numfit or transformers"
        )

    targets: list[Target] = []
    kept: dict[str, str | None] = {}
    for first, members in groups.items():
        converter = by_pattern[members[0][1]] if members[0][1] is not None else None
        if converter is None and len(members) > 1:
            raise CheckpointError(
                f"the tensors {some([name for name, _ in members])} of the checkpoint are all meant for '{first}'; "
                "it must hold only one of them"
            )
        if not any(name in packed for name, _ in members):
            if converter is None:
                kept[first] = members[0][0]
            else:
                kept |= {first.replace(converter.target_patterns[0], p, 1): None for p in converter.target_patterns}
            continue
        targets += _trace(model, meta, first, members, deepcopy(converter), leads)
    return Index(tuple(targets), kept, frozenset(homeless.values()))


def _trace(
    model: Any, meta: Mapping[str, Tensor], first: str, members: list[tuple[str, str | None]], converter: Any,
    leads: Mapping[str, tuple[int, ...]],
) -> list[Target]:  # fmt: skip
    """Run a converter (None: a plain renaming) on the row numbers of `members`."""
    names = [name for name, _ in members]
    starts, total = [], 0
    for name, pattern in members:
        count = 1
        for size in leads[name]:
            count *= size
        rows = torch.arange(total, total + count).reshape(*leads[name], 1)
        starts.append(total)
        total += count
        if converter is not None:
            converter.add_tensor(first, name, pattern, rows)
        else:
            arranged = {first: rows}
    if converter is not None:
        try:
            arranged = converter.convert(first, model=_Narrow(model, meta), config=model.config)
        except (ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
            raise _rearranged(names, first, str(error)) from error

    out = []
    for name, result in arranged.items():
        rows = result[0] if isinstance(result, list) else result  # [..., 1]
        if name not in meta:
            raise CheckpointError(
                f"{type(model).__name__} has no parameter '{name}', for which {some(names)} of the checkpoint are meant"
            )
        shape = tuple(meta[name].shape)
        transposed = tuple(rows.shape) != (*shape[:-1], 1)
        if transposed and (len(shape) < 2 or tuple(rows.shape) != (*shape[:-2], 1, shape[-1])):
            raise _rearranged(names, name, f"rows {tuple(rows.shape[:-1])} do not fit the shape {shape}")
        runs = _runs(rows.reshape(-1), names, torch.tensor([*starts, total]))
        out.append(Target(name, shape, transposed, runs))
    return out


def _runs(rows: Tensor, names: list[str], starts: Tensor) -> tuple[Run, ...]:
    """Cut a sequence of row numbers [n] where its source changes. starts: [sources + 1]."""
    owners, counts = torch.unique_consecutive(torch.searchsorted(starts, rows, right=True) - 1, return_counts=True)
    runs, offset = [], 0
    for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
        mine = rows[offset : offset + count] - starts[owner]
        whole = count == starts[owner + 1] - starts[owner] and torch.equal(mine, torch.arange(count))
        runs.append(Run(names[owner], None if whole else mine, count))
        offset += count
    return tuple(runs)


def _rearranged(names: list[str], target: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{some(names)} cannot be brought into the place of '{target}' as packed rows ({reason}); the file is damaged, "
        "or belongs to another architecture, or else these tensors must be left out when quantizing (--skip)"
    )


def _not_ignored(model: Any, names: set[str]) -> set[str]:
    """Those of the model's unexpected names that it does not declare as harmless."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    model._adjust_missing_and_unexpected_keys(info)
    return info.unexpected_keys


def some(names: list[str]) -> str:
    """The first few of a list of names, for a sentence."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class _Narrow:
    """A model whose parameters claim to have rows of one number, for operations that look up a target's shape."""

    def __init__(self, model: Any, meta: Mapping[str, Tensor]) -> None:
        self._model, self._meta = model, meta

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty((*self._meta[name].shape[:-1], 1), device="meta")
