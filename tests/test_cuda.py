"""The formats on CUDA tensors: the same verbs, the same bytes once the parameters are fixed."""

from __future__ import annotations

import pytest
import torch

from numfit.formats import QuantizedTensor, bases, decode, encode, fit, format, pack, quantize_tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

NAMES = [*bases(), "mant4-g32@e3m3", "ams-e2m2k4-g128", "razer4-g128@fp16", "int4-tensor", "uint4-g64@u8", "nf4-g64@bf16"]


def weights() -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(96, 584, generator=g) * torch.exp(torch.randn(96, 1, generator=g)) * 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_same_bytes_for_the_same_parameters(name: str, rule: str) -> None:
    fmt, w = format(name), weights()
    params = fit(fmt, w, None, rule)
    here = pack(fmt, tuple(w.shape), encode(fmt, w, params), params)
    there = here.to("cuda")
    codes, on_device = there.params()
    again = pack(fmt, tuple(w.shape), encode(fmt, w.cuda(), on_device), on_device)
    for plane, tensor in here.planes.items():
        assert torch.equal(tensor.view(torch.uint8), again.planes[plane].cpu().view(torch.uint8)), plane
    assert torch.equal(decode(fmt, codes, on_device).cpu(), here.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_fit_is_as_good(name: str) -> None:
    w = weights()
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(8)) + 0.1

    def error(q: QuantizedTensor) -> float:
        return ((q.dequantize().cpu() - w).double().square() * importance.double()).sum().item()

    here = error(quantize_tensor(w, name, importance=importance))
    there = error(quantize_tensor(w.cuda(), name, importance=importance.cuda()))
    assert there == pytest.approx(here, rel=1e-5)


def test_compiled_search_on_the_device() -> None:
    g = torch.Generator().manual_seed(9)
    w = torch.randn(1024, 4096, generator=g)
    for name in ("mant4-g64", "fp4.25", "int4-g128", "uint4-g128", "mant4-g32@e3m3"):
        here = quantize_tensor(w, name, scale_rule="absmax").dequantize()
        there = quantize_tensor(w.cuda(), name, scale_rule="absmax").dequantize().cpu()
        assert ((there - w).square().sum() / (here - w).square().sum()).item() == pytest.approx(1, rel=1e-5)
