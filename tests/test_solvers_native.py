"""Compiled sweeps and coordinate descent against the eager loops: the same bits on every instruction set."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from numfit.errors import NumfitError
from numfit.formats import Format, Params, bases, encode, fit, format
from numfit.native import isa_names, library, set_isa
from numfit.solvers.compiled import compiled_panel, compiled_run
from numfit.solvers.descent import Run, descent, eager_run
from numfit.solvers.linalg import cholesky_inverse_upper
from numfit.solvers.options import ORDERS, SolverOptions
from numfit.solvers.order import make_plan, small_units
from numfit.solvers.rounding import Rounder
from numfit.solvers.state import Problem
from numfit.solvers.sweep import Panel, Swept, Terms, eager_panel, sweep

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")
ISAS = isa_names()
NAMES = [*bases(), "mant4-g16@e3m3", "int3-row", "uint4-row", "int4-tensor", "uint3-tensor", "fp4.25-tensor", "fp5.33-g12@bf16",
         "ams-e2m2k7", "ams-e2m1k4-g16@e4m3", "nf4-g20", "e5m1-g16@e4m3", "e3m4-g16"]  # fmt: skip


@pytest.fixture(autouse=True)
def best_isa() -> Iterator[None]:
    yield
    set_isa(ISAS[-1])


def layer(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.05
    if n > 3:
        w[1], w[2], w[3] = 0, w[2] * 1e-30, w[3] * 1e3
    x = torch.randn(6 * k, k, generator=g) @ (torch.eye(k) + torch.randn(k, k, generator=g) * 0.2)
    return w, 2 / len(x) * x.T @ x


def small_format(name: str, k: int) -> Format:
    fmt = format(name)
    return fmt if isinstance(fmt.block, str) or fmt.block <= k else format(f"{name.split('-g')[0]}-g16")


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))


def same_params(a: Params, b: Params) -> bool:
    return all(same(getattr(a, n), getattr(b, n)) for n in ("scale", "parent", "member", "zero", "palette", "levels"))


def swept(fmt: Format, w: Tensor, h: Tensor, order: str, panel: int, terms: Terms) -> list[Swept]:
    """Eagerly, then by each instruction set."""
    plan = make_plan(fmt, h.diagonal(), order, True, panel)
    u = cholesky_inverse_upper(h[plan.order][:, plan.order], 0.01).u
    params = fit(fmt, w, h.diagonal())
    found = [sweep(fmt, w, u, plan, params, terms=terms, panel_sweep=eager_panel)]
    for isa in ISAS:
        set_isa(isa)
        found.append(sweep(fmt, w, u, plan, params, terms=terms, panel_sweep=compiled_panel))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_are_the_same_bits(name: str) -> None:
    for (n, k), order, panel in zip([(19, 37), (1, 33), (16, 16), (37, 40)], ORDERS, [16, 32, 128, 11]):
        fmt = small_format(name, k)
        w, h = layer(n, k)
        first, *others = swept(fmt, w, h, order, panel, Terms())
        for isa, other in zip(ISAS, others):
            assert torch.equal(first.codes, other.codes), (n, k, order, isa)
            assert same_params(first.params, other.params) and torch.equal(first.losses, other.losses)


@pytest.mark.parametrize("name", NAMES)
def test_descents_are_the_same_bits(name: str) -> None:
    for (n, k), panel in zip([(19, 37), (1, 33), (16, 16), (0, 40)], [16, 32, 128, 11]):
        fmt = small_format(name, k)
        w, h = layer(n, k, seed=1)
        h[5], h[:, 5] = 0, 0  # an input that is never on
        problem = Problem(w, h, fmt, SolverOptions.parse("nearest+descent", panel=panel), None)
        params = fit(fmt, w, h.diagonal())
        start = problem.state(encode(fmt, w, params), params)
        first = descent(problem, start, eager_run)
        for isa in ISAS:
            set_isa(isa)
            other = descent(problem, start, compiled_run)
            assert torch.equal(first.codes, other.codes), (n, k, isa)
            assert same_params(first.params, other.params)
        if n > 10 and fmt.bits < 8 and (k > 16 or not fmt.learned):  # 16 levels fit 16 weights exactly
            assert not torch.equal(first.codes, start.codes)


@pytest.mark.parametrize("name", ["int3-g16", "uint2-g16", "mant4-g16", "fp4.25"])
def test_other_terms_are_the_same_bits(name: str) -> None:
    w, h = layer(21, 50)
    g = torch.Generator().manual_seed(0)
    p, r = (torch.randn(50, 50, generator=g).triu(1) * 0.05 for _ in range(2))
    for terms in (Terms(p), Terms(None, r), Terms(p, r)):
        first, *others = swept(format(name), w, h, "static", 20, terms)
        for other in others:
            assert torch.equal(first.codes, other.codes) and torch.equal(first.losses, other.losses)


@pytest.mark.parametrize("name", ["mant4-g32", "fp5.33"])
def test_threads_do_not_matter(name: str) -> None:
    w, h = layer(200, 96)
    fmt = format(name)
    plan = make_plan(fmt, h.diagonal(), "static", False, 128)  # one panel: no matrix product of torch's takes part
    u = cholesky_inverse_upper(h[plan.order][:, plan.order], 0.01).u
    params = fit(fmt, w)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(sweep(fmt, w, u, plan, params))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0].codes, f.codes) and same_params(found[0].params, f.params) for f in found[1:])


def test_ties_and_thresholds() -> None:
    """Values on thresholds, levels and far outside, for a format whose tables are long."""
    for name in ("e4m3-row", "int8-row", "mxfp4", "uint8-row", "pot4-log-row"):
        fmt = format(name)
        params = fit(fmt, torch.ones(3, 32))
        rounder = Rounder(fmt, params, 32)
        edges = rounder.thresholds[0][rounder.thresholds[0].isfinite()]
        above, below = (torch.nextafter(edges, torch.tensor(end)) for end in (torch.inf, -torch.inf))
        points = torch.cat([edges, rounder.levels[0], torch.tensor([0.0, -0.0, 1e30, -1e30]), above, below])
        points = torch.nn.functional.pad(points, (0, -len(points) % 32))
        w = (points * float(params.effective_scale()[0, 0])).view(-1, 32)
        params = Params(params.scale[:1].expand(len(w), -1).contiguous(), params.parent, None,
                        None if params.zero is None else params.zero[:1].expand(len(w), -1).contiguous())  # fmt: skip
        plan = make_plan(fmt, torch.ones(32), "none", False, 32)
        codes = sweep(fmt, w, torch.eye(32), plan, params, panel_sweep=compiled_panel).codes
        assert torch.equal(codes, encode(fmt, w, params)), name


def test_what_does_not_fit_together_is_refused() -> None:
    fmt = format("ams-e2m2k4-g16")
    w, h = layer(4, 32)
    rounder = Rounder(fmt, fit(fmt, w), 32)
    plan = make_plan(fmt, h.diagonal(), "none", False, 32)
    empty = torch.empty(4, 32)
    panel = Panel(w.clone(), None, torch.eye(32), Terms(), plan.block + 1, plan.unit, empty.to(torch.uint8), empty, None)
    assert small_units(fmt)
    with pytest.raises(NumfitError, match="do not fit together"):
        compiled_panel(panel, 0, 32, rounder, True)
    with pytest.raises(NumfitError, match="do not fit together"):
        compiled_panel(panel._replace(block=plan.block), 3, 33, rounder, True)


def parts() -> tuple[Panel, Run, Rounder]:
    """A panel, a run and a rounder of 4 × 32 weights that fit together."""
    fmt = format("ams-e2m2k4-g16")
    w, h = layer(4, 32)
    params = fit(fmt, w)
    plan = make_plan(fmt, h.diagonal(), "none", False, 32)
    codes, u = encode(fmt, w, params), torch.eye(32)
    panel = Panel(w.clone(), w.clone(), u, Terms(u, u), plan.block, plan.unit, codes, w.clone(), w.clone())
    return panel, Run(0, h, w.clone(), w, w.clone(), codes.clone(), plan.block, plan.unit), Rounder(fmt, params, 32)


def short(t: Tensor) -> tuple[Tensor, ...]:
    """What the library would read or write beyond, or misread."""
    wide = torch.zeros(len(t), 64, dtype=t.dtype)[:, ::2]
    other = torch.float64 if t.dtype == torch.float32 else torch.int32
    return t[:, :31], t[:3], wide, t.to(other), t.half()


def misfits() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every way of not fitting, and how it is called."""
    panel, run, rounder = parts()
    for name in ("w", "original", "u", "codes", "error", "before"):
        for t in short(getattr(panel, name)):
            yield name, partial(compiled_panel, panel._replace(**{name: t}), 0, 32, rounder, True)
    for name in ("h", "gradient", "w", "q", "codes"):
        for i, t in enumerate(short(getattr(run, name))):
            if (name, i) != ("gradient", 2):  # is copied
                yield name, partial(compiled_run, run._replace(**{name: t}), rounder, True)
    for t in short(panel.u):
        yield "p", partial(compiled_panel, panel._replace(terms=Terms(t)), 0, 32, rounder, True)
        yield "r", partial(compiled_panel, panel._replace(terms=Terms(None, t)), 0, 32, rounder, True)
    for name in ("block", "unit"):
        for t in (panel.block[:31], panel.block.int(), panel.block.repeat_interleave(2)[::2]):
            yield name, partial(compiled_panel, panel._replace(**{name: t}), 0, 32, rounder, True)
            yield name, partial(compiled_run, run._replace(**{name: t}), rounder, True)
    far = torch.zeros(4, 64)[:, :32]
    yield "distance", partial(compiled_run, run._replace(q=far), rounder, True)
    assert rounder.member is not None
    for name, wrong in (
        ("scale", rounder.scale[:, :1]), ("scale", rounder.scale[:3]), ("zero", rounder.scale[:, :1]), ("member", None),
        ("member", rounder.member[:, :3]), ("member", rounder.member[:1, :1]), ("member", rounder.member.int()),
        ("member", rounder.member.repeat_interleave(2, 1)[:, ::2]),
    ):  # fmt: skip
        other = copy.copy(rounder)
        setattr(other, name, wrong)
        yield name, partial(compiled_panel, panel, 0, 32, other, True)
        yield name, partial(compiled_run, run, other, True)


def test_what_the_library_would_misread_is_refused() -> None:
    panel, run, rounder = parts()
    compiled_panel(panel, 0, 32, rounder, True)
    compiled_run(run, rounder, True)
    count = 0
    for name, call in misfits():
        try:
            call()
        except NumfitError as error:
            assert "do not fit together" in str(error), name
            count += 1
        else:
            raise AssertionError(name)
    assert count > 90


def test_it_is_refused_without_assertions_too() -> None:
    lib = library()
    assert lib is not None
    code = (
        "import sys, numfit.native; numfit.native.load(sys.argv[1]); import test_solvers_native as t; "
        "print(__debug__); t.test_what_the_library_would_misread_is_refused(); print('refused')"
    )
    command = [sys.executable, "-O", "-c", code, str(lib._name)]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout == "False\nrefused\n", run.stderr
