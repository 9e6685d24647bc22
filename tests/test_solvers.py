"""Solvers against their definitions: identities under H = I, sums of column losses, normal equations, monotony, odd shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.formats import Format, bases, decode, encode, fit, format
from numfit.formats.fit import normalized_importance
from numfit.formats.grid import Grid, ranked
from numfit.solvers import Solution, SolverOptions, solve
from numfit.solvers.blocks import blocks
from numfit.solvers.descent import descent
from numfit.solvers.linalg import cholesky_inverse_upper, row_losses
from numfit.solvers.nearest import nearest
from numfit.solvers.order import make_plan, small_units
from numfit.solvers.refit import normal_equations, refit
from numfit.solvers.retarget import retarget
from numfit.solvers.rounding import Rounder
from numfit.solvers.state import Problem
from numfit.solvers.sweep import Terms, sweep

ORDERS = ("static", "none", "act", "group")
# every kind of parameter: members per block, small units, zero points, parents, palettes, one of the tensor, 8-bit codes
KINDS = ("int3-g32", "uint2-g32", "mant4-g32", "fp4.25", "fp5.33", "ams-e2m2k4-g32", "ant4", "mxfp4", "nvfp4", "razer4",
         "dynfp4", "pot3-g32", "pot2-log-g32", "int4-tensor", "uint3-tensor", "ams-e2m2k4-tensor", "int8-row", "nf4-g32@e3m3",
         "uint4-g32@u8", "ams-e2m1k4-g32@e4m3")  # fmt: skip


def _layer(n: int, k: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.05
    mix = torch.eye(k) + torch.randn(k, k, generator=g) * 0.2
    x = torch.randn(tokens or 8 * k, k, generator=g) @ mix * torch.exp(torch.randn(k, generator=g) * 0.6)
    return w, 2 / len(x) * x.T @ x


def _small_format(base: str, k: int) -> Format:
    fmt = format(base)
    return fmt if isinstance(fmt.block, str) or fmt.block <= k else format(f"{base}-g16")


def _problem(w: Tensor, h: Tensor, fmt: Format, **numbers: object) -> Problem:
    options = SolverOptions.parse("gptq", **numbers)
    return Problem(w, h, fmt, options, h.diagonal().clone())


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [*bases(), "ams-e2m2k7", "e3m4"])
def test_sweep_and_descent_without_correlation_are_nearest(base: str) -> None:
    k = 37
    w, _ = _layer(5, k)
    fmt = _small_format(base, k)
    params = fit(fmt, w)
    codes = encode(fmt, w, params)
    for order in ORDERS:
        plan = make_plan(fmt, torch.linspace(1, 2, k).flip(0), order, False, 16)
        swept = sweep(fmt, w, torch.eye(k), plan, params, choose=False)
        assert torch.equal(swept.codes, codes), order
    problem = _problem(w, torch.eye(k), fmt, panel=16)
    start = problem.state(codes, params)
    assert torch.equal(descent(problem, start).codes, codes)
    other = (codes.long() + 1) % (1 << fmt.bits)  # from anywhere else it comes to the same values
    usable = torch.tensor(sorted(set.intersection(*(_emitted(g) for g in fmt.members))))
    other = usable[other % len(usable)].to(torch.uint8)
    found = descent(problem, problem.state(other, params))
    again = descent(problem, found)
    assert bool((again.losses <= start.losses * (1 + 1e-4) + 1e-12).all())


def _emitted(grid: Grid) -> set[int]:
    return {code for _, code in ranked(grid)}


@pytest.mark.parametrize("name", ["fp4.25", "ams-e2m2k4-g32"])
def test_members_chosen_without_correlation_are_those_of_least_error(name: str) -> None:
    fmt = format(name)
    w, _ = _layer(6, 70)
    params = fit(fmt, w)
    plan = make_plan(fmt, torch.ones(70), "none", False, 32)
    swept = sweep(fmt, w, torch.eye(70), plan, params)
    error = (decode(fmt, swept.codes, swept.params) - w).square().sum(1)
    best = (decode(fmt, encode(fmt, w, params), params) - w).square().sum(1)
    torch.testing.assert_close(error, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", KINDS)
def test_column_losses_sum_to_the_loss(name: str, order: str) -> None:
    """Σ e² = tr((Q - W) H (Q - W)ᵀ) exactly where nothing is damped and parameters are given."""
    fmt, k = format(name), 70
    w, h = _layer(7, k)
    plan = make_plan(fmt, h.diagonal(), order, False, 24)
    u = cholesky_inverse_upper(h[plan.order][:, plan.order], 0.0).u
    swept = sweep(fmt, w, u, plan, fit(fmt, w))
    losses = row_losses(decode(fmt, swept.codes, swept.params) - w, h)
    torch.testing.assert_close(swept.losses, losses, rtol=2e-4, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_undone(order: str) -> None:
    """With steps too fine to matter, a sweep in any order gives the weights back."""
    k = 50
    w, h = _layer(3, k)
    fmt = format("int8-g16@bf16")
    plan = make_plan(fmt, h.diagonal(), order, False, 16)
    assert sorted(plan.order.tolist()) == list(range(k))
    covered = [i for panel in plan.panels for s in panel for i in range(s.start, s.stop)]
    assert covered == list(range(k))
    u = cholesky_inverse_upper(h[plan.order][:, plan.order], 0.01).u
    swept = sweep(fmt, w, u, plan, fit(fmt, w))
    torch.testing.assert_close(decode(fmt, swept.codes, swept.params), w, rtol=0, atol=0.01)


def test_units_and_blocks_stay_together() -> None:
    _, h = _layer(2, 100)
    fmt = format("ams-e2m2k4-g32")
    plan = make_plan(fmt, h.diagonal(), "static", True, 10)
    changes = int((plan.unit[1:] != plan.unit[:-1]).sum()) + 1
    assert changes == fmt.geometry(100).units
    assert plan.order.tolist() != list(range(100))
    by_block = make_plan(format("int4-g32"), h.diagonal(), "group", True, 40)
    assert int((by_block.block[1:] != by_block.block[:-1]).sum()) + 1 == 4
    fitted = [b for panel in by_block.panels for s in panel for b in s.blocks]
    assert sorted(fitted) == [0, 1, 2, 3]


def test_sweep_of_single_columns_is_the_exact_update() -> None:
    fmt, k = format("int3-row"), 9
    w, h = _layer(4, k, seed=3)
    params = fit(fmt, w)
    plan = make_plan(fmt, h.diagonal(), "none", False, 4)
    swept = sweep(fmt, w, cholesky_inverse_upper(h, 0.0).u, plan, params)
    rounder, rest = Rounder(fmt, params, k), w.double()
    for j in range(k):
        code, q = rounder.column(rest[:, j].float(), 0, 0)
        assert torch.equal(code, swept.codes[:, j])
        error = q.double() - rest[:, j]
        rest[:, j + 1 :] -= error[:, None] * h[j, j + 1 :].double() @ torch.linalg.inv(h[j + 1 :, j + 1 :].double())


# -- factors ----------------------------------------------------------------------------------------------------------


def test_factor_is_that_of_the_inverse() -> None:
    _, h = _layer(1, 40)
    u, damp, notes = cholesky_inverse_upper(h, 0.01)
    damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(u.double().T @ u.double() @ damped, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(u, u.triu()) and damp == 0.01 and notes == ()


def test_singular_moments_are_damped_and_reported() -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    h = x.T @ x
    found = cholesky_inverse_upper(h, 0.0)
    assert found.damp > 0 and "damping raised" in found.notes[0]
    w, _ = _layer(4, 20)
    s = solve(w, h, format("int4-g16"), SolverOptions.parse("gptq+alternate+descent", damp=0.0))
    assert any("damping" in note for note in s.notes) and s.loss <= s.start


def test_moments_that_are_none() -> None:
    w, h = _layer(4, 20)
    bad = h.clone()
    bad[3, 4] = torch.nan
    with pytest.raises(OptionError, match="NaN or Inf"):
        solve(w, bad, format("int4-g16"), "gptq")
    with pytest.raises(OptionError, match="20 × 20"):
        solve(w, h[:5, :5], format("int4-g16"), "gptq")
    negative = h.clone()
    negative[0, 0] = -1
    with pytest.raises(OptionError, match="negative diagonal"):
        solve(w, negative, format("int4-g16"), "gptq")
    indefinite = torch.ones(20, 20) * 1e6
    indefinite.fill_diagonal_(1.0)
    with pytest.raises(OptionError, match="not positive semidefinite"):
        solve(w, indefinite, format("int4-g16"), "gptq")
    with pytest.raises(FormatError, match="NaN or Inf"):
        solve(w * torch.inf, h, format("int4-g16"), "gptq")
    with pytest.raises(FormatError, match="@fp16 scales of int4-g16 end at"):
        solve(w * 1e9, h, format("int4-g16"), "gptq")
    with pytest.raises(FormatError, match="matrix"):
        solve(w[0], h, format("int4-g16"), "gptq")


@pytest.mark.parametrize("name", KINDS)
def test_inputs_never_on(name: str) -> None:
    fmt = format(name)
    w, h = _layer(5, 40)
    zero = solve(w, torch.zeros_like(h), fmt, "gptq+alternate+descent")
    plain = solve(w, torch.zeros_like(h), fmt, "nearest")
    assert torch.equal(zero.codes, plain.codes) and zero.loss == 0 and "never on" in zero.notes[0]
    h[3:8] = 0
    h[:, 3:8] = 0
    s = solve(w, h, fmt, "gptq+alternate+descent")
    assert any("5 of 40" in note for note in s.notes) and s.loss <= s.start
    q = decode(fmt, s.codes, s.params)
    assert float((q - w)[:, 3:8].square().mean()) <= 0.5 * float(w[:, 3:8].square().mean())  # kept, not zeroed


def test_units_of_h_do_not_matter() -> None:
    w, h = _layer(5, 40)
    a = solve(w, h, format("mant4-g32"), "gptq+alternate")
    for factor in (2.0**-60, 2.0**40):
        b = solve(w, h * factor, format("mant4-g32"), "gptq+alternate")
        assert torch.equal(a.codes, b.codes)


# -- monotony and the bar of nearest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_no_chain_is_worse_than_what_it_started_from(name: str) -> None:
    fmt = format(name)
    w, h = _layer(9, 75)
    last: Solution | None = None
    chains = ["nearest", "gptq", "gptq+alternate", "gptq+alternate+descent", "gptq+alternate+descent+refit"]
    for chain in chains:
        s = solve(w, h, fmt, chain)
        actual = float(row_losses(decode(fmt, s.codes, s.params) - w, h).sum())
        assert s.loss == pytest.approx(actual, rel=1e-9)
        assert last is None or s.loss <= last.loss
        last = s
    assert last is not None and last.loss < 0.9 * last.start  # and it pays
    for order in ("none", "act", "group"):
        s = solve(w, h, fmt, SolverOptions.parse("gptq", order=order))
        assert s.loss < s.start


@pytest.mark.parametrize("name", KINDS)
def test_each_row_is_kept_only_if_better(name: str) -> None:
    fmt = format(name)
    w, h = _layer(9, 75, seed=1)
    problem = _problem(w, h, fmt)
    start = nearest(problem)
    better = descent(problem, start)
    assert bool((better.losses <= start.losses).all())
    if fmt.block != "tensor":
        assert bool((refit(problem, start).losses <= start.losses).all())
    assert float(refit(problem, better).losses.sum()) <= float(better.losses.sum())


@pytest.mark.parametrize("name", ["int3-g32", "uint2-g32", "mant4-g32", "fp5.33", "uint3-tensor", "nf4-g32@e3m3"])
def test_normal_equations_are_the_loss(name: str) -> None:
    """sᵀ A s - 2 rᵀ s + w H wᵀ is the loss of the row."""
    fmt = format(name)
    w, h = _layer(6, 75)
    problem = _problem(w, h, fmt)
    state = nearest(problem)
    mean = float(h.diagonal().double().mean())
    for rows, g in normal_equations(problem, state):
        s = state.params.effective_scale().double().expand(6, -1)[rows]
        a, r = g.aa, g.ar
        if state.params.zero is not None:
            z = state.params.zero.double().expand(6, -1)[rows]
            assert g.ab is not None and g.bb is not None and g.br is not None
            cross = g.ab * z[:, None]
            a = a - cross - cross.transpose(1, 2) + z[:, :, None] * z[:, None] * g.bb
            r = r - z * g.br
        value = torch.einsum("nb,nbc,nc->n", s, a, s) - 2 * (r * s).sum(1)
        value = value * mean + row_losses(w, h)[rows]
        torch.testing.assert_close(value, state.losses[rows], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [n for n in KINDS if isinstance(format(n).block, int)])
def test_blocks_get_better_parameters_and_codes(name: str) -> None:
    fmt = format(name)
    w, h = _layer(9, 75)
    h[7], h[:, 7] = 0, 0
    problem = _problem(w, h, fmt)
    start = nearest(problem)
    found = blocks(problem, start)
    assert bool((found.losses <= start.losses).all()) and float(found.losses.sum()) < 0.9 * float(start.losses.sum())
    if fmt.block != "tensor" and fmt.unit == "block" and fmt.member_count > 1:
        assert found.params.member is not None and not torch.equal(found.params.member, start.params.member)
    chain = solve(w, h, fmt, "gptq+blocks+descent")
    assert chain.loss <= solve(w, h, fmt, "gptq").loss


def test_blocks_without_correlation_are_nearest() -> None:
    w, _ = _layer(9, 75)
    for name in ("mant4-g32", "uint3-g32"):
        problem = _problem(w, torch.eye(75), format(name))
        start = nearest(problem)
        assert torch.equal(blocks(problem, start).codes, start.codes)
    with pytest.raises(OptionError, match=r"'blocks' is for formats whose blocks are smaller than a row"):
        solve(w, torch.eye(75), format("int4-row"), "gptq+blocks")



def test_refit_reaches_the_best_scales() -> None:
    """Against the least-squares scales found by autograd's Hessian-free twin: lstsq on the square root of H."""
    fmt = format("int3-g32@bf16")
    w, h = _layer(4, 96)
    problem = _problem(w, h, fmt)
    start = nearest(problem)
    found = refit(problem, start)
    root = torch.linalg.cholesky(h.double())
    unit = decode(fmt, start.codes, start.params).double() / start.params.effective_scale().repeat_interleave(32, 1)
    for row in range(4):
        basis = torch.stack([(unit[row] * (torch.arange(96) // 32 == b)) @ root for b in range(3)], 1)
        best = torch.linalg.lstsq(basis, (w[row].double() @ root)[:, None]).solution[:, 0]
        least = (basis @ best - w[row].double() @ root).square().sum()
        assert float(found.losses[row]) <= 1.003 * float(least)  # what rounding to bf16 costs


def test_refit_is_exact_where_scales_were_right() -> None:
    """Codes of a matrix that the format can hold, with spoilt scales and zero points, give it back."""
    fmt = format("uint3-g32@bf16")
    w, h = _layer(6, 96)
    params = fit(fmt, w)
    codes = encode(fmt, w, params)
    target = decode(fmt, codes, params)
    assert params.zero is not None
    spoilt = replace(params, scale=params.scale * 1.5, zero=(params.zero + 1).clamp_max(7))
    problem = _problem(target, h, fmt)
    found = refit(problem, problem.state(codes, spoilt))
    torch.testing.assert_close(decode(fmt, codes, found.params), target, rtol=1e-6, atol=1e-7)


def test_pot_second_step() -> None:
    w, h = _layer(12, 96)
    for name in ("pot2-g32", "pot3-g32", "pot4-row", "pot3-log-g32", "pot3-tensor", "pot3-g32@e3m3"):
        first = solve(w, h, format(name), SolverOptions.parse("nearest", importance=False))
        s = solve(w, h, format(name), SolverOptions.parse("nearest+pot", importance=False, alternations=4))
        assert s.loss < first.loss, name
    with pytest.raises(OptionError, match=r"powers of two.*nearest, gptq, alternate, refit, descent"):
        solve(w, h, format("int4-g32"), "nearest+pot")


# -- inputs that are off already --------------------------------------------------------------------------------------


def _streams(k: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    exact = torch.randn(tokens, k, generator=g, dtype=torch.float64)
    off = exact + 0.3 * torch.randn(tokens, k, generator=g, dtype=torch.float64)
    return exact, off, 2 / tokens * off.T @ off, 2 / tokens * (exact - off).T @ off


def test_retarget_solves_the_normal_equations() -> None:
    exact, off, h, d = _streams(24, 400)
    w = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = retarget(w, h, d, 1.0, damp=0.0).double()
    residual = off @ target.T - exact @ w.T
    assert float((off.T @ residual).abs().max()) < 1e-4 * float((off.T @ (exact @ w.T)).abs().max())
    assert float(residual.square().sum()) < float((off @ w.T - exact @ w.T).square().sum())
    assert torch.equal(retarget(w, h, d, 0.0), w.float())


def test_asymmetric_options() -> None:
    exact, off, h, d = _streams(32, 2000)
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))

    def output_error(s: Solution, fmt: Format) -> float:
        return float((off @ decode(fmt, s.codes, s.params).double().T - exact @ w.double().T).square().sum())

    fmt = format("int3-g16")
    plain = output_error(solve(w, h.float(), fmt, "gptq"), fmt)
    moved = solve(w, h.float(), fmt, SolverOptions.parse("gptq", beta=1.0), cross=d.float())
    assert output_error(moved, fmt) < plain and "retargeted" in moved.notes[0]
    for options in ({"gptaq": 0.25}, {"rescomp": 0.25}, {"gptaq": 0.25, "rescomp": 0.25}):
        s = solve(w, h.float(), fmt, SolverOptions.parse("gptq", **options), cross=d.float())
        assert s.loss <= s.start
    with pytest.raises(OptionError, match="cross term"):
        solve(w, h.float(), fmt, SolverOptions.parse("gptq", beta=0.5))
    with pytest.raises(OptionError, match="cross term"):
        solve(w, h.float(), fmt, SolverOptions.parse("gptq", gptaq=0.5), cross=d[:3].float())


def test_terms_against_the_published_recursion() -> None:
    """P and R inside and across panels, against a loop over single columns in fp64."""
    k, fmt = 21, format("int4-row")
    w, h = _layer(4, k)
    plan = make_plan(fmt, h.diagonal(), "none", False, 8)
    u = cholesky_inverse_upper(h, 0.01).u
    g = torch.Generator().manual_seed(0)
    p, r = (torch.randn(k, k, generator=g).triu(1) * 0.05 for _ in range(2))
    params = fit(fmt, w)
    swept = sweep(fmt, w, u, plan, params, terms=Terms(p, r))
    rounder, rest = Rounder(fmt, params, k), w.double()
    low, high = (v.double() for v in rounder.range(0, 0))
    for j in range(k):
        code, q = rounder.column(rest[:, j].float(), 0, 0)
        assert torch.equal(code, swept.codes[:, j])
        x = rest[:, j].clone()
        cut = torch.minimum(torch.maximum(x, low), high)
        rest[:, j + 1 :] += -((x - q) / u[j, j])[:, None] * u[j, j + 1 :] + cut[:, None] * p[j, j + 1 :]
        rest[:, j + 1 :] += (w[:, j].double() - cut)[:, None] * r[j, j + 1 :]


# -- shapes and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (3, 2), (2, 65), (0, 40), (17, 31)])
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    n, k = shape
    fmt = format(name)
    if isinstance(fmt.block, int) and fmt.block > k:
        base, _, store = name.partition("@")
        block = "row" if small_units(fmt) else f"g{k}"
        fmt = format(f"{base.rsplit('-g', 1)[0]}-{block}" + (f"@{store}" if store and block != "row" else ""))
    w, h = _layer(n, k)
    for order in ORDERS:
        s = solve(w, h, fmt, SolverOptions.parse("gptq+alternate+descent", order=order, alternations=1, sweeps=1, panel=7))
        assert s.codes.shape == shape and s.codes.dtype == torch.uint8 and s.loss <= s.start
        assert torch.isfinite(decode(fmt, s.codes, s.params)).all()


def test_ridge_is_a_larger_second_moment() -> None:
    w, h = _layer(8, 64)
    fmt = format("mant4-g32")
    ridged = h + 0.5 * h.diagonal().double().mean().float() * torch.eye(64)
    a, b = solve(w, h, fmt, SolverOptions.parse("gptq+descent", ridge=0.5)), solve(w, ridged, fmt, "gptq+descent")
    assert a.loss == pytest.approx(b.loss, rel=1e-3)
    plain = solve(w, h, fmt, "gptq+descent")
    errors = [float((decode(fmt, s.codes, s.params) - w).square().sum()) for s in (a, plain)]
    assert errors[0] < errors[1]  # nearer to the weights


def test_importance_option() -> None:
    w, h = _layer(8, 64)
    fmt = format("int3-g32")
    weighted, plain = solve(w, h, fmt), solve(w, h, fmt, SolverOptions(importance=False))
    assert weighted.loss < plain.loss
    params = fit(fmt, w, h.diagonal())
    assert torch.equal(weighted.codes, encode(fmt, w, params)) and weighted.loss == weighted.start
    assert normalized_importance(h.diagonal()).mean() == pytest.approx(1, rel=1e-5)


def test_without_statistics() -> None:
    w, _ = _layer(8, 64)
    fmt = format("int3-g32")
    s = solve(w, None, fmt)
    assert torch.equal(s.codes, encode(fmt, w, fit(fmt, w)))
    assert s.loss == pytest.approx(float((decode(fmt, s.codes, s.params) - w).double().square().sum()))
    with pytest.raises(OptionError, match="calibrate"):
        solve(w, None, fmt, "gptq")


@pytest.mark.parametrize(
    ("text", "numbers", "message"),
    [
        ("gtpq", {}, "unknown solver step 'gtpq'"),
        ("", {}, "unknown solver step ''"),
        ("descent", {}, "must begin with nearest or gptq"),
        ("gptq+nearest", {}, "must begin with"),
        ("gptq", {"order": "up"}, "order 'up' is unknown; choose one of static"),
        ("gptq", {"damp": -1.0}, "damp is a number from 0"),
        ("gptq", {"damp": float("nan")}, "damp is a number"),
        ("gptq", {"alternations": 0}, "alternations is a whole number of at least 1"),
        ("gptq", {"sweeps": 1.5}, "sweeps is a whole number"),
        ("gptq", {"dampen": 1.0}, "unknown solver option 'dampen'; the options are: order, damp"),
        ("nearest", {"rescomp": 0.25}, "terms of the gptq step"),
    ],
)
def test_options_that_cannot_be(text: str, numbers: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SolverOptions.parse(text, **numbers)


def test_a_chain_reads_as_it_is_written() -> None:
    assert SolverOptions.parse("gptq + Alternate+descent", damp=0.1).steps == ("gptq", "alternate", "descent")
    assert not SolverOptions().needs_statistics and SolverOptions.parse("gptq").needs_statistics
