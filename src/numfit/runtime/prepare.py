"""From a model skeleton and the files of a numfit checkpoint to a model with packed weights, and never anything less.

Three steps around transformers' own loading of what is kept:
1. `prepare`, on the meta device: check every name, type and shape of the files against the configuration and the model,
   convert the modules, tie what is tied;
2. `watch`: transformers' own account of what it loaded is turned from a printed report into an error;
3. `fill`: read the planes into the buffers, wherever transformers has put them by then.

Every tensor of the files must have its place and every place its tensor. transformers by itself would fill a gap with
random numbers and print a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numfit.checkpoint.index import Target, map_tensors, some
from numfit.checkpoint.safetensors_file import DTYPE_NAMES, TensorInfo, read_header, read_tensor
from numfit.errors import CheckpointError, FormatError, OptionError
from numfit.formats import Format, QuantizedTensor
from numfit.runtime.modules import attach, drop_anchor, packed_modules, use_kernels
from numfit.runtime.packed import PackedParameter, Piece


@dataclass
class Plan:
    """What `prepare` has found out and `fill` will need.

    Attributes:
        files: tensor of the file → (directory, where it lies).
        formats: name of each packed tensor → its format.
        uses: name of a tensor of the file → (packed parameter, index of the piece, rows or None for all).
        watched: `watch` has seen transformers' account.
    """

    files: dict[str, tuple[Path, TensorInfo]]
    formats: dict[str, Format]
    uses: dict[str, list[tuple[PackedParameter, int, Tensor | None]]] = field(default_factory=dict)
    watched: bool = False


def read_headers(files: Iterable[str | Path]) -> dict[str, tuple[Path, TensorInfo]]:
    """Tensors of all shards: name → (directory, where it lies).

    Raises:
        CheckpointError: a damaged file, or one tensor in two of them.
    """
    out: dict[str, tuple[Path, TensorInfo]] = {}
    for file in map(Path, files):
        for name, info in read_header(file).items():
            if name in out:
                raise CheckpointError(f"'{name}' is in '{out[name][1].file}' and in '{file.name}'; remove one of the files")
            out[name] = (file.parent, info)
    return out


def prepare(model: Any, formats: Mapping[str, Format], files: Iterable[str | Path]) -> Plan:
    """Convert a transformers model on the meta device so that it takes the packed tensors of `files`.

    Raises:
        CheckpointError: a plane is missing, unexpected, or of another type or shape than its format wants; a tensor has
            no place in the model; a parameter of the model gets nothing.
    """
    with torch.device("cpu"):  # transformers builds models in a context that makes every new tensor a meta tensor
        return _prepare(model, Plan(read_headers(files), dict(formats)))


def _prepare(model: Any, plan: Plan) -> Plan:
    formats = plan.formats
    planes = {f"{name}_{plane}" for name, fmt in formats.items() for plane in _plane_names(fmt)}
    leads = {name: info.shape[:-1] for name, (_, info) in plan.files.items() if name not in planes}
    for name in formats:
        for plane in ("codes", _by_row(formats[name])):
            if f"{name}_{plane}" not in plan.files:
                raise CheckpointError(f"the checkpoint has no '{name}_{plane}', which its config.json promises; copy it again")
        if name in leads:
            raise CheckpointError(f"the checkpoint has '{name}' both packed and plain; quantize the model again")
        leads[name] = plan.files[f"{name}_{_by_row(formats[name])}"][1].shape[:-1]

    index = map_tensors(model, leads, frozenset(formats))
    expected = model.state_dict()
    for place, source in index.kept.items():  # not every transformers checks this when there is a quantizer
        if source is not None and plan.files[source][1].shape != (shape := tuple(expected[place].shape)):
            raise _misfit(source, plan.files[source][1], f"'{place}' of the model", shape)
    parameters: dict[str, PackedParameter] = {}
    for target in index.targets:
        parameters[target.name] = _place(model, target, plan, leads)
    _tie(model, parameters, index.kept)
    _loop_over_experts(model)
    return plan


def _place(model: nn.Module, target: Target, plan: Plan, leads: Mapping[str, tuple[int, ...]]) -> PackedParameter:
    """Check the planes of one parameter and convert its module."""
    path, _, name = target.name.rpartition(".")
    module = model.get_submodule(path)
    pieces: list[Piece] = []
    for run in target.runs:
        shape = (*leads[run.source], target.row)  # of the file's tensor
        fmt = plan.formats.get(run.source)
        if fmt is None:
            info = plan.files[run.source][1]
            if info.shape != shape:
                raise _misfit(run.source, info, f"the parameter '{target.name}' {target.shape} of the model", shape)
        else:
            _check_planes(run.source, fmt, shape, plan)
        whole = run.rows is None
        prefix = name if len(target.runs) == 1 else f"{name}_{len(pieces)}"
        pieces.append(Piece(run.source, fmt, shape if whole else (run.count, target.row), prefix, whole))
    dtype = getattr(module, name).dtype
    packed = PackedParameter(module, target.shape, tuple(pieces), dtype, target.transposed)
    attach(module, name, packed)
    for number, run in enumerate(target.runs):
        plan.uses.setdefault(run.source, []).append((packed, number, run.rows))
    return packed


def _check_planes(name: str, fmt: Format, shape: tuple[int, ...], plan: Plan) -> None:
    try:
        wanted = fmt.planes(shape)
    except FormatError as error:
        raise CheckpointError(f"'{name}' cannot be in the format that config.json claims: {error}") from None
    for plane, spec in wanted.items():
        if f"{name}_{plane}" not in plan.files:
            raise CheckpointError(f"the checkpoint has no '{name}_{plane}', which {fmt.name} needs; copy it again")
        info = plan.files[f"{name}_{plane}"][1]
        if info.dtype != DTYPE_NAMES[spec.dtype] or info.shape != spec.shape:
            raise _misfit(f"{name}_{plane}", info, f"{fmt.name} of shape {shape}", spec.shape, DTYPE_NAMES[spec.dtype])


def _misfit(name: str, info: TensorInfo, what: str, shape: tuple[int, ...], dtype: str = "") -> CheckpointError:
    want = f"{dtype} {shape}".strip()
    return CheckpointError(
        f"'{name}' in '{info.file}' is {info.dtype} {info.shape}, but {what} needs {want}; the file is damaged, or its "
        "config.json belongs to another checkpoint"
    )


def _tie(model: Any, parameters: dict[str, PackedParameter], kept: Mapping[str, str | None]) -> None:
    """Let tied parameters share planes, and take the pairs that are settled so out of transformers' hands.

    As transformers does: of a pair, either name may be the one that the file has; if it has both, they are not tied.
    """
    pairs = dict(model.all_tied_weights_keys)
    for _ in pairs:  # a chain of ties settles in at most that many rounds
        for one, other in pairs.items():
            for absent, present in ((one, other), (other, one)):
                if present in parameters and absent not in parameters and absent not in kept:
                    path, _, name = absent.rpartition(".")
                    attach(model.get_submodule(path), name, parameters[present])
                    parameters[absent] = parameters[present]
    settled = {one for one, other in pairs.items() if one in parameters or other in parameters}
    _hide_ties(model, "all_tied_weights_keys", {one: pairs[one] for one in pairs if one not in settled})
    for path, module in model.named_modules():
        own = getattr(module, "_tied_weights_keys", None)
        if own:
            left = {one: own[one] for one in own if (f"{path}.{one}" if path else one) not in settled}
            if left != own:
                _hide_ties(module, "_tied_weights_keys", left)


def _hide_ties(module: Any, attribute: str, left: dict[str, str]) -> None:
    """Replace a module's account of its ties, and remember the old one for `decode_model`."""
    module._hidden_ties = {**getattr(module, "_hidden_ties", {}), attribute: getattr(module, attribute)}
    setattr(module, attribute, left)


def _loop_over_experts(model: nn.Module) -> None:
    """Have fused experts applied one by one: the other ways would decode all of them, also those not asked for."""
    for _, module in packed_modules(model):
        config = getattr(module, "config", None)
        if any(len(packed.shape) == 3 for packed in module._packed.values()) and config is not None:
            config._experts_implementation = "eager"


def watch(model: Any, plan: Plan) -> None:
    """Make transformers' account of missing and mismatched keys an error. `unwatch` takes the hook away again.

    Unexpected keys need no look here: `prepare` has found the place of every tensor in the files, by transformers'
    own rules, so what transformers calls unexpected are the planes, which are not its business.
    """
    original = model._adjust_missing_and_unexpected_keys

    def judge(info: Any) -> None:
        original(info)
        plan.watched = True
        mismatched = [f"'{name}' is {tuple(have)} instead of {tuple(want)}" for name, have, want in info.mismatched_keys]
        missing, failed = sorted(info.missing_keys), dict(info.conversion_errors)
        for account in (info.missing_keys, info.unexpected_keys, info.mismatched_keys, info.conversion_errors):
            account.clear()  # nothing is left to report: what is wrong is raised here
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {some(missing)}, which {type(model).__name__} needs; it is incomplete, or its "
                "config.json belongs to another model"
            )
        if mismatched:
            raise CheckpointError(
                f"the checkpoint does not fit its config.json: {'; '.join(sorted(mismatched)[:3])}; one of the two "
                "belongs to another model"
            )
        if failed:
            reason = next(iter(failed.values())).strip().splitlines()[-1]
            raise CheckpointError(f"{some(sorted(failed))} of the checkpoint could not be converted: {reason}")

    model._adjust_missing_and_unexpected_keys = judge


def unwatch(model: Any, plan: Plan) -> None:
    """End the watch.

    Raises:
        CheckpointError: transformers never gave its account, so nobody knows whether the model is complete.
    """
    del model._adjust_missing_and_unexpected_keys
    if not plan.watched:
        raise CheckpointError(
            "this version of transformers does not tell which weights it found, so a model with random weights could "
            "not be told from a good one; install a version that numfit supports: pip install 'numfit[hf]'"
        )


def fill(model: nn.Module, plan: Plan, activations: str) -> None:
    """Read every plane once, into the buffers of all parameters that use it, freeze the model, and hand it to the kernels.

    Args:
        activations: see `use_kernels`.

    Raises:
        CheckpointError: a file became shorter than its header said.
        OptionError: a packed module was offloaded to disk.
    """
    for source, uses in sorted(plan.uses.items(), key=lambda item: _position(plan, item[0])):
        fmt = plan.formats.get(source)
        names = [source] if fmt is None else [f"{source}_{plane}" for plane in _plane_names(fmt)]
        read = [read_tensor(*plan.files[name]) for name in names]
        for packed, number, rows in uses:
            piece = packed.pieces[number]
            if rows is None:
                values = read
            elif fmt is None:
                values = [read[0].reshape(-1, piece.shape[-1])[rows]]
            else:
                lead = read[_plane_names(fmt).index(_by_row(fmt))].shape[:-1]
                flat = (lead.numel(), piece.shape[-1])
                specs = fmt.planes(flat)
                planes = {plane: tensor.reshape(specs[plane].shape) for plane, tensor in zip(specs, read, strict=True)}
                values = list(QuantizedTensor(fmt, flat, planes).select(rows).planes.values())
            for buffer, value in zip(piece.buffers(packed.dtype), values, strict=True):
                _fill_buffer(packed.home, buffer, value, source)
    drop_anchor(model)
    model.requires_grad_(False)  # autograd would keep every decoded weight for a backward pass that cannot come
    plan.files.clear()
    plan.uses.clear()
    use_kernels(model, activations)


def _by_row(fmt: Format) -> str:
    """A plane whose leading axes are those of the weight; the codes of a trellis are one stream over all rows."""
    return "codes" if fmt.trellis is None else "scale"


def _plane_names(fmt: Format) -> list[str]:
    """The planes of a format, which are the same for every shape that it can hold."""
    return list(fmt.plane_names)


def _position(plan: Plan, source: str) -> tuple[str, int]:
    info = plan.files[f"{source}_codes" if source in plan.formats else source][1]
    return info.file, info.start


def _fill_buffer(home: nn.Module, name: str, value: Tensor, source: str) -> None:
    buffer = home.get_buffer(name)
    if buffer.device.type == "meta":
        raise OptionError(
            f"'{source}' was to be offloaded to disk, which packed weights do not support; give a device_map with more room"
        )
    with torch.no_grad():
        buffer.copy_(value)
    home._non_persistent_buffers_set.discard(name)
