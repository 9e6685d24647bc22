"""The arithmetic of an evaluation, on plain tensors: next-token loss, full-vocabulary KL, top-1 agreement.

Everything is computed in fp32 log-probabilities, a few million of them at a time: a vocabulary of 262 144 makes one
window of 1024 positions 1 GB, and the intermediates several times that. Definitions are those of quality-anchors.md 1
and of exllamav3's qbench (peers.md 3.9): KL(reference ‖ model) in nats over the whole vocabulary, per position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22  # log-probabilities worked on at a time: 16 MiB an intermediate, few enough to stay near the cache


def next_token_losses(logits: Tensor, targets: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Loss of each position and the log-probabilities it came from.

    Args:
        logits: [P, V], any floating dtype.
        targets: int64 [P], the token that followed each position.
        chunk: elements worked on at a time.

    Returns:
        -log p(target) in nats, fp32 [P]; log-probabilities fp32 [P, V].
    """
    log_probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)  # [P, V]
    for rows in _row_slices(logits.shape, chunk):
        log_probs[rows] = torch.log_softmax(logits[rows].float(), dim=-1)
    return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1), log_probs


def divergence(reference: Tensor, log_probs: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """KL(reference ‖ model) and agreement on the most probable token, per position.

    Args:
        reference: log-probabilities of the reference, fp32 [P, V].
        log_probs: log-probabilities of the model, fp32 [P, V].
        chunk: elements worked on at a time.

    Returns:
        KL in nats, fp32 [P] (rounding can leave a value of about -1e-7 where the two agree); bool [P].
    """
    kl = torch.empty(reference.shape[0], dtype=torch.float32, device=log_probs.device)  # [P]
    same = torch.empty(reference.shape[0], dtype=torch.bool, device=log_probs.device)  # [P]
    for rows in _row_slices(reference.shape, chunk):
        ref, own = reference[rows], log_probs[rows]
        kl[rows] = (ref.exp() * (ref - own)).sum(-1)
        same[rows] = ref.argmax(-1) == own.argmax(-1)
    return kl, same


def _row_slices(shape: Sequence[int], chunk: int) -> list[slice]:
    rows = max(1, chunk // max(1, shape[1]))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def summarize_losses(losses: Tensor, text_bytes: int) -> dict[str, float]:
    """Mean loss (nats a token), its perplexity, and bits per byte of the `text_bytes` bytes the tokens stand for."""
    total = losses.double().sum().item()
    mean = total / losses.numel()
    return {
        "nll": mean,
        "ppl": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / text_bytes,
    }


def summarize_divergence(kl: Tensor, same: Tensor) -> dict[str, float]:
    """Mean, its standard error, quantiles (linear interpolation) and maximum of KL in nats; share of same top-1.

    The standard error takes positions as independent, which those of one window are not quite: it is a lower estimate.
    """
    values = kl.double().cpu().numpy()
    spread = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    median, p90, p99 = (float(q) for q in np.quantile(values, [0.5, 0.9, 0.99]))
    return {
        "kl_mean": float(values.mean()),
        "kl_se": spread,
        "kl_median": median,
        "kl_p90": p90,
        "kl_p99": p99,
        "kl_max": float(values.max()),
        "top1": same.double().mean().item(),
    }
