"""`PackedLinear`: every format into the kernels' layout and back, applied through torch, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from numfit import native
from numfit.errors import FormatError, OptionError
from numfit.formats import QuantizedTensor, bases, format, quantize_tensor
from numfit.kernels import PackedLinear, kernel_of, linear, reference

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not built: no compiler at install")

NAMES = [format(name).name for name in bases() if not format(name).learned] + [
    "mant4-g32@e3m3", "mant4-row", "razer4-g64@fp16", "razer4-g32@bf16", "if4-g32@fp16", "uint4-tensor@bf16", "fp4.25-tensor",
    "int4-row", "ant4-g32@e4m3", "mantsv4-g16@e3m3", "nf4-g100", "int5-g7@u8", "fp5.33-g96", "ams-e2m2k4-g20",
]  # fmt: skip


def quantized(name: str, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    return quantize_tensor(w, name, scale_rule="floor" if name.startswith("mx") else "absmax")


@pytest.fixture
def packed() -> PackedLinear:
    return PackedLinear.pack(quantized("mant4-g64", 40, 192))


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_loses_nothing(name: str) -> None:
    for rows, columns in ((1, 128), (17, 128), (37, 300)):
        q = quantized(name, rows, columns)
        packed = PackedLinear.pack(q)
        assert packed.shape == (rows, columns) and packed.nbytes > 0
        back = packed.unpack()
        assert back.format == q.format and list(back.planes) == list(q.planes)
        for plane, value in q.planes.items():
            assert torch.equal(back.planes[plane].view(torch.uint8), value.view(torch.uint8)), plane
        want = q.dequantize()
        assert torch.equal(packed.rows(slice(None)), want)
        assert torch.equal(packed.rows(torch.tensor([[rows - 1], [0]])), want[[rows - 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_serves_all_float_types_and_shapes(packed: PackedLinear, dtype: torch.dtype) -> None:
    weight, bias = packed.rows(slice(None)), torch.randn(40)
    epsilon = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    whole = torch.randn(3, 5, 192).to(dtype)
    for x in (whole, whole[0, 0], whole[:, :0], whole.transpose(0, 1), whole[:, ::2], whole[..., :192].flip(0)):
        y = packed.apply(x, bias, "exact")
        want = x.double() @ weight.double().T + bias
        assert y.shape == want.shape and y.dtype == dtype
        bound = 2 * epsilon * want.abs() + 1e-5
        assert bool(((y.double() - want).abs() <= bound).all())
        rough = packed.apply(x, bias)
        assert rough.dtype == dtype and rough.shape == want.shape
        if x.numel():
            assert float((rough.double() - want).norm() / want.norm()) < 0.02


def test_one_call_for_both_paths(packed: PackedLinear) -> None:
    x, q = torch.randn(2, 192), packed.unpack()
    torch.testing.assert_close(linear(x, packed, activations="exact"), linear(x, q), atol=1e-5, rtol=0)
    assert torch.equal(linear(x, q), reference.linear(x, q))


def test_any_number_of_threads_gives_the_same_bits(packed: PackedLinear) -> None:
    x = torch.randn(9, 192)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 64):  # more than there are cores
            torch.set_num_threads(threads)
            results.append((packed.apply(x), packed.apply(x, activations="exact"), packed.rows(slice(None))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["mant4-g64", "int4-g64+rot+rank3+sparse20", "trellis3+rot"])
def test_torchs_defaults_do_not_matter(name: str) -> None:
    """What the library gets is CPU memory of the right size, whatever new tensors are made of by default."""
    w, x, index = torch.randn(70, 192), torch.randn(3, 192), torch.tensor([0, 69])
    q = quantize_tensor(w, name, scale_rule="mse")

    def all_of_it() -> list[torch.Tensor]:
        matrix = PackedLinear.pack(q)
        results = [matrix.apply(x), matrix.apply(x.bfloat16()), matrix.rows(index), *matrix.unpack().planes.values()]
        return [*results, *quantize_tensor(w[:8], "uint4-g32").planes.values()]

    want = all_of_it()
    torch.set_default_dtype(torch.bfloat16)
    try:
        have = all_of_it()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        have += all_of_it()
    for a, b in zip(have, want * 2, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_copies_are_of_their_own(packed: PackedLinear) -> None:
    x = torch.randn(4, 192)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert twin.handle != packed.handle and torch.equal(twin.apply(x), packed.apply(x))


def test_compilers_see_through(packed: PackedLinear) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(packed.apply(x * 2, activations="exact")) + packed.rows(torch.tensor([1, 2])).sum()

    x = torch.randn(2, 3, 192)
    with torch.inference_mode():
        want = Model()(x)
    with torch.no_grad():
        exported = torch.export.export(Model(), (x,))
        assert any("numfit.linear" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(x), want)
        compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)
    torch.library.opcheck(torch.ops.numfit.linear.default, (x, packed.key, 40, None, False),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_what_it_refuses(packed: PackedLinear) -> None:
    x = torch.randn(2, 192)
    for wrong, says in (
        (lambda: packed.apply(torch.randn(2, 191)), r"\[\.\.\., 192\]"),
        (lambda: packed.apply(torch.ones(2, 192, dtype=torch.int32)), "float activations"),
        (lambda: packed.apply(x, torch.zeros(39)), r"shape \(40,\)"),
        (lambda: packed.apply(x.to("meta")), "on 'meta'"),
        (lambda: packed.apply(x, activations="int4"), "int8, exact"),
        (lambda: packed.apply(x.clone().requires_grad_()), "no backward pass"),
        (lambda: packed.rows(torch.tensor([40])), "no row 40"),
        (lambda: packed.rows(torch.tensor([-1])), "no row -1"),
        (lambda: PackedLinear.pack(packed.unpack().to("meta")), "on 'meta'"),
        (lambda: PackedLinear.pack(quantize_tensor(torch.randn(2, 3, 64), "int4-g32")), "matrices"),
    ):
        with pytest.raises(OptionError, match=says):
            wrong()
    with torch.no_grad():
        assert packed.apply(x.clone().requires_grad_()).shape == (2, 40)


def test_planes_that_stand_for_no_number() -> None:
    q = quantized("mxfp4", 4, 64)
    q.planes["scale"][1, 1] = 255  # NaN of e8m0
    with pytest.raises(FormatError, match="stands for no number"):
        PackedLinear.pack(q)
    q = quantized("e4m3-g64", 4, 128)
    q.planes["codes"][0, 0] = 0x7F  # NaN of e4m3
    with pytest.raises(FormatError, match="stands for no number"):
        PackedLinear.pack(q)


def test_what_would_serve_a_format() -> None:
    kernel, rounding = kernel_of(format("mant4-g64"), 576)
    assert "two-lane" in kernel and rounding == 0
    kernel, rounding = kernel_of(format("nf4-g64"), 576)
    assert "int8-table" in kernel and 0 < rounding < 0.005


def test_no_warning_where_the_library_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is not None
