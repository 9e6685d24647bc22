"""Where weights come from: a Hugging Face directory (or a GGUF file) as names, shapes and tensors read one at a time.

Everything that can be known to be wrong from the headers is said before the first tensor is read: damaged files,
missing shards, an index that disagrees with the files in either direction. Tensors come in memory of their own, never
as views of a mapped file (see safetensors_file.py). Pickled weights (`pytorch_model.bin`) are not
read: opening them runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from numfit.checkpoint.safetensors_file import CHUNK, TensorInfo, read_header, read_tensor
from numfit.errors import CheckpointError, MissingExtraError, require

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model",
)  # fmt: skip
# What goes along into a quantized checkpoint. Python files do not: a numfit checkpoint holds no code.
AUX_PATTERNS = (
    "tokenizer*.json", "*.model", "vocab*.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tekken.json", "*.tiktoken", "chat_template*", "*.jinja", "generation_config.json",
    "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]


class Source(Protocol):
    """What can be read tensor by tensor. GGUF files implement it too (gguf.py), plus `save_tokenizer`."""

    @property
    def path(self) -> Path: ...

    def names(self) -> list[str]:
        """All tensors, in the order of the model."""

    def info(self, name: str) -> TensorInfo:
        """Type, shape and size of one tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    def aux_files(self) -> list[Path]:
        """Tokenizer, generation settings, licence: what goes along unchanged."""

    def fingerprint(self) -> dict[str, Any]:
        """{"files": {name: {"bytes", "sha256"}}}: equal for equal content, wherever it lies."""


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


@dataclass(frozen=True)
class DirectorySource:
    """A Hugging Face directory. Made by `open_source`; `tensors` is in canonical order."""

    path: Path
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo]

    def names(self) -> list[str]:
        """All tensors: layer 2 before layer 10."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape, file and size of one tensor."""
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """One tensor in its own type, in memory of its own."""
        return read_tensor(self.path, self.tensors[name])

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json(self.path / "config.json")

    def aux_files(self) -> list[Path]:
        """Tokenizer, generation settings, chat template and licence files, sorted by name."""
        found = {file for pattern in AUX_PATTERNS for file in self.path.glob(pattern) if file.is_file()}
        return sorted(file for file in found if file.name != INDEX_FILE)

    def fingerprint(self, progress: Callable[[str, int], None] | None = None) -> dict[str, Any]:
        """Sizes and sha256 of all that can influence the output; every byte is read, once in this object's life."""
        if "_hashes" not in self.__dict__:
            names = {*self.files, "config.json", *(file.name for file in self.aux_files())}
            hashes = {name: _hash(self.path / name, progress) for name in sorted(names)}
            self.__dict__["_hashes"] = hashes
        return {"files": self.__dict__["_hashes"]}

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether there is anything from which a tokenizer could be built."""
        return any((self.path / name).is_file() for name in TOKENIZER_FILES) or any(self.path.glob("*.tiktoken"))


def _hash(path: Path, progress: Callable[[str, int], None] | None) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if progress:
                    progress(path.name, len(chunk))
    except OSError as error:
        raise CheckpointError(
            f"'{path}' cannot be read ({error.strerror}); check its permissions and the disk"
        ) from None
    return {"bytes": size, "sha256": digest.hexdigest()}


def open_source(model: str | Path) -> Source:
    """Open a directory of safetensors, a GGUF file, or a model of the hub, and judge it by its headers.

    Raises:
        CheckpointError: missing or damaged files, an index that disagrees with them, no weights, no config.json.
        MissingExtraError: a GGUF file without the `gguf` package, a hub name without `huggingface_hub`.
    """
    path = resolve_model(model)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if path.suffix == ".gguf" or magic == b"GGUF":
            from numfit.checkpoint.gguf import open_gguf

            return open_gguf(path)
        raise CheckpointError(f"'{path}' is neither a directory nor a GGUF file; give the model's directory")
    read_json(path / "config.json")
    files, tensors = _directory_tensors(path)
    return DirectorySource(path, files, {name: tensors[name] for name in sorted(tensors, key=natural_key)})


def resolve_model(model: str | Path) -> Path:
    """A local path for a MODEL argument: a directory, a file, or the local copy of a hub repository (`org/name`).

    Raises:
        CheckpointError: nothing is there, and the hub cannot give it either.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not isinstance(model, str) or not _HUB_NAME.fullmatch(model) or model.endswith(".gguf"):
        raise CheckpointError(f"there is no file or directory '{model}'; check the path")
    try:
        hub = require("huggingface_hub", "hf")
    except MissingExtraError as error:
        raise MissingExtraError(f"there is no directory '{model}'; if it is a model of the hub: {error}") from None
    try:
        return Path(
            hub.snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=["original/*", "consolidated*"])
        )
    except Exception as error:  # the client raises a dozen types: no network, no such repository, gated, offline mode
        offline = (
            " (offline mode is set by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true") else ""
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"there is no directory '{model}', and the hub could not give a model of that name{offline}: {reason}; "
            "check the name or give a local directory"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, not JSON or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"'{path.parent}' has no {path.name}, so it is not a whole model; copy that file into it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' should hold a JSON object, not a {type(content).__name__}; copy it again")
    return content


def _directory_tensors(path: Path) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
    """The weight files that count, and their tensors."""
    index_path, single = path / INDEX_FILE, path / SINGLE_FILE
    if index_path.is_file():
        return _indexed_tensors(path, index_path)
    if not single.is_file():
        loose = sorted(file.name for file in path.glob("*.safetensors"))
        if len(loose) == 1:
            single = path / loose[0]
        elif loose:
            raise CheckpointError(
                f"'{path}' has {len(loose)} safetensors files but no {INDEX_FILE} to say which belong "
                "together; copy the index too"
            )
        elif any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            raise CheckpointError(
                f"'{path}' has only pickled weights, which numfit does not read because opening them runs code; "
                "save the model as safetensors first (save_pretrained of transformers does)"
            )
        else:
            raise CheckpointError(f"'{path}' has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; copy them into it")
    return (single.name,), read_header(single)


def _indexed_tensors(path: Path, index_path: Path) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
    weight_map = read_json(index_path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(file, str) for file in weight_map.values())
        or not weight_map
    ):
        raise CheckpointError(f"'{index_path}' has no weight_map from tensors to files; copy it again")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise CheckpointError(f"'{index_path}' points outside its directory ('{outside[0]}'); copy the index again")
    if (path / SINGLE_FILE).is_file() and SINGLE_FILE not in files:
        raise CheckpointError(
            f"'{path}' has both {SINGLE_FILE} and an index of other files, so it is unclear which weights "
            "count; remove one"
        )
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise CheckpointError(
            f"'{path}' lacks {len(missing)} of the {len(files)} shards that its index lists, the first '{missing[0]}'; "
            "copy or download them"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(path / file).items():
            if weight_map.get(name) != file:
                place = f"in '{weight_map[name]}'" if name in weight_map else "nowhere"
                raise CheckpointError(
                    f"'{file}' holds the tensor '{name}', which {INDEX_FILE} places {place}; "
                    "index and shards are not of the same model, copy them again"
                )
            tensors[name] = info
    absent = sorted(weight_map.keys() - tensors.keys(), key=natural_key)
    if absent:
        raise CheckpointError(
            f"{INDEX_FILE} places the tensor '{absent[0]}' in '{weight_map[absent[0]]}', which does not hold it "
            f"({len(absent)} such tensors); index and shards are not of the same model, copy them again"
        )
    return tuple(files), tensors
