"""Running a model over token windows: losses out, log-probabilities handed on, progress told, trouble named."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from numfit.errors import NumfitError, OptionError
from numfit.evaluation.forward import logits_by_position
from numfit.evaluation.metrics import next_token_losses
from numfit.runtime.loading import DTYPES

# (window, first position, end position, log-probabilities fp32 [end - first, V])
Sink = Callable[[int, int, int, Tensor], None]
# (model, ids [batch, context]) → (first position, end position, logits [batch, end - first, V]), in order
Forward = Callable[[nn.Module, Tensor], Iterator[tuple[int, int, Tensor]]]


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a dtype that models can be loaded in ("auto": the one in config.json); OptionError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OptionError(f"--dtype {name}: pass one of {', '.join(DTYPES)}")
    return name


def score(model: nn.Module, windows: Tensor, sink: Sink, *, name: str, batch: int = 1, progress: bool = True,
          forward: Forward = logits_by_position) -> Tensor:  # fmt: skip
    """Loss of every position but the first of each window.

    Args:
        model: a causal language model of transformers.
        windows: int64 [n, context].
        sink: called with the log-probabilities of each slice of positions, in order inside a window.
        name: what to call the model in messages.
        batch: windows a forward pass.
        progress: show a bar (a line now and then where stderr is no terminal).
        forward: what runs the model on one batch of windows.

    Returns:
        -log p in nats, fp32 [n, context - 1], on the CPU.

    Raises:
        NumfitError: logits that are NaN or infinite.
    """
    n, context = windows.shape
    losses = torch.empty((n, context - 1), dtype=torch.float32)
    device = next(iter(model.parameters()), next(iter(model.buffers()), windows)).device
    starts = range(0, n, batch)
    with torch.inference_mode():
        for first in _told(starts, n, f"{name}: windows", progress):
            ids = windows[first : first + batch].to(device)  # [batch, context]
            for begin, end, logits in forward(model, ids):
                for row in range(ids.shape[0]):
                    _check(logits[row], name, first + row)
                    loss, log_probs = next_token_losses(logits[row], ids[row, begin + 1 : end + 1])
                    losses[first + row, begin:end] = loss.cpu()
                    sink(first + row, begin, end, log_probs)
    return losses


def _check(logits: Tensor, name: str, window: int) -> None:
    """Refuse NaN or infinite logits [P, V] before they become a number in a table."""
    if torch.isfinite(logits.sum(dtype=torch.float32)):  # one cheap pass: any NaN or infinity survives a sum
        return
    if not torch.isfinite(logits).all():
        kind = str(logits.dtype).removeprefix("torch.")
        raise NumfitError(
            f"{name}: NaN or infinite logits in window {window} (the first is 0): the weights are damaged, or {kind} "
            "overflows (try --dtype float32)"
        )


def _told(starts: Sequence[int], total: int, label: str, progress: bool) -> Iterator[int]:
    """Iterate over the first windows of the batches; a bar on a terminal, a line every ten seconds elsewhere."""
    if not progress:
        yield from starts
    elif sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(starts, desc=label, unit="batch" if len(starts) < total else "window", leave=False)
    else:
        last = begun = time.monotonic()
        for start in starts:
            if (now := time.monotonic()) - last >= 10:
                print(f"{label} {start}/{total}, {now - begun:.0f} s", file=sys.stderr, flush=True)
                last = now
            yield start
        print(f"{label} {total}/{total}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def scored_bytes(tokenizer: Any, windows: Tensor) -> int:
    """UTF-8 bytes of the text the scored tokens (all but the first of each window) decode to, special tokens included.

    A character cut in two by a window's edge decodes to U+FFFD and counts as three bytes: an error of a few bytes a
    window.
    """
    texts = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in windows[:, 1:].tolist()
    )
    return max(1, sum(len(text.encode("utf-8", errors="replace")) for text in texts))
