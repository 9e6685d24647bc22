"""Perplexity and bits per byte of a model directory, and how far it is from a reference: what quantizing cost.

What is measured is what was re-read from the files: a quantized checkpoint goes through numfit.load like any user's
would. All positions but the first of each window are scored (text/windows.py says which windows).
Bits per byte divide the loss of the scored tokens by the UTF-8 bytes those tokens decode to, so that models with
different tokenizers can be set side by side. KL is KL(reference ‖ model) over the full vocabulary: it sees damage long
before perplexity does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numfit.errors import NumfitError, OptionError
from numfit.evaluation.forward import logits_through_cache
from numfit.evaluation.metrics import divergence, summarize_divergence, summarize_losses
from numfit.evaluation.reference import Reference, as_text, check_directory, load_model, model_windows, release_memory
from numfit.evaluation.scoring import dtype_name, score, scored_bytes
from numfit.evaluation.sizes import bits_per_weight, model_bytes
from numfit.kvcache import preset
from numfit.runtime.modules import activations_in_use, kernels_in_use
from numfit.threads import cpu_threads


def evaluate(
    model_dir: str | Path,
    text: str | Path,
    *,
    reference: str | Path | Reference | None = None,
    windows: int | None = None,
    context: int | None = None,
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
    device: Any = None,
    batch: int = 1,
    progress: bool = True,
    noise_floor: bool = True,
    activations: str = "int8",
    kv: str | None = None,
    kv_chunk: int = 64,
) -> dict[str, Any]:
    """Measure one model, quantized by numfit or not.

    Args:
        model_dir: a numfit checkpoint or any Hugging Face directory.
        text: a path, or the text itself.
        reference: what to compare with: a directory (run here, its log-probabilities in a temporary file), or a
            `Reference` that several models share.
        windows: number of windows; 8 unless the `Reference` has another number.
        context: tokens a window; 1024 unless the `Reference` has another number.
        dtype: what the model computes in: "float32", "bfloat16", "float16", or "auto" for the one in config.json.
            Losses are always computed in fp32.
        threads: CPU threads while evaluating; None leaves the number alone.
        device: where to run, None for the loader's choice.
        batch: windows a forward pass.
        progress: show progress on stderr.
        noise_floor: with a reference directory, also measure its self-noise floor.
        activations: what computes packed layers on a CPU, see numfit.load: what is measured is what runs.
        kv: keep the model's keys and values encoded so (numfit.kvcache), and see the text through that cache.
        kv_chunk: tokens a pass then; they see each other unencoded, so that a chunk as long as the context measures nothing.

    Returns:
        A dict that json.dumps takes. Always: model, windows, context, bos, tokens (scored), bytes (of their text), nll
        (nats a token), ppl, bits_per_byte, bits_per_weight (None unless numfit quantized it), model_bytes (all weight
        files), dtype, activations, kernels (what computed the packed tensors → how many), load_seconds, seconds. With a
        reference: reference, reference_ppl, reference_bits_per_byte, kl_mean, kl_se (standard error of the mean),
        kl_median, kl_p90, kl_p99, kl_max (nats), top1 (share of positions with the same most probable token), noise_floor
        (None, or the same kl_… and top1 of the disturbed reference on the first window).

    Raises:
        NumfitError: one sentence for whatever is wrong with model, text, reference or options.
    """
    content = as_text(text)
    dtype_name(dtype)
    if batch < 1:
        raise OptionError(f"batch {batch}: at least 1 window a forward pass is needed")
    check_cache(kv, kv_chunk)  # noticed before anything is loaded
    how = (batch, progress, activations, kv, kv_chunk)
    if not isinstance(reference, Reference):
        windows, context = 8 if windows is None else windows, 1024 if context is None else context
        if reference is None:
            with cpu_threads(threads):
                return _evaluate(model_dir, content, None, windows, context, dtype, device, *how)
        check_directory(model_dir)  # noticed before the reference has run for minutes
        with (
            cpu_threads(threads),
            Reference(
                reference, content, windows=windows, context=context, dtype=dtype, device=device, batch=batch,
                noise_floor=noise_floor, progress=progress,
            ) as shared,
        ):  # fmt: skip
            return _evaluate(model_dir, content, shared, windows, context, dtype, device, *how)
    n, length = reference.windows.shape
    if (windows is not None and windows != n) or (context is not None and context != length):
        raise OptionError(
            f"the reference {reference.name} was run on {n} windows of {length}, not {windows or n} of "
            f"{context or length}: make a Reference with the same windows"
        )
    with cpu_threads(threads):
        return _evaluate(model_dir, content, reference, n, length, dtype, device, *how)


def check_cache(kv: str | None, kv_chunk: int) -> None:
    """Refuse what names no cache, or no tokens a pass.

    Raises:
        OptionError: saying what can be.
    """
    if kv_chunk < 1:
        raise OptionError(f"--kv-chunk must be at least 1 token, not {kv_chunk}")
    if kv is not None:
        preset(kv)


def evaluate_many(
    model_dirs: Sequence[str | Path],
    text: str | Path,
    *,
    reference: str | Path | Reference | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """`evaluate` for several models, one in memory at a time, a reference directory run only once.

    Yields each result as soon as it is there. `options` are those of `evaluate`.
    """
    content = as_text(text)
    if reference is None or isinstance(reference, Reference):
        for model_dir in model_dirs:
            yield evaluate(model_dir, content, reference=reference, **options)
        return
    own = {name: value for name, value in options.items() if name != "threads" and value is not None}
    with cpu_threads(options.get("threads")):
        shared = Reference(reference, content, **own)
    with shared:
        for model_dir in model_dirs:
            yield evaluate(model_dir, content, reference=shared, **options)


def _evaluate(
    model_dir: str | Path,
    text: str,
    reference: Reference | None,
    windows: int,
    context: int,
    dtype: str | torch.dtype,
    device: Any,
    batch: int,
    progress: bool,
    activations: str,
    kv: str | None,
    kv_chunk: int,
) -> dict[str, Any]:
    name, path = str(model_dir), Path(model_dir)
    begun = time.monotonic()
    model, tokenizer = load_model(model_dir, dtype, device, activations)
    try:
        loaded = time.monotonic()
        ids, has_bos = model_windows(model, tokenizer, text, windows, context)  # [windows, context]
        if reference is not None:
            reference.check_same_tokens(name, ids, tokenizer.get_vocab())
        parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def compare(window: int, begin: int, end: int, log_probs: Tensor) -> None:
            if reference is None:
                return
            if log_probs.shape[-1] != reference.width:
                raise NumfitError(
                    f"{name} has {log_probs.shape[-1]} logits a position and the reference {reference.name} "
                    f"{reference.width}: KL needs a reference with the same vocabulary"
                )
            kl, same = divergence(reference.read(window, begin, end, log_probs.device), log_probs)
            parts[window, begin] = kl.cpu(), same.cpu()

        caches: list[Any] = []  # the last one

        def through_cache(model: Any, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
            caches[:] = [QuantizedCache(model.config, str(kv))]
            return logits_through_cache(model, ids, caches[0], kv_chunk)

        label = path.name or name
        if kv is None:
            losses = score(model, ids, compare, name=label, batch=batch, progress=progress)
        else:
            from numfit.kvcache import QuantizedCache, packed_attention

            with packed_attention(model):
                losses = score(model, ids, compare, name=label, batch=batch, progress=progress, forward=through_cache)
        size = scored_bytes(tokenizer, ids)
        computed_in = str(model.dtype).removeprefix("torch.")
        kernels, activations = kernels_in_use(model), activations_in_use(model)
    finally:
        del model
        release_memory()
    result: dict[str, Any] = {
        "model": name,
        "windows": windows,
        "context": context,
        "bos": has_bos,
        "tokens": losses.numel(),
        "bytes": size,
        **summarize_losses(losses, size),
        "bits_per_weight": bits_per_weight(path),
        "model_bytes": model_bytes(path),
        "dtype": computed_in,
        "activations": activations,
        "kernels": kernels,
        "load_seconds": loaded - begun,
        "seconds": time.monotonic() - loaded,
    }
    if kv is not None:
        result |= {"kv": kv, "kv_chunk": kv_chunk, "kv_memory": caches[0].memory()}
    if reference is not None:
        order = sorted(parts)
        kl = torch.cat([parts[k][0] for k in order])
        same = torch.cat([parts[k][1] for k in order])
        result |= {
            "reference": reference.name,
            "reference_ppl": reference.summary["ppl"],
            "reference_bits_per_byte": reference.summary["bits_per_byte"],
            **summarize_divergence(kl, same),
            "noise_floor": reference.noise_floor,
        }
    return result
