"""A numfit checkpoint as a mapping from names to quantized tensors, read when asked for; `verify` reads it all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from numfit.checkpoint.manifest import MANIFEST, check_version, read_manifest
from numfit.checkpoint.safetensors_file import CHUNK, DTYPE_NAMES, TensorInfo, read_tensor, tensor_bytes
from numfit.checkpoint.source import DirectorySource, open_source
from numfit.errors import CheckpointError, FormatError
from numfit.formats import Format, QuantizedTensor

T = TypeVar("T")


class Lazy(Mapping[str, T], Generic[T]):
    """A mapping whose values are read from the files each time they are asked for, so that nothing stays in memory."""

    def __init__(self, names: list[str], read: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True)
class Checkpoint:
    """A numfit checkpoint whose names, types and shapes have been found consistent.

    Attributes:
        directory: where it lies.
        manifest: the content of numfit.json.
        config: the content of config.json.
        formats: name of each quantized tensor → its format.
        quantized: name → quantized tensor, read on access.
        kept: name → plain tensor, read on access.
        infos: every tensor of the files, planes by their file names.
    """

    directory: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    formats: dict[str, Format]
    quantized: Mapping[str, QuantizedTensor]
    kept: Mapping[str, Tensor]
    infos: dict[str, TensorInfo]


def plane_name(tensor: str, plane: str) -> str:
    """What a plane of a quantized tensor is called in the file."""
    return f"{tensor}_{plane}"


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a numfit checkpoint: manifest, configuration and files must agree on every name, type and shape.

    Raises:
        CheckpointError: not a numfit checkpoint, unknown version, or anything missing, unexpected or of a wrong size.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    source = open_source(directory)
    assert isinstance(source, DirectorySource)
    config = source.config()
    formats = config_formats(config, directory / "config.json")
    infos = source.tensors
    tensors, kept = manifest["tensors"], manifest["kept"]
    _same_names(formats.keys(), tensors.keys(), f"'{directory}': config.json and {MANIFEST} disagree")
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        for name, entry in tensors.items():
            if entry["format"] != formats[name].name:
                raise CheckpointError(
                    f"'{directory}': config.json and {MANIFEST} disagree on the format of '{name}'; copy both again"
                )
            for plane, spec in formats[name].planes(tuple(entry["shape"])).items():
                expected[plane_name(name, plane)] = DTYPE_NAMES[spec.dtype], spec.shape
        for name, entry in kept.items():
            expected[name] = entry["dtype"], tuple(entry["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{directory / MANIFEST}' is damaged ({error!r}); copy it again") from None
    except FormatError as error:
        raise CheckpointError(f"'{directory / MANIFEST}' is damaged: {error}") from None
    _same_names(infos.keys(), expected.keys(), f"'{directory}': the safetensors files and {MANIFEST} disagree")
    for name, (dtype, shape) in expected.items():
        if (infos[name].dtype, infos[name].shape) != (dtype, shape):
            raise CheckpointError(
                f"'{directory / infos[name].file}': '{name}' is {infos[name].dtype} {list(infos[name].shape)} where "
                f"{dtype} {list(shape)} belongs; copy the checkpoint again"
            )

    def quantized(name: str) -> QuantizedTensor:
        shape = tuple(tensors[name]["shape"])
        names = {plane: infos[plane_name(name, plane)] for plane in formats[name].planes(shape)}
        planes = {plane: read_tensor(directory, info) for plane, info in names.items()}
        return QuantizedTensor.from_planes(formats[name], shape, planes, name=f"'{name}'")

    return Checkpoint(
        directory, manifest, config, formats,
        Lazy(list(formats), quantized),
        Lazy(list(kept), lambda name: read_tensor(directory, infos[name])),
        infos,
    )  # fmt: skip


def config_formats(config: Mapping[str, Any], path: Path) -> dict[str, Format]:
    """Tensor name → format, from a config.json with `quantization_config`.

    Raises:
        CheckpointError: not numfit's, an unknown version, or damaged.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "numfit":
        raise CheckpointError(f"'{path}' has no quantization_config of numfit; copy the checkpoint's config.json again")
    check_version(quantization.get("format_version"), path)
    try:
        parsed = {name: Format.from_json(value) for name, value in quantization["formats"].items()}
        return {name: parsed[fmt] for name, fmt in quantization["tensors"].items()}
    except FormatError as error:
        raise CheckpointError(f"'{path}': {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the quantization_config in '{path}' is damaged ({error!r}); copy it again") from None


def read_quantized(directory: str | Path, name: str) -> QuantizedTensor:
    """One quantized tensor of a checkpoint.

    Raises:
        CheckpointError: as `open_checkpoint`, or there is no quantized tensor of that name.
    """
    checkpoint = open_checkpoint(directory)
    if name not in checkpoint.quantized:
        what = "is kept unquantized there" if name in checkpoint.kept else "is not in it"
        raise CheckpointError(f"'{directory}' has no quantized tensor '{name}': it {what}; see numfit inspect")
    return checkpoint.quantized[name]


def verify(directory: str | Path, progress: Callable[[str, int], None] | None = None) -> dict[str, int]:
    """Read every byte and compare it with the manifest: files, planes and kept tensors by sha256, names, types, shapes.

    Args:
        progress: called with (file or tensor, bytes read).

    Returns:
        {"files", "tensors", "kept", "bytes"}: what was found right.

    Raises:
        CheckpointError: the first thing that is not as the manifest says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    count = 0
    for name, entry in manifest["files"].items():
        count += _verify_file(directory, name, entry, progress)
    checkpoint = open_checkpoint(directory)
    weights = {info.file for info in checkpoint.infos.values()} | {
        file.name for file in directory.glob("*.safetensors")
    }
    unlisted = sorted(weights - manifest["files"].keys())
    if unlisted:
        raise CheckpointError(
            f"'{directory / unlisted[0]}' is not in {MANIFEST}; it does not belong to this checkpoint"
        )
    for name, entry in manifest["tensors"].items():
        planes = {
            plane: checkpoint.infos[plane_name(name, plane)]
            for plane in checkpoint.formats[name].planes(tuple(entry["shape"]))
        }
        for plane, info in planes.items():
            _verify_tensor(directory, info, entry.get("planes", {}).get(plane), progress)
        if entry.get("bytes") != sum(info.nbytes for info in planes.values()):
            raise CheckpointError(f"'{directory / MANIFEST}' gives '{name}' a wrong number of bytes; copy it again")
    for name, entry in manifest["kept"].items():
        _verify_tensor(directory, checkpoint.infos[name], entry.get("sha256"), progress)
    return {
        "files": len(manifest["files"]),
        "tensors": len(manifest["tensors"]),
        "kept": len(manifest["kept"]),
        "bytes": count,
    }


def _verify_file(directory: Path, name: str, entry: dict[str, Any], progress: Callable[[str, int], None] | None) -> int:
    path, digest, size = directory / name, hashlib.sha256(), 0
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing, but {MANIFEST} lists it; copy the checkpoint again")
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if progress:
                progress(name, len(chunk))
    if size != entry.get("bytes"):
        raise CheckpointError(
            f"'{path}' has {size} bytes where {MANIFEST} says {entry.get('bytes')}; copy the checkpoint again"
        )
    if digest.hexdigest() != entry.get("sha256"):
        raise CheckpointError(
            f"'{path}' has the right size but another content than {MANIFEST} says; copy the checkpoint again"
        )
    return size


def _verify_tensor(
    directory: Path, info: TensorInfo, sha256: object, progress: Callable[[str, int], None] | None
) -> None:
    if hashlib.sha256(tensor_bytes(read_tensor(directory, info))).hexdigest() != sha256:
        raise CheckpointError(
            f"'{info.name}' in '{directory / info.file}' differs from what {MANIFEST} recorded; copy it again"
        )
    if progress:
        progress(info.name, info.nbytes)


def _same_names(have: Any, want: Any, what: str) -> None:
    """Raise for the first name that only one side has."""
    missing, extra = sorted(want - have), sorted(have - want)
    if missing:
        raise CheckpointError(
            f"{what}: '{missing[0]}' is missing ({len(missing)} such names); copy the checkpoint again"
        )
    if extra:
        raise CheckpointError(
            f"{what}: '{extra[0]}' is unexpected ({len(extra)} such names); copy the checkpoint again"
        )
