"""Text from a prompt, piece by piece as it is made. Greedy unless told otherwise; the loop is transformers' own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from numfit.errors import OptionError, require


@dataclass(frozen=True)
class Generated:
    """What came out: `text` without prompt and special tokens, counts in tokens, `seconds` of generating."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    raw: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        model, tokenizer: from `numfit.load`.
        prompt: what the user says; put into the tokenizer's chat template where it has one, unless `raw`.
        max_tokens: at most so many new tokens.
        temperature: 0 is greedy.
        top_p: sample among the likeliest tokens that make up this probability; only with a temperature.
        seed: makes sampling repeatable, on the same machine.
        raw: continue the prompt as it stands.
        on_text: is called with each new piece of text.

    Raises:
        OptionError: an empty prompt, or a number out of its range.
    """
    if not prompt.strip():
        raise OptionError("the prompt is empty; give some text to continue, for instance --prompt 'The capital of France is'")
    if max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, not {max_tokens}")
    if not 0 <= temperature < float("inf"):
        raise OptionError(f"the temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p must be above 0 and at most 1, not {top_p}")
    if top_p < 1 and temperature == 0:
        raise OptionError("top_p has no effect without a temperature; give one, for instance --temperature 0.8")
    streamer = _streamer(tokenizer, on_text)
    inputs = encode_prompt(tokenizer, prompt, raw=raw).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    prompt_tokens = inputs["input_ids"].shape[1]
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_tokens,
            streamer=streamer,
            pad_token_id=_pad_token(model, tokenizer),
        )
    seconds = time.perf_counter() - started
    new = out[0, prompt_tokens:]
    return Generated(tokenizer.decode(new, skip_special_tokens=True), prompt_tokens, len(new), seconds)


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool = False) -> Any:
    """The prompt as model inputs [1, tokens], through the chat template where there is one.

    Raises:
        OptionError: the prompt has no tokens.
    """
    if raw or not getattr(tokenizer, "chat_template", None):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    if inputs["input_ids"].shape[1] == 0:
        raise OptionError("the tokenizer makes no token of this prompt; give some text to continue")
    inputs.pop("token_type_ids", None)  # some tokenizers add it, and causal models do not take it
    return inputs


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    """What to pad with; a single prompt is never padded, but transformers warns unless it is told."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    eos = model.generation_config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos


def _streamer(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    """transformers' TextStreamer, which knows where words end, with `on_text` in the place of its print."""
    if on_text is None:
        return None
    show = on_text

    class Streamer(require("transformers", "hf").TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                show(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
