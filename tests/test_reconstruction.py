"""Learned rounding: the start is reproduced, the end is stored as measured, and nothing gets worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.formats import Params, bases, decode, encode, fit, format, pack
from numfit.reconstruction import Options, Report, State, progressive, reconstruct, weight
from numfit.reconstruction.adaround import SoftRounding
from numfit.reconstruction.blockwise import without_largest
from numfit.reconstruction.cells import EDGE, cells, scaled
from numfit.reconstruction.scales import Scales
from numfit.reconstruction.signround import SignRounding
from numfit.reconstruction.tune import FixedRounding

CATALOGUE = [
    "int2-g32", "int3-g64", "uint2-g32", "uint4-g16@bf16", "nf3-g32", "lm2-row", "lm3-g16@e3m3", "iq4nl-g32", "pot3-g32",
    "pot3-log-g32", "mant3-g16@e3m3", "mant4-g32", "mantsv4-g16", "fp4.25", "ams-e2m3k3-g24", "ant4-row", "ant4-row@e4m3",
    "bitmod3-g32", "bitmod3-g16@e3m3", "razer4", "if4", "dynfp4-g16", "mxfp4", "nvfp4", "nvfp4-4over6", "int3-tensor",
    "uint3-tensor", "fp4.25-tensor", "int8-g32",
]  # fmt: skip


def start_of(name: str, w: Tensor, seed: int = 0, spoil: float = 0.2, label: str = "a") -> State:
    """Nearest codes, a fifth of which another solver has moved by one or two levels."""
    fmt = format(name)
    params = fit(fmt, w)
    codes = encode(fmt, w, params)
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)) * decode(fmt, codes, params).std()
    moved = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed + 1)) < spoil
    return State(label, fmt, torch.where(moved, encode(fmt, w + noise, params), codes), params, w)


def problem(n: int = 12, k: int = 72, windows: int = 16, tokens: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(w [n, k], inputs [S, T, k] with a few strong channels, outputs of `two_layers`)."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * torch.rand(1, k, generator=g).add(0.1)
    x = torch.randn(windows, tokens, k, generator=g) @ torch.randn(k, k, generator=g) / k**0.5
    x[..., 3] *= 6
    return w, x, two_layers({"a": w}, x)


def two_layers(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A block of one linear and a bend; with 'b', of two. 'gain' scales the inputs."""
    x = x * weights["gain"] if "gain" in weights else x
    y = torch.nn.functional.silu(x @ weights["a"].T)
    return y @ weights["b"].T if "b" in weights else y


def test_catalogue_is_covered() -> None:
    assert {format(n).scale.store for n in CATALOGUE} == {"fp16", "bf16", "e8m0", "e4m3", "u8", "e3m3"}
    assert all(any(n.startswith(b) for n in CATALOGUE) for b in ("int2", "uint2", "mant3", "bitmod3", "razer4", "dynfp4"))
    assert {"lm2", "lm3"} <= set(bases())


@pytest.mark.parametrize("trust", [1.0, 0.6])
@pytest.mark.parametrize("name", CATALOGUE)
def test_start_is_reproduced(name: str, trust: float) -> None:
    w = torch.randn(7, 72, generator=torch.Generator().manual_seed(1))
    w[0, :8] *= 20  # clipped weights
    w[1] = 0
    s = start_of(name, w)
    c = cells(s.fmt, s.codes, s.params, w, trust)
    sign = SignRounding(c, 0.01, 0.0)
    assert torch.equal(sign.hard(), s.codes)
    every = slice(0, 7)
    decoded = decode(s.fmt, s.codes, s.params)
    for rounding in (sign, FixedRounding(s.fmt, s.codes, s.params)):
        value = scaled(rounding.values(every), s.params.effective_scale(), s.fmt.geometry(72).block)
        assert torch.equal(value, decoded)
    assert torch.equal(SoftRounding(c, 0.1).hard(), s.codes)
    assert bool((c.offset.abs() <= 0.5).all()) and bool((c.offset.abs() >= EDGE / 2).all())
    # both neighbours decode to what the cell says, and they are neighbours: no level of the member lies between
    for value, code in ((c.low, c.low_code), (c.high, c.high_code)):
        assert torch.equal(scaled(value, s.params.effective_scale(), s.fmt.geometry(72).block), decode(s.fmt, code, s.params))
    assert bool((c.low <= c.high).all())


def test_position_is_that_of_the_weight_where_the_start_is_nearest() -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    s = start_of("uint3-g32", w, spoil=0)
    c = cells(s.fmt, s.codes, s.params, w)
    step = s.params.effective_scale().repeat_interleave(32, 1)
    zero = s.params.zero
    assert zero is not None
    u = w / step + zero.repeat_interleave(32, 1)
    inside = (u > 0.5) & (u < 6.5)
    inside &= ((u - u.round()).abs() < 0.49) & ((u - u.round()).abs() > 0.01)
    position = c.low + zero.repeat_interleave(32, 1) + 0.5 + c.offset
    assert torch.allclose(position[inside], u[inside], atol=1e-4)
    assert int(inside.sum()) > 200


@pytest.mark.parametrize("method", ["signround", "adaround", "tune"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_end_is_stored_as_measured(name: str, method: str) -> None:
    w, x, y = problem()
    s = start_of(name, w)
    seen: dict[str, Tensor] = {}

    def run(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            seen[str(len(seen))] = weights["a"].clone()
        return two_layers(weights, inputs)

    options = Options(method=method, iterations=12, batch=4, scale_lr=0.02, checks=2, tune_parents=True, bf16=False)
    after, report = reconstruct(run, {"a": s}, x, y, options)
    new = after["a"]
    stored = pack(new.fmt, tuple(w.shape), new.codes, new.params)
    assert torch.equal(stored.dequantize(), decode(new.fmt, new.codes, new.params))
    codes, params = stored.params()
    assert torch.equal(codes, new.codes) and torch.equal(params.effective_scale(), new.params.effective_scale())
    assert any(torch.equal(stored.dequantize(), v) for v in seen.values())  # what was judged is what is stored
    assert report.end <= report.start
    judge = [i for i in range(16) if i in (4, 12)]
    again = (two_layers({"a": stored.dequantize()}, x[judge]) - y[judge]).square().mean()
    assert float(again) == pytest.approx(report.end, rel=1e-5)
    if method == "tune":
        assert torch.equal(new.codes, s.codes)
    if new.params.member is not None and s.params.member is not None:
        assert torch.equal(new.params.member, s.params.member)


@pytest.mark.parametrize("method", ["signround", "adaround", "tune"])
def test_it_learns(method: str) -> None:
    w, x, y = problem(windows=32)
    s = start_of("int3-g24", w)
    _, report = reconstruct(two_layers, {"a": s}, x, y, Options(method=method, iterations=100, batch=4, bf16=False))
    assert report.end < {"signround": 0.5, "adaround": 0.5, "tune": 0.98}[method] * report.start
    assert report.kept > 0 and (report.flipped["a"] > 0) == (method != "tune")


@pytest.mark.parametrize(("method", "least"), [("signround", 0.97), ("adaround", 0.8)])
def test_beats_nearest_codes(method: str, least: float) -> None:
    """From nearest codes, without any error to mend: only what codes do together is left to gain."""
    w, x, y = problem(windows=32)
    s = start_of("int3-g24", w, spoil=0)
    lr = {"signround": 0.001, "adaround": 0.2}[method]
    _, report = reconstruct(two_layers, {"a": s}, x, y, Options(method=method, iterations=100, batch=4, lr=lr, bf16=False))
    assert report.end < least * report.start


def test_never_worse() -> None:
    """Targets that no change can serve: the start is handed back, bit for bit."""
    w, x, _ = problem()
    s = start_of("int4-g24", w, spoil=0)
    y = two_layers({"a": decode(s.fmt, s.codes, s.params)}, x)
    after, report = reconstruct(two_layers, {"a": s}, x, y, Options(iterations=8, batch=2, bf16=False))
    assert after["a"] is s and report.kept == 0 and report.start == report.end == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_perturbation_stays_within_half(momentum: float) -> None:
    c = cells(*_parts(start_of("int3-g24", problem()[0])))
    rounding = SignRounding(c, 1 / 37, momentum)
    every = slice(0, len(c.low))
    for i in range(37):
        rounding.step(every, torch.ones_like(c.low), torch.ones(1, 1), 24, (i + 0.5) / 37)
    assert float((rounding.x - c.offset).abs().max()) <= 0.5 + 1e-5


def _parts(s: State) -> tuple[object, ...]:
    return s.fmt, s.codes, s.params, s.w


def test_two_linears_mend_each_other() -> None:
    """A later linear makes up for the one before: the error of both falls below that of the first alone at the end."""
    g = torch.Generator().manual_seed(5)
    w, x, _ = problem(windows=32)
    v = torch.randn(10, 12, generator=g)
    y = two_layers({"a": w, "b": v}, x)
    states = {"a": start_of("int3-g24", w, label="a"), "b": replace(start_of("int4-g12", v), name="b")}
    after, report = reconstruct(two_layers, states, x, y, Options(iterations=80, batch=4, bf16=False))
    assert report.end < 0.6 * report.start
    assert set(after) == {"a", "b"} and set(report.flipped) == {"a", "b"}


def test_same_seed_same_result() -> None:
    w, x, y = problem()
    s = start_of("mant3-g24", w)
    results = [reconstruct(two_layers, {"a": s}, x, y, Options(iterations=20, bf16=False, seed=seed)) for seed in (3, 3, 4)]
    a, b, c = (r[0]["a"] for r in results)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.params.scale, b.params.scale)
    assert results[0][1].checks == results[1][1].checks
    assert not torch.equal(a.codes, c.codes)


@pytest.mark.parametrize("name", ["lm3-row", "uint2-g24"])
def test_rotated_coordinates(name: str) -> None:
    """Codes of a rotated weight; the block multiplies with the weight turned back."""
    w, x, y = problem(windows=32)
    turn = torch.linalg.qr(torch.randn(72, 72, generator=torch.Generator().manual_seed(1)))[0]
    s = replace(start_of(name, w @ turn.T), effective=lambda v: v @ turn)
    after, report = reconstruct(two_layers, {"a": s}, x, y, Options(iterations=60, batch=4, bf16=False))
    assert report.end < 0.8 * report.start
    judged = (two_layers({"a": weight(after["a"])}, x[2::8]) - y[2::8]).square().mean()
    assert torch.isfinite(judged)


def test_low_rank_moves_and_is_stored_as_fp16() -> None:
    w, x, y = problem(windows=32)
    g = torch.Generator().manual_seed(8)
    factors = (torch.randn(12, 2, generator=g) * 0.01, torch.randn(2, 72, generator=g) * 0.01)
    s = replace(start_of("int3-g24", w), low_rank=tuple(f.half().float() for f in factors))
    options = Options(method="tune", iterations=100, batch=4, extra_lr=0.1, tune_low_rank=True, bf16=False)
    after, report = reconstruct(two_layers, {"a": s}, x, y, options)
    new = after["a"].low_rank
    assert new is not None and report.end < 0.98 * report.start
    assert all(torch.equal(f, f.half().float()) for f in new)
    still, _ = reconstruct(two_layers, {"a": s}, x, y, replace(options, tune_low_rank=False))
    assert still["a"].low_rank is s.low_rank


def test_gains_move() -> None:
    w, x, _ = problem(windows=32)
    y = two_layers({"a": w * 1.3}, x)
    s = start_of("int4-g24", w, spoil=0)
    gain = torch.ones(72)
    options = Options(method="tune", iterations=60, batch=4, scale_lr=0.0, extra_lr=0.03, bf16=False)
    _, report = reconstruct(two_layers, {"a": s}, x, y, options, extra={"gain": gain})
    assert report.end < 0.3 * report.start and float(report.extra["gain"].mean()) > 1.1
    assert torch.equal(gain, torch.ones(72))


def test_bf16_steps_and_losses() -> None:
    w, x, y = problem(windows=32)
    s = start_of("int3-g24", w)
    for extra in ({"drop": 0.01}, {"loss": "relative"}, {"momentum": 0.5}):
        _, report = reconstruct(two_layers, {"a": s}, x, y, Options(iterations=60, batch=4, bf16=True, **extra))
        assert report.end < 0.6 * report.start


def test_largest_errors_are_dropped() -> None:
    error = torch.rand(3, 40, 25, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = without_largest(error, 0.01)
    (gradient,) = torch.autograd.grad(kept.sum(), error)
    edge = error.detach().flatten().sort().values[-30]
    assert torch.equal(gradient, (error < edge).float()) and int((gradient == 0).sum()) == 30
    assert torch.equal(kept, torch.where(error < edge, error, 0.0))
    assert without_largest(error, 0.0001) is error  # less than one element


@pytest.mark.parametrize("store", ["fp16", "e3m3", "u8", "e4m3", "bf16", "e8m0"])
def test_scales_stay_what_the_file_can_hold(store: str) -> None:
    base = "if4" if store == "e4m3" else f"int3-g16@{store}"
    fmt = format(base)
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    params = fit(fmt, w)
    scales = Scales(fmt, params, (0.5, 1.5), parents=True)
    g = torch.Generator().manual_seed(4)
    codes = encode(fmt, w, params)
    assert torch.equal(scales.params.scale, params.scale)
    for _ in range(30):
        scales.step(torch.randn(params.effective_scale().shape, generator=g), 0.05)
        back = pack(fmt, (6, 64), codes, scales.params).parameters()
        assert torch.equal(back.effective_scale(), scales.effective)
        ratio = scales.effective / scales.effective0
        assert float(ratio.min()) > 0.4 and float(ratio.max()) < (1.7 if store != "e8m0" else 2.1)
    assert not torch.equal(scales.params.scale, params.scale)


def test_holdout_chooses() -> None:
    w, x, y = problem()
    s = start_of("int3-g24", w)
    used: list[Tensor] = []

    def run(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            used.append(inputs.detach())
        return two_layers(weights, inputs)

    reconstruct(run, {"a": s}, x, y, Options(iterations=20, batch=4, holdout=4, bf16=False))
    trained = torch.cat(used)
    seen = [bool((trained == x[i]).flatten(1).all(1).any()) for i in range(16)]
    assert seen == [i not in (2, 6, 10, 14) for i in range(16)]


def test_progress_and_report() -> None:
    w, x, y = problem()
    calls: list[tuple[int, float]] = []
    s = start_of("int3-g24", w)
    options = Options(iterations=9, checks=3, bf16=False)
    _, report = reconstruct(two_layers, {"a": s}, x, y, options, lambda i, v: calls.append((i, v)))
    assert [i for i, _ in calls] == list(range(1, 10)) and all(v > 0 for _, v in calls)
    assert isinstance(report, Report) and [i for i, _ in report.checks] == [0, 3, 6, 9]
    assert set(report.seconds) == {"forward", "backward", "update", "checks"}
    assert report.end == min(v for _, v in report.checks)


def test_refusals() -> None:
    w, x, y = problem()
    s = start_of("int3-g24", w)
    bad = x.clone()
    bad[5, 2, 1] = torch.nan
    with pytest.raises(OptionError, match="inputs of this block hold NaN or Inf in 1 of 16 windows, the first in window 5"):
        reconstruct(two_layers, {"a": s}, bad, y)
    with pytest.raises(OptionError, match="targets"):
        reconstruct(two_layers, {"a": s}, x, y.where(y > -0.1, torch.inf))
    with pytest.raises(OptionError, match="same windows"):
        reconstruct(two_layers, {"a": s}, x, y[:3])
    with pytest.raises(OptionError, match="at least one quantized linear"):
        reconstruct(two_layers, {}, x, y)
    with pytest.raises(OptionError, match="'a' holds NaN"):
        reconstruct(two_layers, {"a": replace(s, w=w.where(w > 0, torch.nan))}, x, y)
    with pytest.raises(OptionError, match="shape"):
        reconstruct(two_layers, {"a": replace(s, codes=s.codes[:3])}, x, y)
    with pytest.raises(OptionError, match="leave none"):
        reconstruct(two_layers, {"a": s}, x, y, Options(holdout=16))
    with pytest.raises(FormatError, match="code 4, which no encoder"):
        reconstruct(two_layers, {"a": replace(s, codes=torch.full_like(s.codes, 4))}, x, y)
    with pytest.raises(OptionError, match="scales"):
        reconstruct(two_layers, {"a": replace(s, params=replace(s.params, scale=-s.params.scale))}, x, y)
    with pytest.raises(OptionError, match="outputs"):
        reconstruct(lambda weights, inputs: two_layers(weights, inputs) * torch.inf, {"a": s}, x, y, Options(bf16=False))


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "magic"}, {"loss": "l7"}, {"iterations": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": 0.5, "iterations": 100},
        {"momentum": 1.0}, {"trust": 0.0}, {"drop": 1.0}, {"scale_lr": -1.0}, {"scale_range": (1.1, 2.0)}, {"holdout": -1},
        {"checks": 0},
    ],
)  # fmt: skip
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Options(**wrong)  # type: ignore[arg-type]


def test_few_windows_and_odd_shapes() -> None:
    """One window, rows of one weight beyond whole blocks, one row."""
    g = torch.Generator().manual_seed(11)
    shapes = ((1, 33, "int3-g32"), (5, 67, "mant3-g16@e3m3"), (3, 50, "fp4.25"), (2, 7, "fp5.33"), (4, 40, "bitmod3-g32"))
    for n, k, name in shapes:
        w, x = torch.randn(n, k, generator=g), torch.randn(1, 9, k, generator=g)
        y = two_layers({"a": w}, x)
        after, report = reconstruct(two_layers, {"a": start_of(name, w)}, x, y, Options(iterations=10, batch=2, bf16=False))
        assert report.end <= report.start
        new = after["a"]
        assert torch.equal(pack(new.fmt, (n, k), new.codes, new.params).dequantize(), decode(new.fmt, new.codes, new.params))


def test_params_are_not_changed_in_place() -> None:
    w, x, y = problem()
    s = start_of("bitmod3-g24", w)
    copies = [s.codes.clone(), s.w.clone(), s.params.scale.clone()]
    reconstruct(two_layers, {"a": s}, x, y, Options(iterations=10, bf16=False))
    assert all(torch.equal(a, b) for a, b in zip((s.codes, s.w, s.params.scale), copies, strict=True))
    assert isinstance(s.params, Params)


def _gptq_like(w: Tensor, label: str) -> State:
    fmt = format("int3-g12")
    params = fit(fmt, w)
    return State(label, fmt, encode(fmt, w, params), params, w)


def test_progressive_makes_up_for_earlier_groups() -> None:
    g = torch.Generator().manual_seed(5)
    w, x, _ = problem(windows=32)
    v = torch.randn(10, 12, generator=g)
    y = two_layers({"a": w, "b": v}, x)
    asked: list[tuple[list[str], dict[str, Tensor]]] = []

    def solve(names: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, State]:
        asked.append((list(names), dict(weights)))
        return {n: _gptq_like(weights[n], n) for n in names}

    at_once = {"a": _gptq_like(w, "a"), "b": _gptq_like(v, "b")}
    options = Options(method="tune", iterations=60, batch=4, extra_lr=0.02, bf16=False)
    _, plain = reconstruct(two_layers, at_once, x, y, options)
    states, reports = progressive(two_layers, [["a"], ["b"]], {"a": w, "b": v}, solve, x, y, options)
    assert [names for names, _ in asked] == [["a"], ["b"]]
    assert torch.equal(asked[0][1]["b"], v) and not torch.equal(asked[1][1]["b"], v)
    assert reports[1].start < 0.95 * plain.start and reports[1].end < 0.9 * plain.start
    assert torch.equal(states["b"].w, asked[1][1]["b"])  # the last group was solved from its moved weight
    judged = (two_layers({n: weight(s) for n, s in states.items()}, x[4::8]) - y[4::8]).square().mean()
    assert reports[1].end == pytest.approx(float(judged), rel=1e-4)


def test_progressive_refusals() -> None:
    w, x, y = problem()
    with pytest.raises(OptionError, match="same linears once each; see b"):
        progressive(two_layers, [["a", "b"]], {"a": w}, lambda names, weights: {}, x, y)
    with pytest.raises(OptionError, match="see a"):
        progressive(two_layers, [["a"], ["a"]], {"a": w}, lambda names, weights: {}, x, y)
    with pytest.raises(OptionError, match="returned c for the group a"):
        progressive(two_layers, [["a"]], {"a": w}, lambda names, weights: {"c": start_of("int3-g24", w)}, x, y)
