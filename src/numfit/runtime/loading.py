"""`load`: from a directory to a model and its tokenizer, for numfit checkpoints and plain Hugging Face directories.

It is `from_pretrained` with the doors closed through which a wrong model could come in: weights that are missing or too
many are errors for plain directories too, files are checked before they are read, code from a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from numfit.checkpoint import open_source, resolve_model
from numfit.checkpoint.index import some
from numfit.checkpoint.source import TOKENIZER_FILES
from numfit.devices import as_device
from numfit.errors import CheckpointError, OptionError, require
from numfit.runtime.modules import check_activations, loading_with, use_kernels

DTYPES = {
    "auto": None,
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: bool = True,
    progress: bool = False,
    activations: str = "int8",
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        directory: a numfit checkpoint, any Hugging Face directory that transformers knows, or a name on the hub.
        dtype: of the activations and of what is kept; None or "auto" takes the one in config.json.
        device: where to; None stays on the CPU.
        tokenizer: False returns None in the tokenizer's place.
        progress: let transformers draw its progress bar.
        activations: what computes packed linear layers on a CPU. "int8": the native kernels with activations quantized on the
            fly; "exact": the kernels with fp32 activations, slower; "reference": PyTorch on decoded weights, slowest. What has
            no kernel runs in PyTorch (`numfit.runtime.kernels_in_use` tells).

    Returns:
        (model in eval mode, tokenizer). Packed weights stay packed, and are frozen.

    Raises:
        CheckpointError: the directory is missing, damaged, incomplete, has tensors too many, is of an unknown format
            version, or of an architecture that the installed transformers does not know; or there is no tokenizer.
        OptionError: an unknown dtype or kind of activations, or a device that this machine does not have.
        MissingExtraError: transformers is not installed.
    """
    wanted, place = _dtype(dtype), None if device is None else as_device(device)
    check_activations(activations)
    path = resolve_model(directory)
    if path.is_file():
        raise CheckpointError(
            f"'{path}' is a file, and only directories can be loaded; a GGUF file can be quantized as it is, or "
            "turned into a directory with numfit convert"
        )
    config = open_source(path).config()  # this judges all files by their headers
    transformers = require("transformers", "hf")
    check_architecture(path, config)
    here = place is None or place.type == "cpu"  # what goes elsewhere is not brought into the layout of CPU kernels first
    with _quiet(transformers, progress), _as_checkpoint_error(path), loading_with(activations if here else "reference"):
        model, account = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted or "auto", trust_remote_code=False, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,  # so that they are listed, and refused below
        )  # fmt: skip
    _judge(path, type(model).__name__, account)
    quantized = config.get("quantization_config") or {}
    if quantized.get("quant_method") == "numfit" and getattr(model, "hf_quantizer", None) is None:
        raise CheckpointError(f"transformers {transformers.__version__} loaded '{path}' without numfit; that model is void")
    if place is not None:
        model = model.to(place)
    if not here:
        use_kernels(model, activations)  # should it come back to the CPU
    return model, load_tokenizer(path) if tokenizer else None


def _judge(path: Path, name: str, account: dict[str, Any]) -> None:
    """Refuse a model that transformers has completed with random numbers."""
    sized = [key for key, _, _ in account["mismatched_keys"]]
    for complaint, names in (
        (f"lacks {{}}, which {name} needs", account["missing_keys"]),
        (f"holds {{}}, for which {name} has no place", account["unexpected_keys"]),
        ("has a wrong size of {}", sized),
    ):
        if names:
            raise CheckpointError(
                f"the checkpoint '{path}' {complaint.format(some(sorted(names)))}; it is damaged, or its config.json "
                "belongs to another model"
            )


def check_architecture(path: Path, config: dict[str, Any]) -> None:
    """Say in a sentence why transformers could not build this model, before it says so in a page.

    Raises:
        CheckpointError: transformers does not know the architecture, or not as a causal language model.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        own = " (it brings code of its own, which numfit does not run)" if config.get("auto_map") else ""
        raise CheckpointError(
            f"'{path}' is a model of type '{kind}'{own}, which transformers {__version__} does not know, so it can be "
            "quantized and inspected but not loaded, run or evaluated; a newer transformers may know it"
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"'{path}' is a model of type '{kind}', which is not a causal language model in transformers "
            f"{__version__}, so it can be quantized and inspected but not run or evaluated"
        )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model's directory.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    transformers = require("transformers", "hf")
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise CheckpointError(
            f"'{path}' has no tokenizer (none of {', '.join(TOKENIZER_FILES[:3])}, …); copy the tokenizer files of the "
            "source model into it"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"the tokenizer in '{path}' cannot be read ({_first_line(error)}); copy the tokenizer files of the "
            "source model again"
        ) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """transformers refuses a directory with one of these; subclasses of RuntimeError are somebody's bug instead."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        raise CheckpointError(f"transformers cannot load '{path}': {_first_line(error)}") from error


@contextmanager
def _quiet(transformers: Any, progress: bool) -> Iterator[None]:
    """Silence transformers' report of missing keys (here they are errors) and, unless wanted, its progress bar."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
