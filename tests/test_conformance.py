"""Conformance tests of mant-family.md sections 3, 4.1 and 4.6 (without OliVe and FineQ, which are not scalar types)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from numfit.formats import format, quantize_tensor
from numfit.formats.catalogue import MANT4
from numfit.formats.grid import mant_magnitudes, ranked

# relative squared error in percent at g = 64, absmax, standard normal weights (section 3)
RELATIVE = {"int4-g64": 1.149, "fp4-g64": 1.123, "nf4-g64": 0.848, "pot4-g64": 3.547, "flint4-g64": 2.577,
            "bitmod4-g64@fp16": 0.846, "mant4-g64": 0.772, "mantsv4-g64": 0.697}  # fmt: skip


@pytest.mark.parametrize(("name", "percent"), RELATIVE.items())
def test_relative_error_of_gaussian_groups(name: str, percent: float) -> None:
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(11))
    error = (quantize_tensor(w, name, scale_rule="absmax").dequantize() - w).square().view(-1, 64).mean(1)
    power = w.square().view(-1, 64).mean(1)
    assert 100 * (error / power).mean().item() == pytest.approx(percent, rel=0.02)


def test_more_members_are_never_worse() -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(12)) ** 3

    def error(name: str) -> float:
        return (quantize_tensor(w, name, scale_rule="absmax").dequantize() - w).double().square().sum().item()

    assert error("mant4-g64") <= min(error("int4-g64"), error("mant4-g128"))
    assert error("mantsv4-g64") <= error("mant4-g64") * (1 + 1e-6)  # its plain members differ in one redundant code


@pytest.mark.parametrize("a", MANT4)
def test_two_integer_lanes_make_the_dot_product(a: int) -> None:
    """Σ x·w = a·P1 + P2 with P1 = Σ x·s·i and P2 = Σ s·(x << i), within the widths that hardware is promised (1.4)."""
    g = torch.Generator().manual_seed(a)
    codes = torch.randint(0, 16, (200, 64), generator=g)
    x = torch.randint(-127, 128, (200, 64), generator=g)
    codes[0], x[0] = 7, 127  # the extreme
    sign, i = 1 - 2 * (codes >> 3), codes & 7
    p1, p2 = (x * sign * i).sum(1), (sign * (x << i)).sum(1)
    grid = format("mant4-g64").members[MANT4.index(a)]
    unit = mant_magnitudes(a)[0] / grid.levels[0]  # the power of two that the stored levels leave out
    dense = (x.double() * torch.tensor(grid.levels, dtype=torch.float64)[codes]).sum(1) * unit
    assert torch.equal((a * p1 + p2).double(), dense)
    assert p1.abs().max() <= 56_896 and p2.abs().max() <= 1_040_384


def test_greedy_palette_is_monotone() -> None:
    """More kept candidates never raise the error that the palette is chosen by."""
    fmt = format("dynfp4-g32@fp16")
    w = torch.randn(32, 512, generator=torch.Generator().manual_seed(13))
    before = float("inf")
    for k in (1, 2, 4, 8, 16, 32):
        part = replace(fmt, palette=k)
        error = (quantize_tensor(w, part, scale_rule="absmax").dequantize() - w).double().square().sum().item()
        assert error <= before * (1 + 1e-6)
        before = error


def test_bits_of_the_table() -> None:
    """Section 4.1, at K = 4096 (row parents add 16/4096, tensor parents next to nothing)."""
    wanted = {"int4-g128": 4.125, "uint4-g128": 4.15625, "nf4-g64": 4.25, "mxfp4": 4.25, "nvfp4": 4.5, "if4": 4.5,
              "mant4-g64": 4.3125, "bitmod3": 3.078125 + 16 / 4096, "bitmod4": 4.078125 + 16 / 4096, "razer4": 4.5,
              "razer4-g128@fp16": 4.125, "dynfp4": 4.375 + 16 / 4096}  # fmt: skip
    for name, bits in wanted.items():
        assert format(name).bits_per_weight((4096, 4096)) == pytest.approx(bits, abs=1e-5), name


def test_scale_of_the_nv_razer_spans_its_range() -> None:
    """RaZeR's scales end at 2**-5 and 28, and the two member bits never alter a scale."""
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(14)) * torch.logspace(-4, 1, 256)
    q = quantize_tensor(w, "razer4", scale_rule="absmax")
    _, params = q.params()
    assert params.scale.max() == 28 and params.scale.min() == 2.0**-5
    assert params.member is not None and set(params.member.unique().tolist()) == {0, 1, 2, 3}
    assert len(ranked(format("razer4").members[0])) == 16
