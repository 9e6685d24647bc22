"""Native fitting and encoding against the eager reference: every format, rule and instruction set.

Codes must be the same bits. So must scales, members and zero points, but where two candidates' errors differ by less than the
rounding of their fp32 sums: then the block's error, computed in float64 from the decoded weights, must be as small.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from numfit.errors import NumfitError
from numfit.formats import Format, Params, bases, decode, encode, fit, fitter, format, onepass, quantize_tensor
from numfit.formats import codec as codec_module
from numfit.formats import fit as fit_function
from numfit.formats.nearest import tables
from numfit.native import isa_names, library, set_isa

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")
ISAS = isa_names()

NAMES = [format(name).name for name in bases()] + [
    "mant4-g32@e3m3", "mant4-g64@u8", "int4-row", "uint4-row", "int4-tensor", "uint3-tensor", "fp4.25-tensor",
    "fp5.33-g48@bf16", "ams-e2m1k4-g20", "razer4-g64@fp16", "nf4-g100", "mant4-g48", "int5-g7@u8", "e5m1-g16@e4m3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def best_isa() -> Iterator[None]:
    yield
    set_isa(ISAS[-1])


def reference(
    monkeypatch: pytest.MonkeyPatch, fmt: Format, w: Tensor, importance: Tensor | None, rule: str
) -> tuple[Params, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(fitter, "usable", lambda device: False)
        patch.setattr(codec_module, "usable", lambda device: False)
        params = fit_function(fmt, w, importance, rule)
        return params, encode(fmt, w, params)


def rules(name: str) -> tuple[str, ...]:
    return ("mse", "floor", "ceil") if name.startswith("mx") else ("mse", "absmax")


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian rows with a row of zeros, one of subnormals, one large, one with outliers."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    for row, change in ((1, lambda r: r * 0), (2, lambda r: r * 1e-38), (3, lambda r: r * 1e3), (4, lambda r: r**5 * 1e4)):
        if row < rows:
            w[row] = change(w[row])
    return w


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_parameters_and_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = format(name)
    for rows, columns in ((7, 300), (1, 128)):
        w = weights(rows, columns, rows)
        channels = torch.rand(columns, generator=torch.Generator().manual_seed(7)) + 0.01
        for rule in rules(name):
            for importance in (None, channels):
                want, codes = reference(monkeypatch, fmt, w, importance, rule)
                assert torch.equal(encode(fmt, w, want), codes), (name, rule, "codes under the same parameters")
                have = fit(fmt, w, importance, rule)
                equal = all(same(getattr(have, f), getattr(want, f)) for f in ("scale", "parent", "member", "zero", "palette"))
                if equal:
                    continue
                h = torch.ones(columns) if importance is None else importance
                cost = [((decode(fmt, encode(fmt, w, p), p) - w).double().square() * h).sum(1) for p in (have, want)]
                assert bool((cost[0] <= cost[1] * (1 + 2e-6) + 1e-300).all()), (name, rule, importance is None)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    w = weights(9, 333, 1)
    names = ["mant4-g64", "fp4.25", "fp5.33-g96", "uint4-g64", "nvfp4", "mxfp4", "int8-g128", "pot3", "if4", "ant4-row"]
    for name in names:
        set_isa(ISAS[0])
        want = quantize_tensor(w, name)
        set_isa(isa)
        have = quantize_tensor(w, name)
        for plane, value in want.planes.items():
            assert torch.equal(have.planes[plane].view(torch.uint8), value.view(torch.uint8)), (name, plane)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    w = weights(200, 640, 2)
    before = torch.get_num_threads()
    try:
        for name in ("mant4-g64", "fp4.25", "uint4-g64", "int4-tensor"):
            results = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results.append(quantize_tensor(w, name).planes)
            for other in results[1:]:
                assert all(torch.equal(results[0][p].view(torch.uint8), other[p].view(torch.uint8)) for p in other), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["int4-g64", "nf4-g64", "mant4-g64", "fp4-g32"])
def test_against_exhaustive_search_in_float64(name: str) -> None:
    """`absmax` leaves only the member free: it must be the one of least error, found here without any of our code."""
    fmt = format(name)
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(5))
    params = fit(fmt, w, None, "absmax")
    have = (decode(fmt, encode(fmt, w, params), params).double() - w).square()
    block = int(fmt.block)
    for row in range(4):
        for start in range(0, 128, block):
            x = w[row, start : start + block].double()
            least = min(
                float((x[:, None] - scale * torch.tensor([v for v in grid.levels if v == v], dtype=torch.float64)).square()
                      .min(1).values.sum())
                for grid in fmt.members
                for scale in [float((x.abs().max() / grid.max_level).to(torch.float16))]
            )  # fmt: skip
            assert float(have[row, start : start + block].sum()) == pytest.approx(least, rel=1e-5)


def test_what_the_library_would_misread_is_refused() -> None:
    fmt, w = format("fp4.25-g32"), weights(6, 96, 3)
    t, params = tables(fmt.members, fmt.rounding, torch.device("cpu")), fit(fmt, w)
    scale, member = params.effective_scale(), params.member
    assert member is not None and member.shape == (6, 24) and scale.shape == (6, 3)
    assert torch.equal(onepass.encode(t, w, 32, 4, scale, None, member), encode(fmt, w, params))
    for bad in ((scale[:5], None, member), (scale[:, :2], None, member), (scale, scale[:, :1], member),
                (scale, None, member[:, :23]), (scale, None, member[:3])):  # fmt: skip
        with pytest.raises(NumfitError, match="do not fit together"):
            onepass.encode(t, w, 32, 4, *bad)
    with pytest.raises(NumfitError, match="do not fit together"):
        onepass.encode(t._replace(thresholds=t.thresholds[:, 1:]), w, 32, 4, scale, None, member)
    search = fitter.Fitter(fmt, None, "mse", w.device, w.numel()).native
    assert search is not None
    for h in (torch.ones(95), torch.ones(1, 96), torch.ones(6, 96)):
        for call in (lambda: search.fit(w, h, None, 32, 8), lambda: search.choose(w, h, 1.0),  # noqa: B023
                     lambda: search.row_errors(w, h, torch.ones(1, 3), None)):  # noqa: B023  # fmt: skip
            with pytest.raises(NumfitError, match="do not fit together"):
                call()
    for s, zero in ((torch.ones(3, 3), None), (torch.ones(3), None), (torch.ones(1, 3), torch.ones(1, 2))):
        with pytest.raises(NumfitError, match="do not fit together"):
            search.row_errors(w, None, s, zero)


def test_nothing_to_do() -> None:
    for shape in ((0, 64), (3, 64)):
        q = quantize_tensor(torch.zeros(shape), "mant4-g64")
        assert torch.equal(q.dequantize(), torch.zeros(shape))
