"""Side terms in the CPU kernels and in running models: the numbers of the decoded weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tiny_models import build, from_reference, logits, pack
from torch import Tensor

from numfit.errors import FormatError
from numfit.formats import QuantizedTensor, quantize_tensor
from numfit.kernels import PackedLinear, embedding, kernel_of, linear, reference
from numfit.native import isa, isa_names, library, set_isa
from numfit.runtime import kernels_in_use, load

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")

NAMES = (
    "lm4-row+rot", "lm2-row+rot3", "lm6+rot", "int4-g64+rank5", "mant4-g32@e3m3+rot+rank3+sparse20", "uint3-g32+sparse5",
    "fp4.25+rot+sparse1",
)  # fmt: skip


def weight(n: int, k: int, name: str) -> QuantizedTensor:
    g = torch.Generator().manual_seed(n * k)
    return quantize_tensor(torch.randn((n, k), generator=g) * 0.05, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 64), (48, 576), (130, 136)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_apply(name: str, shape: tuple[int, int], tokens: int) -> None:
    q = weight(*shape, name)
    packed = PackedLinear.pack(q)
    g = torch.Generator().manual_seed(tokens)
    x, bias = torch.randn((2, tokens, shape[1]), generator=g), torch.randn(shape[0], generator=g)
    want = x.double() @ q.dequantize().double().T + bias.double()
    spread = float((x.double() @ q.dequantize().double().T).std())
    exact = linear(x, packed, bias, "exact")
    assert exact.shape == (2, tokens, shape[0]) and float((exact - want).abs().max()) < 2e-5 * spread
    rough = linear(x, packed, bias)
    assert float((rough - want).square().mean().sqrt()) < 0.02 * spread
    half = linear(x.bfloat16(), packed, bias, "exact")
    assert half.dtype == torch.bfloat16
    same = x.bfloat16().double() @ q.dequantize().double().T + bias.double()
    assert float((half.double() - same).abs().max()) < 0.02 * (spread + float(bias.abs().max()))
    # a token alone gets the same bits
    assert torch.equal(linear(x[1, -1:], packed, bias), rough[1, -1:])


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_planes_come_back(name: str) -> None:
    q = weight(30, 136, name) if "-g" not in name else weight(30, 192, name)
    packed = PackedLinear.pack(q)
    assert torch.equal(packed.rows(slice(None)), q.dequantize())
    index = torch.tensor([[29, 0], [7, 7]])
    assert torch.equal(embedding(index, packed), reference.embedding(index, q))
    again = packed.unpack()
    assert list(again.planes) == list(q.planes)
    assert all(torch.equal(again.planes[n], p) and again.planes[n].dtype == p.dtype for n, p in q.planes.items())
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.rows(slice(3, 5)), packed.rows(slice(3, 5)))
    assert packed.nbytes >= q.nbytes


def test_kernel_says_what_it_does() -> None:
    packed = PackedLinear.pack(weight(8, 576, "lm4+rot+rank2+sparse5"))
    base = PackedLinear.pack(weight(8, 576, "lm4"))
    assert packed.kernel == base.kernel + ", rank 2, 3 sparse a row, rotated input" and base.side is None
    assert kernel_of(packed.format, 576)[0] == packed.kernel


def test_every_instruction_set_and_thread_number() -> None:
    packed = PackedLinear.pack(weight(300, 1536, "lm4+rot+rank70+sparse10"))
    g = torch.Generator().manual_seed(0)
    x = torch.randn((9, 1536), generator=g)
    best, before = isa(), torch.get_num_threads()
    results: list[Tensor] = []
    try:
        for name in isa_names():
            set_isa(name)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results += [linear(x, packed), torch.cat([linear(x[i : i + 1], packed) for i in range(9)])]
    finally:
        set_isa(best or "portable")
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_damaged_indices_are_refused() -> None:
    q = weight(4, 64, "int4-g32+sparse20")
    planes = {**q.planes, "sparse_index": torch.full_like(q.planes["sparse_index"], 64)}
    with pytest.raises(FormatError, match="points to columns 64"):
        PackedLinear.pack(QuantizedTensor(q.format, q.shape, planes))


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("fmt", ["lm4-row+rot", "int4-g32+rot+rank2+sparse30"])
def test_models(kind: str, fmt: str, tmp_path: Path) -> None:
    """Loaded, run with kernels and without, saved and loaded again: the logits of the decoded weights."""
    build(kind, tmp_path / "source")
    plain = pack(tmp_path / "source", tmp_path / "packed", fmt, fmt if kind == "llama-tied" else "int8-g32")
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    want = logits(from_reference(plain))
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=0)
    if kind != "mixtral":
        assert any("rotated input" in kernel for kernel in kernels_in_use(model)), kernels_in_use(model)
    slow, _ = load(tmp_path / "packed", tokenizer=False, activations="reference")
    torch.testing.assert_close(logits(slow), want, atol=2e-5, rtol=0)
    state = model.state_dict()
    slow.load_state_dict(state)
    torch.testing.assert_close(logits(slow), want, atol=2e-5, rtol=0)
