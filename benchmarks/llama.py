"""llama.cpp as a peer, through the low-level interface of a pip-built `llama-cpp-python`, in its fastest setting.

What that is: weights read into memory, not mapped, so that they can be repacked, in whichever of llama.cpp's own layouts
(`layouts()`: AMX, repack, plain) the caller asks for; a thread pool of its own that lives as long as the context, as
llama.cpp's own benchmark makes it (without one, threads are started for every token); one batch of up to 512 tokens;
logits of the last token alone. The pool is paused while it is not its turn: its threads would spin on the cores that
others are being timed on.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 512
FTYPES = {"Q4_0": 2, "Q3_K_M": 12, "Q4_K_M": 15, "Q8_0": 7}  # llama_ftype; all but Q8_0 keep a finer output matrix


class PoolParams(ctypes.Structure):
    """ggml_threadpool_params"""

    _fields_ = (("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("prio", ctypes.c_int),
                ("poll", ctypes.c_uint32), ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool))  # fmt: skip


class Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def api(path: str | None = None) -> Any:
    """The module `llama_cpp.llama_cpp`, quiet; `path` is a site-packages directory to find it in."""
    if path and path not in sys.path:
        sys.path.append(path)
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise SystemExit(
            f"llama-cpp-python cannot be imported ({error}); pip install llama-cpp-python, or name the site-packages "
            "directory of an environment that has it with --llama-cpp"
        ) from None
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.kept_callback = silence  # ctypes does not keep it alive
    llama_cpp.llama_backend_init()
    _declare(llama_cpp)
    return llama_cpp


def quantize(llama: Any, source: Path, out: Path, kind: str, threads: int) -> Path:
    """A GGUF of another type, made from `source` (itself quantized or not) by llama.cpp; returns `out`."""
    if not out.is_file():
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = FTYPES[kind], threads, True
        partial = out.with_suffix(".partial")
        if llama.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp could not quantize {source} to {kind}")
        partial.rename(out)
    return out


def layouts(llama: Any) -> dict[str, int | None]:
    """Buffer types in which this build of llama.cpp can hold weights on the CPU: name → handle; "auto" is its own choice."""
    base, found = llama._lib, {"auto": None}
    device = base.ggml_backend_dev_by_type(0)  # the CPU
    address = base.ggml_backend_reg_get_proc_address(
        base.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    while extra and extra[len(found) - 1]:
        handle = extra[len(found) - 1]
        found[base.ggml_backend_buft_name(handle).decode()] = handle
    return found | {"plain": base.ggml_backend_dev_buffer_type(device)}


class Weights:
    """A model in memory, the matrices of its layers in one of `layouts()` (the output matrix where llama.cpp puts it)."""

    def __init__(self, llama: Any, path: Path, layout: int | None = None):
        self.llama = llama
        params = llama.llama_model_default_params()
        params.load_mode, params.n_gpu_layers = llama.LLAMA_LOAD_MODE_NONE, 0
        overrides = (Override * 2)(
            Override(rb"(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight$", layout), Override(None, None)
        )
        if layout is not None:
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.nbytes = llama.llama_model_size(self.model)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def close(self) -> None:
        self.llama.llama_model_free(self.model)


class Context:
    """A sequence of up to `positions` tokens, run by so many threads; flash attention 1: yes, 0: no, -1: its choice."""

    def __init__(self, weights: Weights, threads: int, positions: int, flash: int = -1):
        self.llama = llama = weights.llama
        self.weights = weights
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = positions, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type, settings.no_perf = flash, True
        self.context = llama.llama_init_from_model(weights.model, settings)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.memory = llama.llama_get_memory(self.context)
        pool = PoolParams()
        llama._lib.ggml_threadpool_params_init(ctypes.byref(pool), threads)
        pool.paused = True
        self.pool = llama._lib.ggml_threadpool_new(ctypes.byref(pool))
        llama._lib.llama_attach_threadpool(self.context, self.pool, self.pool)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Threads awake inside the block, parked outside."""
        self.llama._lib.ggml_threadpool_resume(self.pool)
        try:
            yield
        finally:
            self.llama._lib.ggml_threadpool_pause(self.pool)

    def clear(self) -> None:
        self.llama.llama_memory_clear(self.memory, False)

    def feed(self, tokens: list[int]) -> int:
        """Run the tokens, in batches of up to 512, and return the most probable next one."""
        for at in range(0, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            ids = (self.llama.llama_token * len(part))(*part)
            if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(ids, len(part))):
                raise SystemExit("llama.cpp could not run a batch")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.weights.vocabulary,)).argmax())

    def decode(self, token: int, count: int) -> list[int]:
        """Greedy: `count` more tokens after `token`."""
        out = []
        for _ in range(count):
            token = self.feed([token])
            out.append(token)
        return out

    def close(self) -> None:
        self.llama.llama_free(self.context)
        self.llama._lib.ggml_threadpool_free(self.pool)


def _declare(llama: Any) -> None:
    """Signatures of what llama-cpp-python does not bind; the library's handle finds its dependencies' symbols too."""
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_attach_threadpool", None, [pointer, pointer, pointer]),
        ("ggml_threadpool_params_init", None, [pointer, ctypes.c_int]),
        ("ggml_threadpool_new", pointer, [pointer]),
        ("ggml_threadpool_free", None, [pointer]),
        ("ggml_threadpool_pause", None, [pointer]),
        ("ggml_threadpool_resume", None, [pointer]),
        ("ggml_backend_dev_by_type", pointer, [ctypes.c_int]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_backend_buft_name", ctypes.c_char_p, [pointer]),
        ("ggml_backend_dev_buffer_type", pointer, [pointer]),
    ):
        function = getattr(llama._lib, name)
        function.restype, function.argtypes = result, arguments
