"""A numfit checkpoint → a plain Hugging Face directory: the way out to every other tool.

Every quantized weight is decoded (in fp32, rounded once to the type asked for) under its old name; what was kept is
copied. float32 is exact; bfloat16 and float16 halve the size and round.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from numfit.checkpoint.manifest import MANIFEST
from numfit.checkpoint.packed import open_checkpoint
from numfit.checkpoint.plain_directory import staged_directory, write_json, write_tensors
from numfit.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES, Slot
from numfit.checkpoint.source import INDEX_FILE, natural_key
from numfit.errors import OptionError
from numfit.formats import QuantizedTensor

OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 1 << 24  # weights decoded at a time


def convert_packed(directory: str | Path, out_dir: str | Path, dtype: str = "float32", progress: bool = True) -> None:
    """Write the plain, dequantized model of a numfit checkpoint, tensor by tensor.

    Args:
        out_dir: must not exist, or be empty; it appears only when complete.
        dtype: of all floating-point tensors: "float32" (exact), "bfloat16" or "float16" (rounded).
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: the checkpoint is damaged, `out_dir` is in use or cannot be written.
        OptionError: an unknown dtype, or a weight beyond float16's range.
    """
    if dtype not in OUTPUT_DTYPES:
        raise OptionError(f"dtype '{dtype}' is not one of {', '.join(OUTPUT_DTYPES)}")
    target = OUTPUT_DTYPES[dtype]
    checkpoint = open_checkpoint(directory)
    tensors, kept = checkpoint.manifest["tensors"], checkpoint.manifest["kept"]

    def read(name: str) -> Tensor:
        if name in checkpoint.quantized:
            tensor = decode(checkpoint.quantized[name], target)
        else:
            tensor = checkpoint.kept[name]
            tensor = tensor.to(target) if tensor.is_floating_point() else tensor
        if target is torch.float16 and bool(tensor.isinf().any()):
            raise OptionError(f"tensor '{name}' has values beyond float16's range; convert to float32 or bfloat16")
        return tensor

    slots = [Slot(name, DTYPE_NAMES[target], tuple(entry["shape"])) for name, entry in tensors.items()]
    for name, entry in kept.items():
        floating = DTYPES[entry["dtype"]].is_floating_point
        slots.append(Slot(name, DTYPE_NAMES[target] if floating else entry["dtype"], tuple(entry["shape"])))
    config = {
        key: value for key, value in checkpoint.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    weights = {info.file for info in checkpoint.infos.values()}
    with staged_directory(out_dir) as stage:
        for path in sorted(Path(directory).iterdir()):
            if path.is_file() and path.name not in weights | {MANIFEST, "config.json", INDEX_FILE}:
                shutil.copyfile(path, stage / path.name)
        write_json(stage / "config.json", config | {"dtype": dtype})
        slots.sort(key=lambda slot: natural_key(slot.name))
        write_tensors(stage, slots, read, "converting" if progress else None)


def decode(packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """`packed.dequantize(dtype)`, a few rows at a time to bound the temporaries."""
    out = torch.empty(packed.shape, dtype=dtype)
    rows = packed.shape[0]
    step = max(1, CHUNK * rows // max(1, out.numel()))
    for start in range(0, rows, step):
        out[start : start + step] = packed.rows(slice(start, start + step), dtype)
    return out
