"""A forward pass over a window, its logits handed out some positions at a time; and the self-noise floor's noise.

The decoder runs once and the output head in slices: transformers' `logits_to_keep` says which positions get logits, and
the decoder's output is remembered between the calls, so that soft-capping, scaling and whatever else a model does
behind its head stays the model's own code. A model without `logits_to_keep` gives all its logits at once and needs the
memory for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from numfit.structure.modules import decoder_layers

LOGITS = 1 << 25  # asked for at a time: 128 MiB in fp32, few enough calls for a packed head that decodes itself anew
NOISE = 2.0**-9  # relative; about the root mean square error of rounding to bf16


def logits_by_position(model: nn.Module, ids: Tensor, budget: int = LOGITS) -> Iterator[tuple[int, int, Tensor]]:
    """Run `model` on one batch of windows and yield (first position, end position, logits [batch, end - first, V]).

    The last position is left out: nothing follows it that could be scored.

    Args:
        model: a causal language model of transformers, in eval mode.
        ids: int64 [batch, context], on the model's device.
        budget: logits in memory at a time.
    """
    batch, context = ids.shape
    decoder = getattr(model, "base_model", model)
    if decoder is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        yield 0, context - 1, model(input_ids=ids, use_cache=False).logits[:, :-1]
        return
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    step = max(1, budget // (batch * vocabulary))
    with _remembered(decoder):
        for start in range(0, context - 1, step):
            end = min(start + step, context - 1)
            keep = torch.arange(start, end, device=ids.device)
            yield start, end, model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits


def logits_through_cache(model: nn.Module, ids: Tensor, cache: Any, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """As `logits_by_position`, but `chunk` tokens at a time, each seeing what came before it through a cache.

    Args:
        cache: an empty one of transformers' kind; it is filled.
        chunk: tokens a pass; a pass's own tokens see each other as they are, whatever the cache does to them afterwards.
    """
    for start in range(0, ids.shape[1] - 1, chunk):
        end = min(start + chunk, ids.shape[1] - 1)
        yield start, end, model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits


@contextmanager
def _remembered(decoder: nn.Module) -> Iterator[None]:
    """While inside, `decoder` computes once and returns that same output to every later call."""
    original = decoder.forward
    seen: list[Any] = []
    covered = decoder.__dict__.get("forward")  # somebody else's patch, to be put back

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(original(*args, **kwargs))
        return seen[0]

    decoder.forward = forward
    try:
        yield
    finally:
        if covered is None:
            del decoder.forward  # uncovers the class's own method again
        else:
            decoder.forward = covered


@contextmanager
def layer_noise(model: nn.Module, seed: int = 0, relative: float = NOISE) -> Iterator[None]:
    """While inside, every decoder layer's output x becomes x·(1 + relative·N(0, 1)), drawn from one seeded generator.

    With the default this is about what rounding each layer's output to bf16 would do: a KL below the one it causes is
    not worth arguing about (qbench's self-noise floor, peers.md 3.9).
    """
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]  # [batch, context, hidden]
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        x = (x.float() * (1 + relative * noise)).to(x.dtype)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    handles = [layer.register_forward_hook(disturb) for _, layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
