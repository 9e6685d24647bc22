"""A packed decoder run by one native loop (kernels/cpu/decoder.h) instead of a thousand Python calls a token.

One description (description.py) serves all architectures that are made of the same parts; a model that cannot be described is
left to transformers. Rotary tables are computed by the model's own module, and before it is used the whole is proven: on a few
tokens its logits must be those of transformers.

The key/value cache is fp16 and grows by doubling. Gives up: batches, other devices than the CPU, gradients.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from numfit import native
from numfit.errors import NumfitError, OptionError
from numfit.runtime.description import Description, Spec, Unsupported, describe, rotary_table
from numfit.runtime.modules import exact_activations, packed_modules

PROOF_TOKENS = 8
PROOF_WINDOW = 4  # of sliding windows while a model is proven: some of the tokens must lie beyond them
# Largest root mean square difference of the logits, relative to their spread. Both sides compute in fp32, whatever the type of
# the model's activations, and the native cache is fp16: small models differ by up to 5e-4, and 1.5 billion weights rounded to
# three bits without a text, which amplify whatever reaches them, by 0.013. Another structure differs by far more.
TOLERANCE = 3e-2
FIRST_ROOM = 1024  # positions
MOST_ROOM = 1 << 24  # that the library reserves
_HALVES = (torch.float16, torch.bfloat16)

native.declare("nf_decoder_create", c_void_p, POINTER(Spec), ctypes.c_char_p)
native.declare("nf_decoder_free", None, c_void_p)
native.declare("nf_decoder_reserve", c_int, c_void_p, c_int64, c_void_p, c_void_p, ctypes.c_char_p)
native.declare("nf_decoder_length", c_int64, c_void_p)
native.declare("nf_decoder_bytes", c_int64, c_void_p)
native.declare("nf_decoder_forward", c_int, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, c_void_p, ctypes.c_char_p)


class NativeDecoder:
    """A model in the native loop. It refers to the model's packed weights and keeps them alive.

    Attributes:
        vocabulary: tokens that the output layer knows.
        exact: fp32 activations instead of int8 ones.
        threads: that a call uses.
    """

    def __init__(self, description: Description, exact: bool) -> None:
        library = native.library()
        if library is None:
            raise Unsupported("the CPU kernels are not installed")
        self._library, self._description, spec = library, description, description.spec
        self.vocabulary, self.exact, self.threads = int(spec.vocab), exact, torch.get_num_threads()
        self._error = ctypes.create_string_buffer(native.ERROR_BYTES)
        self._room = 0
        self._handle = library.nf_decoder_create(ctypes.byref(spec), self._error)
        if not self._handle:
            raise Unsupported(self._error.value.decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.nf_decoder_free(self._handle)
            self._handle = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._library.nf_decoder_length(self._handle))

    @property
    def nbytes(self) -> int:
        """Bytes of cache, rotary tables and work space; weights are not counted."""
        return int(self._library.nf_decoder_bytes(self._handle))

    def forward(self, tokens: Sequence[int] | Tensor, start: int, *, every: bool = False, out: Tensor | None = None) -> Tensor:
        """Run tokens that stand at position `start` and after it; what the cache held from there on is forgotten.

        Args:
            tokens: token numbers [T].
            start: at most `length`.
            every: logits of all tokens instead of the last one's.
            out: where to write them.

        Returns:
            fp32 [vocabulary], or [T, vocabulary].

        Raises:
            OptionError: no tokens, one out of the vocabulary, a gap before `start`, more than there can be; `out` does not fit.
            NumfitError: not enough memory.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64, device="cpu").contiguous()
        shape = (len(ids), self.vocabulary) if every else (self.vocabulary,)
        out = torch.empty(shape, dtype=torch.float32, device="cpu") if out is None else out
        fits = out.shape == shape and out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
        if ids.ndim != 1 or not fits:
            raise OptionError(
                f"the decoder takes tokens [T] and writes fp32 logits {shape} on the CPU, not {tuple(out.shape)} {out.dtype} "
                f"on '{out.device}'"
            )
        if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary or not 0 <= start <= self.length:
            raise OptionError(
                f"the decoder takes one token or more, each below {self.vocabulary}, from a position up to {self.length} on"
            )
        self._reserve(start + len(ids))
        self._library.nf_set_threads(self.threads)
        if failed := self._library.nf_decoder_forward(
            self._handle, ids.data_ptr(), len(ids), start, int(self.exact), int(every), out.data_ptr(), self._error
        ):
            raise native.refusal(failed, self._error)
        return out

    def logits(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Logits after each of the tokens of a new text: fp32 [T, vocabulary]."""
        return self.forward(tokens, 0, every=True)

    def _reserve(self, positions: int) -> None:
        if positions <= self._room:
            return
        if positions > MOST_ROOM:
            raise OptionError(f"the decoder has at most {MOST_ROOM} positions, not {positions}")
        room = max(FIRST_ROOM, 1 << (positions - 1).bit_length())
        pairs = [rotary_table(module, kind, room) for module, kind in self._description.ropes]
        cosine, sine = (torch.stack(tables).float().contiguous() for tables in zip(*pairs)) if pairs else (None, None)
        spec = self._description.spec
        if any(t is not None and t.shape != (spec.ropes, room, spec.rotary) for t in (cosine, sine)):
            raise NumfitError(f"the model's rotary tables are not of {room} positions and {spec.rotary} dimensions")
        places = (None if table is None else table.data_ptr() for table in (cosine, sine))
        if failed := self._library.nf_decoder_reserve(self._handle, room, *places, self._error):
            raise native.refusal(failed, self._error)
        self._room = room


def build(model: Any) -> tuple[NativeDecoder | None, str]:
    """The native loop for a model of transformers, with the activations that its layers use, proven on a few tokens.

    Args:
        model: a causal language model whose linears the CPU kernels have (`use_kernels`).

    Returns:
        (decoder, ""), or (None, why there is none: it completes "transformers' own code runs, because …").
    """
    try:
        with torch.inference_mode():
            description = describe(model)
            decoder = NativeDecoder(description, description.activations == "exact")
            with _narrow_windows(model) as narrowed:
                _prove(model, NativeDecoder(describe(model), True) if narrowed else decoder)
        return decoder, ""
    except Unsupported as reason:
        return None, str(reason)


@contextmanager
def _narrow_windows(model: Any) -> Iterator[bool]:
    """While inside, the model's sliding windows have PROOF_WINDOW tokens; whether it has any."""
    owners = [model.config.get_text_config(), *model.modules()]
    kept = [(owner, owner.sliding_window) for owner in owners if isinstance(getattr(owner, "sliding_window", None), int)]
    try:
        for owner, _ in kept:
            owner.sliding_window = PROOF_WINDOW
        yield bool(kept)
    finally:
        for owner, window in kept:
            owner.sliding_window = window


@contextmanager
def _in_fp32(model: Any) -> Iterator[None]:
    """While inside, a model of 16 bits computes in fp32; afterwards it has the same tensors and types as before."""
    dtype, scale = model.dtype, getattr(model.get_input_embeddings(), "embed_scale", None)
    kept = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype in _HALVES or t is scale]
    packed = [(parameter, parameter.dtype) for _, module in packed_modules(model) for parameter in module._mine()]
    try:
        for tensor, data in kept:  # the scale of embeddings is rounded to their type, which is part of the model
            tensor.data = (data.to(dtype) if tensor is scale else data).float()
        for parameter, _ in packed:
            parameter.dtype = torch.float32
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for parameter, before in packed:
            parameter.dtype = before


def _prove(model: Any, decoder: NativeDecoder) -> None:
    """Compare the logits of a few tokens with those of transformers, both with fp32 activations.

    transformers computes in fp32 for that: in bf16 its own rounding, which a badly quantized model amplifies, would be held
    against the decoder.
    """
    ids = torch.randint(0, decoder.vocabulary, (PROOF_TOKENS,), generator=torch.Generator().manual_seed(0), device="cpu")
    wanted, decoder.exact = decoder.exact, True
    with exact_activations(model), _in_fp32(model):
        want = model(input_ids=ids[None], use_cache=False).logits[0].float()
    have = decoder.logits(ids)
    decoder.exact = wanted
    error = float((have - want).square().mean().sqrt() / want.std())
    if not error <= TOLERANCE:
        warnings.warn(
            f"the native decoder disagrees with transformers on {type(model).__name__} (relative difference of the logits "
            f"{error:.2g}) and is not used",
            stacklevel=3,
        )
        raise Unsupported(f"the native decoder's logits differ from those of {type(model).__name__} by {error:.2g}")


