"""Learned levels against an exact one-dimensional k-means, a table of any4's recipe, and the doors of other formats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.formats import Format, Params, QuantizedTensor, decode, encode, fit, format, pack, quantize_tensor
from numfit.formats import learned as learned_room
from numfit.formats.fit import normalized_importance
from numfit.formats.learned import BORDERS, learn, nearest_scales
from numfit.kernels import PackedLinear, kernel_of, linear
from numfit.kvcache.names import stream
from numfit.native import library
from numfit.reconstruction.cells import cells
from numfit.reconstruction.tune import FixedRounding
from numfit.solvers import SolverOptions, solve
from numfit.solvers.levels import refit_levels
from numfit.solvers.linalg import row_losses
from numfit.solvers.state import Problem

NAMES = ["km2-row", "km3-row", "km4-row", "any3-g128", "any4-g64", "any4-g32@e3m3", "any4-g20@u8", "any3-g16@e8m0",
         "any4-g64@e4m3", "any4-g64@bf16"]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def least_error(x: Tensor, weight: Tensor, count: int) -> float:
    """The least Σ weight·(x − level)² of `count` levels for one row [K], fp64, by dynamic programming over all sorted cells."""
    value, order = x.double().sort()
    w = weight.double()[order]
    k = len(value)
    best = [0.0] + [float("inf")] * k
    cost = np.zeros((k + 1, k + 1))
    for i in range(k):
        for j in range(i + 1, k + 1):
            v, m = value[i:j], w[i:j]
            cost[i, j] = float((m * (v - (m * v).sum() / m.sum()).square()).sum())
    for _ in range(count):
        best = [0.0] + [min(best[i] + cost[i, j] for i in range(j)) for j in range(1, k + 1)]
    return best[k]


def error_of(x: Tensor, weight: Tensor, levels: Tensor) -> Tensor:
    """Σ weight·(x − nearest level)² of rows, by trying every level."""
    return (weight.double() * (x.double()[:, :, None] - levels.double()[:, None]).square().amin(2)).sum(1)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_short_rows_are_solved_exactly(count: int) -> None:
    """Up to rounding of levels to fp16, which costs some 1e-7 of the energy."""
    for k in (1, 3, count, 31, BORDERS):
        x = normal(3, k, seed=k) * torch.tensor([[1.0], [30.0], [1e-2]])
        x[1] = (x[1] * 0.2).round()  # ties
        weight = normal(1, k, seed=k + 1).exp()
        found = error_of(x, weight, learn(x, weight, count))
        for row, error in zip(x, found.tolist(), strict=True):
            energy = float((weight[0].double() * row.double().square()).sum())
            assert error <= least_error(row, weight[0], count) * (1 + 1e-3) + 1e-6 * energy


def test_long_rows_are_nearly_solved() -> None:
    weight = normal(1, 150, seed=2).exp()
    for draw in (normal(3, 150), normal(3, 150, seed=1) ** 3):
        found = error_of(draw, weight, learn(draw, weight, 8)).tolist()
        ratios = [error / least_error(row, weight[0], 8) for row, error in zip(draw, found, strict=True)]
        assert max(ratios) < 1.05 and sum(ratios) / 3 < 1.02


def test_levels_ascend_in_fp16_and_rows_stand_alone() -> None:
    x, weight = normal(70, 300), normal(70, 300, seed=3).exp()
    x[4], x[5], x[6, 1:] = 0.0, 2.5, 0.0
    levels = learn(x, weight, 16)
    assert torch.equal(levels, levels.half().float()) and bool((levels.diff(dim=1) >= 0).all())
    assert not bool((torch.signbit(levels) & (levels == 0)).any())
    assert torch.equal(torch.cat([learn(x[i : i + 1], weight[i : i + 1], 16) for i in range(70)]), levels)
    assert bool((error_of(x[4:7], weight[4:7], levels[4:7]) < 1e-3 * weight[4:7].sum(1)).all())


# -- the recipe of any4: an independent table ---------------------------------------------------------------------------------

# dB for normal, Laplace and Student-t (5) weights: 30 iterations of Lloyd from NF4 on w / absmax of 128, weighted by the
# scales' squares, in float64 (ams-pot-formats.md section 7)
LLOYD_FROM_NF4 = {"normal": 20.84, "laplace": 19.39, "t5": 19.28}


def lloyd_from_nf4(w: np.ndarray) -> float:
    """That recipe in numpy: SQNR in dB."""
    nf4 = np.array(format("nf4").members[0].levels)
    scale = np.abs(w).reshape(len(w), -1, 128).max(2)
    u, s = w / np.repeat(scale, 128, 1), np.repeat(scale, 128, 1)
    error = 0.0
    for x, weight in zip(u, s**2, strict=True):
        levels = nf4.copy()
        for _ in range(30):
            code = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
            mass, moment = np.bincount(code, weight, 16), np.bincount(code, weight * x, 16)
            levels = np.where(mass > 0, moment / np.maximum(mass, 1e-300), levels)
        code = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        error += (weight * (x - levels[code]) ** 2).sum()
    return float(10 * np.log10((w**2).sum() / error))


@pytest.mark.parametrize("distribution", LLOYD_FROM_NF4)
def test_any4_against_the_table(distribution: str) -> None:
    g = np.random.default_rng(20260101)
    draws = {"normal": g.standard_normal((64, 4096)), "laplace": g.laplace(0, 1, (64, 4096)), "t5": g.standard_t(5, (64, 4096))}
    w = draws[distribution].astype(np.float32)
    assert lloyd_from_nf4(w.astype(np.float64)) == pytest.approx(LLOYD_FROM_NF4[distribution], abs=0.01)

    def sqnr(rule: str) -> float:
        x = torch.from_numpy(w)
        y = quantize_tensor(x, "any4-g128", scale_rule=rule).dequantize()
        return float(10 * torch.log10(x.double().square().sum() / (x.double() - y).square().sum()))

    absmax = sqnr("absmax")  # the same scales; a better start, so never worse and not by much
    assert LLOYD_FROM_NF4[distribution] - 0.02 <= absmax <= LLOYD_FROM_NF4[distribution] + 0.7
    assert sqnr("mse") > absmax


# -- the value ----------------------------------------------------------------------------------------------------------------


def test_bits_count_the_levels() -> None:
    """At K = 4096, 16 levels of a row cost 256 / 4096 bits a weight."""
    wanted = {"km3-row": 3 + 128 / 4096, "km4-row": 4 + 256 / 4096, "any4-g128": 4 + 256 / 4096 + 16 / 128,
              "any4-g64@e3m3": 4 + 256 / 4096 + 6 / 64 + 16 / 4096, "any3-g128": 3 + 128 / 4096 + 16 / 128}  # fmt: skip
    for name, bits in wanted.items():
        assert format(name).bits_per_weight((64, 4096)) == pytest.approx(bits, abs=1e-12), name
    assert list(format("km4-row").planes((3, 5))) == ["codes", "levels"]
    assert list(format("any4").planes((3, 200))) == ["codes", "scale", "levels"]


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_round_trip(name: str) -> None:
    fmt = format(name)
    data = fmt.to_json()
    assert data["learned"] is True and data["version"] == 4
    assert Format.from_json(data) == fmt and fmt.parent_span in ("row", "tensor")
    with pytest.raises(FormatError, match="newer numfit"):  # what a reader without learned levels would say
        Format.from_json({**data, "learned": False})


@pytest.mark.parametrize(
    ("name", "message"),
    [("km4-tensor", "one for the tensor says nothing"), ("km4-row@bf16", "need no scale"), ("any4-row@e3m3", "need no scale")],
)
def test_what_says_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        format(name)


def test_parts_that_exclude_each_other() -> None:
    for change in ({"zero": True}, {"unit": 4}, {"members": format("mant4").members}, {"palette": 1}):
        with pytest.raises(FormatError, match="learned levels go with neither"):
            replace(format("any4"), **change)


# -- the verbs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_nearest_level(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = format(name)
    for shape in ((300, 140), (1, 129), (3, 128)):  # more rows than one compiled pass takes
        w = normal(*shape, seed=shape[1]) * normal(shape[0], 1, seed=5).exp()
        w[0, :20], w[0, 20:40] = 0.0, w[0, 40]
        params = fit(fmt, w, normal(shape[1], seed=6).exp())
        codes = encode(fmt, w, params)
        values = decode(fmt, codes, params)
        assert params.levels is not None
        scale = params.effective_scale().repeat_interleave(fmt.geometry(shape[1]).block, 1)[:, : shape[1]]
        assert torch.equal(values, params.levels.gather(1, codes.long()) * scale)
        best = (w[:, :, None].double() - (params.levels[:, None] * scale[:, :, None]).double()).abs().amin(2)
        assert bool(((w - values).abs() <= best * (1 + 1e-4) + 1e-6 * scale).all())
        with monkeypatch.context() as eager:
            eager.setattr(learned_room, "usable", lambda device: False)
            assert torch.equal(encode(fmt, w, params), codes)


@pytest.mark.parametrize("name", [*NAMES, "km4-row+rot", "any4-g64+sparse20", "km3-row+rot3+rank2+sparse5"])
def test_planes_hold_everything(name: str) -> None:
    fmt = format(name)
    for shape in ((3, 200), (2, 3, 131), (129,), (0, 128)):
        w = normal(*shape, seed=1)
        q = quantize_tensor(w, fmt)
        found = {n: (p.dtype, tuple(p.shape)) for n, p in q.planes.items()}
        assert found == {n: tuple(s) for n, s in fmt.planes(shape).items()}
        assert q.nbytes == fmt.nbytes(shape)
        codes, params = q.params()
        assert list(pack(fmt, shape, codes, params, q.terms()).planes) == list(q.planes)
        again = QuantizedTensor.from_planes(fmt, shape, {n: p.clone() for n, p in q.planes.items()})
        assert torch.equal(again.dequantize(), q.dequantize())
        if len(shape) > 1 and shape[0] > 1:
            index = torch.tensor([1, 0])
            assert torch.equal(q.rows(index), q.dequantize()[index])


def test_importance_is_heeded() -> None:
    w, h = normal(16, 256), normal(256, seed=1).mul(2).exp()
    for name in ("km3-row", "any3-g128"):

        def loss(importance: Tensor | None, name: str = name) -> float:
            return float((h * (quantize_tensor(w, name, importance=importance).dequantize() - w).square()).sum())

        assert loss(h) < 0.7 * loss(None)


def test_scales_of_a_block_only_get_better() -> None:
    fmt, w, h = format("any4-g64"), normal(40, 64), normal(64, seed=1).exp()
    params = fit(fmt, w, None, "absmax")
    assert params.levels is not None
    found = nearest_scales(fmt, w, normalized_importance(h), params.levels, params.scale, None)

    def loss(scale: Tensor) -> Tensor:
        p = replace(params, scale=scale)
        return (h * (decode(fmt, encode(fmt, w, p), p) - w).square()).sum(1)

    after, before = loss(found), loss(params.scale)
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < float(before.sum())


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(FormatError, match="use a wider scale type"):
        quantize_tensor(torch.full((2, 128), 1e5), "km4-row")


# -- solvers ------------------------------------------------------------------------------------------------------------------


def layer(n: int, k: int) -> tuple[Tensor, Tensor]:
    x = normal(8 * k, k, seed=1) @ (torch.eye(k) + 0.2 * normal(k, k, seed=2)) * normal(k, seed=3).mul(0.6).exp()
    return normal(n, k) * 0.05, 2 / len(x) * x.T @ x


@pytest.mark.parametrize("name", ["km3-row", "any4-g20", "any3-g16@e3m3"])
def test_refitted_levels_solve_the_normal_equations(name: str) -> None:
    """No small change of the levels lowers the loss, but for their rounding; codes keep their weights."""
    fmt, (w, h) = format(name), layer(9, 60)
    params = fit(fmt, w, h.diagonal())
    codes = encode(fmt, w + 0.02 * normal(9, 60, seed=9), params)
    problem = Problem(w, h, fmt, SolverOptions.parse("gptq"), h.diagonal().clone())
    start = problem.state(codes, params)
    state = refit_levels(problem, start)
    assert bool((state.losses < start.losses).all()) and state.params.levels is not None
    assert bool((state.params.levels.diff(dim=1) >= 0).all())
    scale = params.effective_scale().repeat_interleave(fmt.geometry(60).block, 1)[:, :60]
    root = torch.linalg.cholesky(h.double())
    for r in range(9):  # by least squares over all levels in use
        z = torch.zeros(60, 1 << fmt.bits, dtype=torch.float64)
        z[torch.arange(60), codes[r].long()] = scale[r].double()
        used = z.abs().sum(0) > 0
        best = torch.linalg.lstsq(root.T @ z[:, used], (root.T @ w[r].double())[:, None]).solution[:, 0]
        least = row_losses((z[:, used] @ best).float()[None] - w[r], h)
        assert float(state.losses[r]) <= float(least) * (1 + 1e-3)


@pytest.mark.parametrize("name", ["km2-row", "km4-row", "any4-g20", "any3-g32@u8"])
def test_every_step_helps(name: str) -> None:
    fmt, (w, h) = format(name), layer(21, 75)
    start = solve(w, h, fmt, "nearest").loss
    before = start
    for chain in ("gptq", "gptq+alternate", "gptq+alternate+descent", "gptq+alternate+descent+refit"):
        found = solve(w, h, fmt, chain)
        assert found.start == start and found.loss <= before * (1 + 1e-9)
        before = found.loss
        q = pack(fmt, tuple(w.shape), found.codes, found.params).dequantize()
        assert float(row_losses(q - w, h).sum()) == pytest.approx(found.loss, rel=1e-6)
    assert before < 0.75 * start
    for order in ("none", "act", "group"):
        assert solve(w, h, fmt, SolverOptions.parse("gptq", order=order)).loss < start
    if isinstance(fmt.block, int):
        assert solve(w, h, fmt, "gptq+blocks").loss < solve(w, h, fmt, "gptq").loss
    else:
        with pytest.raises(OptionError, match="smaller than a row"):
            solve(w, h, fmt, "gptq+blocks")


@pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")
def test_compiled_and_eager_solvers_agree_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import numfit.solvers.descent
    import numfit.solvers.sweep

    w, h = layer(270, 40)  # more rows than one compiled pass takes
    for name in ("km3-row", "any4-g16"):
        found = solve(w, h, format(name), "gptq+descent")
        with monkeypatch.context() as eager:
            eager.setattr(numfit.solvers.sweep, "usable", lambda device: False)
            eager.setattr(numfit.solvers.descent, "usable", lambda device: False)
            other = solve(w, h, format(name), "gptq+descent")
        assert torch.equal(found.codes, other.codes)


# -- reconstruction and kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["km3-row", "any4-g20"])
def test_learned_rounding_starts_from_these_codes(name: str) -> None:
    fmt, w = format(name), normal(5, 70)
    params = fit(fmt, w)
    codes = encode(fmt, w, params)
    assert params.levels is not None
    level = params.levels.gather(1, codes.long())
    found = cells(fmt, codes, params, w)
    up = found.offset > 0
    assert torch.equal(torch.where(up, found.high, found.low), level)
    assert torch.equal(torch.where(up, found.high_code, found.low_code), codes)
    assert bool(((found.high_code.int() - found.low_code.int()).abs() <= 1).all()) and bool((found.low <= found.high).all())
    assert torch.equal(FixedRounding(fmt, codes, params).values(slice(None)), level)


def test_linears_decode_in_pytorch_and_kernels_say_why() -> None:
    q, x = quantize_tensor(normal(30, 128), "km4-row"), normal(7, 128, seed=1)
    assert torch.allclose(linear(x, q), x @ q.dequantize().T, atol=1e-5)
    if library() is not None:
        for refused in (lambda: PackedLinear.pack(q), lambda: kernel_of(q.format, 128)):
            with pytest.raises(FormatError, match="levels differ from row to row"):
                refused()


def test_parameters_without_levels_stay_as_they_were() -> None:
    assert Params(torch.ones(1, 1)).levels is None
    assert "learned" not in format("nf4").to_json() and format("nf4").to_json()["version"] == 1


def test_caches_take_fixed_levels() -> None:
    with pytest.raises(OptionError, match="every token would carry"):
        stream("km4-row")
