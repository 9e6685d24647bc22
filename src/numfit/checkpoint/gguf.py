"""A GGUF file as a model to read from: Hugging Face names, fp32 values, one tensor at a time.

`open_gguf` gives the same interface as a safetensors directory, so everything that streams tensors takes GGUF too;
`convert_gguf` writes the plain Hugging Face directory. The values are those of the quantized file, exactly: fp32 holds
every ggml block type, fp16 and bf16 do not. A model that came through GGUF lies on its grid; see `transforms.degrid`.

Gives up: architectures outside `gguf_names.ARCHITECTURES`. Rules: models-and-data specification §2.2-2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numfit.checkpoint import gguf_tokenizer
from numfit.checkpoint.gguf_header import GGUFHeader, GGUFTensor, damaged, read_header
from numfit.checkpoint.gguf_names import architecture, hugging_face_config, hugging_face_names, to_hugging_face
from numfit.checkpoint.plain_directory import staged_directory, write_json, write_tensors
from numfit.checkpoint.safetensors_file import DTYPE_NAMES, Slot, TensorInfo, sha256_file
from numfit.errors import CheckpointError, OptionError, require

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 1 << 24  # weights dequantized at a time: 64 MB of fp32 and some temporaries of that size
SAMPLE_ROWS = 64  # rows compared to see whether embedding and head are one matrix
SAME_MATRIX = 0.25  # relative squared difference below which they are: 2 bits leave 0.1, two different matrices 1-2
OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class GGUFSource:
    """A GGUF file behind the interface of a checkpoint source. Made by `open_gguf`."""

    header: GGUFHeader
    origin: dict[str, str]  # Hugging Face name -> GGUF name, in the order of the model
    tied: bool  # embedding and head are one matrix, stored (in the finer of its versions) under the embedding's name

    @property
    def path(self) -> Path:
        return self.header.path

    def names(self) -> list[str]:
        """Hugging Face tensor names: embedding, blocks in order, final norm, head."""
        return list(self.origin)

    def info(self, name: str) -> TensorInfo:
        """Shape and size of one tensor as `read` gives it (fp32)."""
        shape = self._line(name).shape
        return TensorInfo(name, "F32", shape, self.path.name, 4 * math.prod(shape))

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fp32, dequantized into memory of its own."""
        return to_hugging_face(self.header, name, _dequantize(self.header, self._line(name)))

    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        return hugging_face_config(self.header, self.origin, self.tied)

    def aux_files(self) -> list[Path]:
        """Nothing to copy: the tokenizer is inside the file, see `save_tokenizer`."""
        return []

    def save_tokenizer(self, directory: str | Path) -> list[str]:
        """Write tokenizer files, chat template and generation_config.json into `directory`; returns their names."""
        return gguf_tokenizer.save_tokenizer(self.header, directory)

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and sha256 of the file."""
        return {"files": {self.path.name: {"bytes": self.header.size, "sha256": self._sha256}}}

    @cached_property
    def _sha256(self) -> str:
        return sha256_file(self.path)

    def _line(self, name: str) -> GGUFTensor:
        if name not in self.origin:
            raise CheckpointError(f"{self.path}: there is no tensor '{name}' in this GGUF file")
        return self.header.tensors[self.origin[name]]


def open_gguf(path: str | Path) -> GGUFSource:
    """Open a GGUF file for reading tensor by tensor. Reads the header, and a few rows to see whether the head is tied.

    Raises:
        CheckpointError: the file is missing, damaged, truncated, or of an architecture that cannot be converted.
        MissingExtraError: the `gguf` package is not installed.
    """
    header = read_header(path)
    _, arch = architecture(header)
    origin = hugging_face_names(header, arch)
    tied = HEAD not in origin
    if not tied and _same_matrix(header, origin):
        # The writer stored one tied matrix twice; the finer copy serves as both.
        pair = [header.tensors[origin[name]] for name in (EMBEDDING, HEAD)]
        origin[EMBEDDING] = max(reversed(pair), key=lambda tensor: tensor.nbytes).name
        del origin[HEAD]
        tied = True
    source = GGUFSource(header, origin, tied)
    source.config()  # contradictions between metadata and tensors come out now, not in the middle of the work
    return source


def convert_gguf(path: str | Path, out_dir: str | Path, dtype: str = "float32", progress: bool = True) -> None:
    """Write the model in the GGUF file as a Hugging Face directory: config, safetensors, tokenizer, generation config.

    Args:
        out_dir: must not exist, or be empty; it appears only when complete.
        dtype: "float32" (exact), "bfloat16" or "float16" (rounded).
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: the GGUF cannot be read (see `open_gguf`), `out_dir` is in use, the disk is full.
        OptionError: unknown dtype, or a weight too large for float16.
    """
    if dtype not in OUTPUT_DTYPES:
        raise OptionError(f"dtype '{dtype}' is not one of {', '.join(OUTPUT_DTYPES)}")
    target = OUTPUT_DTYPES[dtype]
    source = open_gguf(path)

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        rounded = tensor.to(target)
        if target is torch.float16 and bool((rounded.isinf() & tensor.isfinite()).any()):
            raise OptionError(f"tensor '{name}' has values beyond float16's range; convert to float32 or bfloat16")
        return rounded

    with staged_directory(out_dir) as stage:
        source.save_tokenizer(stage)  # first: it may refuse, and costs a second where the tensors cost a minute
        write_json(stage / "config.json", source.config() | {"torch_dtype": dtype})
        slots = [Slot(name, DTYPE_NAMES[target], source.info(name).shape) for name in source.names()]
        write_tensors(stage, slots, read, "converting" if progress else None)


def _same_matrix(header: GGUFHeader, origin: dict[str, str]) -> bool:
    """Whether embedding and head are two quantizations of one matrix, judged from evenly spaced rows."""
    embedding, head = (header.tensors[origin[name]] for name in (EMBEDDING, HEAD))
    if embedding.shape != head.shape:
        return False
    first = np.linspace(0, embedding.shape[0] - 1, min(SAMPLE_ROWS, embedding.shape[0])).astype(int)
    e, h = (
        torch.cat([_dequantize(header, t, int(row), int(row) + 1) for row in first]).double() for t in (embedding, head)
    )
    return bool((e - h).square().sum() <= SAME_MATRIX * h.square().sum())


def _dequantize(header: GGUFHeader, tensor: GGUFTensor, begin: int = 0, end: int | None = None) -> torch.Tensor:
    """A tensor in fp32, chunk by chunk; of a matrix optionally only the rows `begin:end`."""
    gguf = require("gguf", "gguf")
    kind = gguf.GGMLQuantizationType(tensor.type_id)
    width = tensor.shape[-1]
    line_bytes = tensor.nbytes * width // math.prod(tensor.shape)
    lines = math.prod(tensor.shape[:-1])  # a vector is one line
    end = lines if end is None else end
    out = np.empty((end - begin, width), np.float32)
    step = max(1, CHUNK // width)
    with open(header.path, "rb") as file:
        file.seek(tensor.offset + begin * line_bytes)
        for at in range(0, len(out), step):
            block = out[at : at + step]
            raw = file.read(len(block) * line_bytes)
            if len(raw) < len(block) * line_bytes:
                raise damaged(header.path, f"the file ended inside tensor '{tensor.name}'")
            packed = np.frombuffer(raw, np.uint8).reshape(len(block), line_bytes)
            try:
                block[:] = packed.view("<f8") if kind.name == "F64" else gguf.dequantize(packed, kind)
            except NotImplementedError:
                raise CheckpointError(
                    f"{header.path}: tensor '{tensor.name}' is of type {kind.name}, which the installed 'gguf' package "
                    "cannot dequantize; upgrade it, or use another quantization of the model"
                ) from None
    whole = (begin, end) == (0, lines)
    return torch.from_numpy(out.reshape(tensor.shape) if whole else out)
