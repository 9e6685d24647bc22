"""Other people's matrix products on packed weights, behind one small interface, for benchmarks/kernels.py.

    ggml            kernels of llama.cpp, from the libraries inside a pip-installed llama-cpp-python. Only a build of its own
                    for this processor is a fair peer, and its pool must not be OpenMP's:
                        export CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF" CXXFLAGS="-include $PWD/benchmarks/tileconfig.h"
                        pip install --no-binary llama-cpp-python llama-cpp-python
                    (tileconfig.h mends AMX for older GCCs, whose builds die of an illegal instruction there)
    torch           bf16 `F.linear` (oneDNN; AMX where there is one), `_weight_int4pack_mm_for_cpu`
    onnxruntime     MatMulNBits, 4 bits, blocks of 64, accuracy level 4 (int8 activations)
    bitsandbytes    Linear4bit, NF4, bf16

Every peer holds several copies of one matrix in memory of its own, to be used in turn so that no copy is still in a cache;
applies them to one fixed input, which lies where it wants it; and can be asked for its product. Its error is measured here
against its own decoded weights, in float32: a peer that computed something else would not be one. Nothing is hidden in the
set-up that belongs to a call: what turns activations into int8 is inside, what repacks weights is not.

ggml is driven at the level of its own backends: a graph of one `mul_mat`, planned once, computed with a pool of its own. The
structures that cross that interface by value are two (`ggml_init_params`, `ggml_threadpool_params`); they are declared below
as the installed headers have them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GGML_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ4_NL": 20, "BF16": 30}  # enum ggml_type


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


def nothing() -> None:
    """Peers whose idle threads stop by themselves have nothing to park."""


@dataclass(frozen=True)
class Peer:
    """Something that multiplies: `call(i)` applies copy i; `bytes` are the weights that a call reads."""

    name: str
    bytes: int
    copies: int
    call: Callable[[int], object]
    result: Callable[[], Tensor]  # fp32 [m, n], of the last call
    error: float = 0.0  # relative, of the product with its own decoded weights
    loss: float = 0.0  # relative, of the product with the weights it was made from
    park: Callable[[], object] = nothing  # puts its idle threads to sleep
    note: str = ""
    stored: int = 0  # bytes in a file, where they differ
    home: ThreadPoolExecutor | None = None  # the one thread that may call it

    def there(self, work: Callable[[], Any]) -> Any:
        """Run something on the thread that may call it."""
        return self.home.submit(work).result() if self.home else work()

    def product(self) -> Tensor:
        """Its product anew, by the last copy."""

        def compute() -> Tensor:
            self.call(self.copies - 1)
            return self.result().clone()

        return self.there(compute)


def relative(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


def checked(peer: Peer, x: Tensor, w: Tensor, decoded: Tensor) -> Peer:
    """The peer with its errors measured, on its last copy.

    Raises:
        RuntimeError: it does not compute the product with its own decoded weights; the bound of 3 % leaves room for
            activations in int8 with one scale for 256 columns or in bf16.
    """
    y = peer.product()
    error, loss = relative(y, x @ decoded.T), relative(y, x @ w.T)
    if not error < 0.03:
        raise RuntimeError(f"{peer.name} is off by {error:.3g} from the product with its own weights: not a peer")
    return replace(peer, error=error, loss=loss)


def copies_of(size: int, rotate: int) -> int:
    """How many copies of `size` bytes fill `rotate` bytes, at least two."""
    return max(2, -(-rotate // size))


# ggml ----------------------------------------------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _PoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32), ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool),
    )  # fmt: skip


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )  # fmt: skip


_P, _I, _L, _Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_quiet = _LOG(lambda level, text, data: None)  # "repack: repack tensor …", once for each tensor
# name: result, arguments. Pointers to ggml's own structures stay opaque.
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [_LOG, _P]), "ggml_init": (_P, [_InitParams]), "ggml_free": (None, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _L, _L]),
    "ggml_mul_mat": (_P, [_P, _P, _P]), "ggml_new_graph_custom": (_P, [_P, _Z, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_P, _P]), "ggml_row_size": (_Z, [_I, _L]),
    "ggml_tensor_overhead": (_Z, []), "ggml_graph_overhead_custom": (_Z, [_Z, ctypes.c_bool]),
    "ggml_quantize_chunk": (_Z, [_I, _P, _P, _L, _L, _L, _P]), "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), [_I]),
    "ggml_threadpool_params_init": (None, [ctypes.POINTER(_PoolParams), _I]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]), "ggml_backend_buft_alloc_buffer": (_P, [_P, _Z]),
    "ggml_backend_buft_get_alloc_size": (_Z, [_P, _P]), "ggml_backend_buffer_get_base": (_P, [_P]),
    "ggml_backend_buffer_free": (None, [_P]), "ggml_backend_tensor_alloc": (_I, [_P, _P, _P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _Z, _Z]), "ggml_backend_tensor_get": (None, [_P, _P, _Z, _Z]),
    "ggml_backend_get_device": (_P, [_P]), "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]), "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_graph_plan_create": (_P, [_P, _P]), "ggml_backend_graph_plan_free": (None, [_P, _P]),
    "ggml_backend_graph_plan_compute": (_I, [_P, _P]), "ggml_backend_get_default_buffer_type": (_P, [_P]),
    "ggml_backend_free": (None, [_P]),
}  # fmt: skip
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (_P, []), "ggml_backend_cpu_set_n_threads": (None, [_P, _I]),
    "ggml_backend_cpu_set_threadpool": (None, [_P, _P]), "ggml_threadpool_new": (_P, [ctypes.POINTER(_PoolParams)]),
    "ggml_threadpool_pause": (None, [_P]), "ggml_threadpool_free": (None, [_P]),
}  # fmt: skip


class Ggml:
    """A CPU backend of ggml with a pool of `threads` threads.

    It lives on a thread of its own: ggml configures AMX's tiles once in each of its threads and relies on that for ever, while
    other libraries configure them for themselves and clear them, as they should; on a common thread ggml would meet an
    illegal instruction.

    Raises:
        Absent: llama-cpp-python is not installed, or its libraries are not shared ones.
    """

    def __init__(self, threads: int, probe: bool = True) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise Absent("llama-cpp-python is not installed")
        directory = Path(spec.origin).parent / "lib"
        try:
            base = ctypes.CDLL(str(directory / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(directory / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise Absent(f"no ggml libraries in {directory.name}/ of llama-cpp-python: {error}") from None
        for library, names in ((base, _BASE), (cpu, _CPU)):
            for name, (result, arguments) in names.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_quiet, None)
        self.home = ThreadPoolExecutor(1)
        self.backend = self.backend_cpu_init()
        self.device = self.backend_get_device(self.backend)
        params = _PoolParams()
        self.threadpool_params_init(ctypes.byref(params), threads)
        self.pool = self.threadpool_new(ctypes.byref(params))
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.backend_cpu_set_threadpool(self.backend, self.pool)
        self.names = self.usable() if probe else list(self.buffer_types())

    def __getattr__(self, name: str) -> Any:  # the functions bound above; for type checkers
        raise AttributeError(name)

    def park(self) -> None:
        self.threadpool_pause(self.pool)

    def buffer_types(self) -> dict[str, int]:
        """Name → buffer type: the plain one and whatever the device offers besides (repacked for AVX, for AMX)."""
        found = [self.backend_get_default_buffer_type(self.backend)]
        address = self.backend_reg_get_proc_address(
            self.backend_dev_backend_reg(self.device), b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(self.device)
            i = 0
            while extra[i]:
                found.append(extra[i])
                i += 1
        return {self.backend_buft_name(kind).decode(): kind for kind in found}

    def usable(self) -> list[str]:
        """Names of the buffer types whose kernels survive: each is tried in a process of its own, and failures are printed."""
        names = []
        for name in self.buffer_types():
            probe = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
            if probe.returncode:
                last = (probe.stderr.strip().splitlines() or [""])[-1]
                print(f"left out: ggml in {name} buffers (a product there ended with status {probe.returncode} {last})")
            else:
                names.append(name)
        return names

    def quantized(self, w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Bytes [n, row bytes] of w fp32 [n, k] in the type, and what they decode to."""
        code, (n, k) = GGML_TYPES[kind], w.shape
        packed = torch.empty(n, self.row_size(code, k), dtype=torch.uint8)
        self.quantize_chunk(code, w.data_ptr(), packed.data_ptr(), 0, n, k, None)
        decoded = torch.empty_like(w)
        self.get_type_traits(code).contents.to_float(packed.data_ptr(), decoded.data_ptr(), n * k)
        return packed, decoded

    def peer(self, w: Tensor, x: Tensor, kind: str, buffer_type: str, packed: Tensor, rotate: int) -> Peer:
        """`mul_mat` of x fp32 [m, k] with w [n, k] as packed by `quantized`, in the buffer type of that name.

        Raises:
            Absent: this buffer type has no kernel for the type.
        """
        code, (n, k), m = GGML_TYPES[kind], w.shape, x.shape[0]
        chosen = self.buffer_types()[buffer_type]
        plain = self.backend_get_default_buffer_type(self.backend)
        count = copies_of(packed.numel(), rotate)
        memory = (count * 2 + 8) * self.tensor_overhead() + count * self.graph_overhead_custom(8, False)
        context = self.init(_InitParams(memory, None, True))

        def place(tensor: int, kind_of_buffer: int) -> int:
            buffer = self.backend_buft_alloc_buffer(kind_of_buffer, self.backend_buft_get_alloc_size(kind_of_buffer, tensor))
            if not buffer:
                raise MemoryError(f"ggml could not allocate a {buffer_type} buffer")
            self.backend_tensor_alloc(buffer, tensor, self.backend_buffer_get_base(buffer))
            return buffer

        source = self.new_tensor_2d(context, GGML_TYPES["F32"], k, m)
        buffers = [place(source, plain)]
        self.backend_tensor_set(source, x.data_ptr(), 0, x.numel() * 4)
        plans, target, size = [], 0, 0
        for _ in range(count):
            weight = self.new_tensor_2d(context, code, k, n)
            buffers.append(place(weight, chosen))
            size = self.backend_buft_get_alloc_size(chosen, weight)
            target = self.mul_mat(context, weight, source)
            buffers.append(place(target, plain))
            if not self.backend_dev_supports_op(self.device, target):
                for buffer in buffers:
                    self.backend_buffer_free(buffer)
                self.free(context)
                raise Absent(f"ggml has no {kind} kernel in {buffer_type} buffers")
            self.backend_tensor_set(weight, packed.data_ptr(), 0, packed.numel())
            graph = self.new_graph_custom(context, 8, False)
            self.build_forward_expand(graph, target)
            plans.append(self.backend_graph_plan_create(self.backend, graph))

        y, compute, backend = torch.empty(m, n), self.backend_graph_plan_compute, self.backend

        def result() -> Tensor:  # of the last copy
            self.backend_tensor_get(target, y.data_ptr(), 0, y.numel() * 4)
            return y

        def call(i: int) -> None:
            if compute(backend, plans[i]):
                raise RuntimeError(f"ggml failed to compute {kind} in {buffer_type}")

        peer = Peer(f"ggml {kind}", size, count, call, result, park=self.park, note=buffer_type, home=self.home)
        self._free_later(peer, context, buffers, plans)
        return peer

    def _free_later(self, peer: Peer, context: int, buffers: list[int], plans: list[int]) -> None:
        """Frees ggml's memory with the Python object that uses it."""

        def release() -> None:
            for plan in plans:
                self.backend_graph_plan_free(self.backend, plan)
            for buffer in buffers:
                self.backend_buffer_free(buffer)
            self.free(context)

        weakref.finalize(peer.call, release)  # type: ignore[arg-type]


def ggml_candidates(ggml: Ggml, w: Tensor, x: Tensor, kind: str, rotate: int) -> list[Peer]:
    """One peer for each buffer type that has a kernel for the type; the caller keeps the fastest."""
    packed, decoded = ggml.quantized(w, kind)
    found = []
    for name in ggml.names:
        try:
            found.append(checked(ggml.peer(w, x, kind, name, packed, rotate), x, w, decoded))
        except Absent:
            continue  # every type has its plain kernel
    return found


# torch ---------------------------------------------------------------------------------------------------------------


def torch_bf16(w: Tensor, x: Tensor, rotate: int) -> Peer:
    """`F.linear` in bf16."""
    count = copies_of(w.numel() * 2, rotate)
    weights, source, out = [w.bfloat16().clone() for _ in range(count)], x.bfloat16(), [torch.empty(0)]

    def call(i: int) -> None:
        out[0] = torch.nn.functional.linear(source, weights[i])

    call(0)
    peer = Peer("torch bf16 linear", w.numel() * 2, count, call, lambda: out[0].float())
    return checked(peer, x, w, weights[0].float())


def torch_int4(w: Tensor, x: Tensor, rotate: int, group: int = 64) -> Peer:
    """`_weight_int4pack_mm_for_cpu`: 4-bit codes around 8, bf16 scale and zero point a group, bf16 activations."""
    n, k = w.shape
    groups = w.view(n, k // group, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    codes = (groups / scale).round().clamp(-8, 7) + 8
    decoded = ((codes - 8) * scale).view(n, k)
    scales = torch.stack([scale[..., 0].T, torch.zeros(k // group, n)], dim=-1).bfloat16().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 1)
    size = packed.numel() * packed.element_size() + scales.numel() * 2
    count = copies_of(size, rotate)
    weights, source, out = [(packed.clone(), scales.clone()) for _ in range(count)], x.bfloat16(), [torch.empty(0)]

    def call(i: int) -> None:
        out[0] = torch.ops.aten._weight_int4pack_mm_for_cpu(source, weights[i][0], group, weights[i][1])

    call(0)
    return checked(Peer("torch int4pack g64", size, count, call, lambda: out[0].float()), x, w, decoded)


# onnxruntime ---------------------------------------------------------------------------------------------------------


def onnx_matmul(w: Tensor, x: Tensor, rotate: int, threads: int, block: int = 64) -> Peer:
    """MatMulNBits of 4 bits; each copy is a session of its own, since a session packs its weights once.

    Raises:
        Absent: onnxruntime or onnx is not installed.
    """
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Absent(f"{error.name} is not installed") from None
    (n, k), m = w.shape, x.shape[0]
    blocks = w.view(n, k // block, block)
    scale = blocks.abs().amax(-1) / 7  # [n, k / block]
    codes = ((blocks / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8)
    decoded = ((codes.float() - 8) * scale[..., None]).view(n, k)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4  # [n, k / block, block / 2]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scale"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=block, accuracy_level=4
    )
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(packed.numpy(), "w"), numpy_helper.from_array(scale.flatten().numpy(), "scale")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = min(model.ir_version, 10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or the last session's threads disturb the next one
    size = packed.numel() + scale.numel() * 4
    count = copies_of(size, rotate)
    data, y, bound = model.SerializeToString(), torch.empty(m, n), []
    for _ in range(count):
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, "float32", (m, k), x.data_ptr())
        binding.bind_output("y", "cpu", 0, "float32", (m, n), y.data_ptr())
        bound.append((session, binding))

    def call(i: int) -> None:
        session, binding = bound[i]
        session.run_with_iobinding(binding)

    return checked(Peer("onnxruntime MatMulNBits", size, count, call, lambda: y), x, w, decoded)


# bitsandbytes --------------------------------------------------------------------------------------------------------


def bitsandbytes_nf4(w: Tensor, x: Tensor, rotate: int) -> Peer:
    """Linear4bit with NF4 in blocks of 64, bf16 activations, as its own modules run it in evaluation mode.

    Raises:
        Absent: bitsandbytes is not installed.
    """
    # It would look for more kernels on the Hugging Face hub through a package `kernels`, and find our own kernels.py.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise Absent(f"{error.name} is not installed") from None
    n, k = w.shape
    size = n * k // 2 + n * k // 64 * 4
    count = copies_of(size, rotate)

    def layer() -> Any:
        linear = bitsandbytes.nn.Linear4bit(
            k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
        )
        linear.weight = bitsandbytes.nn.Params4bit(
            w, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64, module=linear
        )
        return linear.to("cpu").eval()

    layers, source, out = [layer() for _ in range(count)], x.bfloat16(), [torch.empty(0)]
    first = layers[0].weight
    decoded = bitsandbytes.functional.dequantize_4bit(first.data, first.quant_state).float()

    def call(i: int) -> None:
        with torch.inference_mode():
            out[0] = layers[i](source)

    for i in range(count):
        call(i)  # the first call of a layer packs its weights for this processor
    return checked(
        Peer("bitsandbytes NF4", size, count, call, lambda: out[0].float(), note="its installed kernels"), x, w, decoded
    )


def probe(buffer_type: str) -> None:
    """One small product in a buffer type, of many tokens and of one; the process dies if it must."""
    ggml = Ggml(2, probe=False)
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    packed, decoded = ggml.quantized(w, "Q4_0")
    for x in (w[:33].contiguous(), w[:1].contiguous()):
        checked(ggml.peer(w, x, "Q4_0", buffer_type, packed, 1), x, w, decoded)


if __name__ == "__main__":
    probe(sys.argv[1])
