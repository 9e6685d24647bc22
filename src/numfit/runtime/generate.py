"""Text from a prompt, piece by piece as it is made. Greedy unless told otherwise.

The loop is transformers' own, or, with a native decoder, a short one here that makes the same choices: the same end tokens,
the same repetition penalty, the same draws from the same seed. What else a model's generation_config may ask for is a reason
to leave the loop to transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numfit.errors import OptionError, require
from numfit.runtime.native_decoder import NativeDecoder
from numfit.threads import cpu_threads

# What a generation_config may hold that the loop below does not do, and the values that ask for nothing.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "min_p": None, "top_h": None,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "exponential_decay_length_penalty": None,
    "guidance_scale": None, "watermarking_config": None, "penalty_alpha": None, "stop_strings": None, "max_time": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "dola_layers": None, "renormalize_logits": False,
    "remove_invalid_values": False, "num_return_sequences": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """What came out: `text` without prompt and special tokens, counts in tokens, `seconds` of generating.

    `prompt_seconds` of them passed until the first new token was there. `cache`: what `QuantizedCache.memory` says at the end,
    where there was one.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    prompt_seconds: float
    cache: dict[str, Any] | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens, the time for the prompt included."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first one; 0 where there is none."""
        seconds = self.seconds - self.prompt_seconds
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds > 0 else 0.0


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
    decoder: NativeDecoder | None = None,
    kv: str | None = None,
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
        decoder: the model's own, from `native_decoder.build`; None runs transformers' loop. The tokens are the same.
        kv: keep keys and values encoded so (a preset of numfit.kvcache, "kv4" for one); not with a decoder, which has its own.

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
    if kv is not None and decoder is not None:
        raise OptionError("the native decoder keeps its own cache; pass decoder=None to use another with kv=")
    streamer = _Clock(_streamer(tokenizer, on_text))
    inputs = encode_prompt(tokenizer, prompt, raw=raw).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    prompt_tokens = inputs["input_ids"].shape[1]
    cache = None
    with torch.inference_mode(), ExitStack() as around:
        if decoder is not None:
            new = _native(decoder, model.generation_config, inputs["input_ids"], max_tokens, temperature, top_p, streamer)
        else:
            sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            if kv is not None:
                from numfit.kvcache import QuantizedCache, packed_attention

                cache = QuantizedCache(model.config, kv)
                around.enter_context(packed_attention(model))
                sampling |= {"past_key_values": cache, "cache_implementation": None}
            out = model.generate(
                **inputs,
                **sampling,
                max_new_tokens=max_tokens,
                streamer=streamer,
                pad_token_id=_pad_token(model, tokenizer),
            )
            new = out[0, prompt_tokens:].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    memory = None if cache is None else cache.memory()
    return Generated(text, prompt_tokens, len(new), streamer.seconds, streamer.first, memory)


def why_not_native(generation_config: Any) -> str | None:
    """What a model's generation_config asks for that only transformers' loop does; None if nothing."""
    for name, neutral in NEUTRAL.items():
        if getattr(generation_config, name, None) not in (None, neutral):
            return f"its generation_config asks for {name}={getattr(generation_config, name)}"
    return None


def _native(
    decoder: NativeDecoder, config: Any, prompt: Tensor, max_tokens: int, temperature: float, top_p: float, streamer: Any
) -> list[int]:
    """The new tokens after a prompt [1, T]. torch keeps to one thread: its others would spin where the decoder's work."""
    processors = _processors(config, temperature, top_p)
    ends = set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    tokens: list[int] = prompt[0].tolist()
    length = len(tokens)
    with cpu_threads(1):
        streamer.put(prompt)
        logits = torch.empty(decoder.vocabulary, dtype=torch.float32)
        choice = logits.numpy()  # the same memory; its argmax costs a tenth of torch's
        decoder.forward(tokens, 0, out=logits)
        while True:
            if temperature > 0 or processors:
                scores = processors(torch.tensor([tokens]), logits[None])
                token = int(torch.multinomial(torch.softmax(scores, -1), 1) if temperature > 0 else scores.argmax())
            else:
                token = int(choice.argmax())
            tokens.append(token)
            streamer.put(torch.tensor([token]))
            if token in ends or len(tokens) == length + max_tokens:
                break
            decoder.forward(tokens[-1:], len(tokens) - 1, out=logits)
        streamer.end()
    return tokens[length:]


def _processors(config: Any, temperature: float, top_p: float) -> Any:
    """transformers' own, in its order; empty for plain greedy decoding."""
    transformers = require("transformers", "hf")
    out = transformers.LogitsProcessorList()
    if (penalty := config.repetition_penalty or 1.0) != 1.0:
        out.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    if temperature > 0 and temperature != 1:
        out.append(transformers.TemperatureLogitsWarper(temperature))
    if temperature > 0 and top_p < 1:
        out.append(transformers.TopPLogitsWarper(top_p))
    return out


class _Clock:
    """A streamer that notes when the first new token came, and hands everything on."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._started, self._puts = streamer, time.perf_counter(), 0
        self.first = self.seconds = 0.0

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 1:  # the prompt
            self._started = time.perf_counter()
        elif self._puts == 2:
            self.first = time.perf_counter() - self._started
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
        self.seconds = time.perf_counter() - self._started


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
