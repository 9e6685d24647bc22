"""Fit: the chosen error is the least there is, by brute force over everything a file could hold.

The reference below is written from the specification with numpy loops and shares no code with numfit: grids are
spelled out, scales are rounded by numpy and ml_dtypes, every member meets every candidate scale in every block, and
errors are summed in float64. What it returns is the least error of each block (or row, or tensor, where parts are
shared that widely).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch

from numfit.errors import FormatError
from numfit.formats import QuantizedTensor, bases, fitter, format, quantize_tensor

F32 = np.float32
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


# -- the reference: grids ---------------------------------------------------------------------------------------------


def both(half: list[float], special: float | None = None) -> list[float]:
    return sorted({*half, *(-v for v in half)} | ({special} if special is not None else set()))


def mant(a: int) -> list[float]:
    """±(a·i + 2**i), with its largest level brought into [4, 8) by a power of two."""
    return common([a * i + 2**i for i in range(8)])


def common(half: list[float]) -> list[float]:
    shift = 2.0 ** (2 - math.floor(math.log2(max(half))))
    return both([v * shift for v in half])


def shared_bit(e: int, m: int, bit: int) -> list[float]:
    magnitudes = []
    for code in range(1 << e + m):
        exponent, mantissa = code >> m, code & (1 << m) - 1
        bias = max(1, 2 ** (e - 1) - 1)
        if code & 1 == bit:
            subnormal = exponent == 0
            magnitudes.append((mantissa / 2**m + (not subnormal)) * 2.0 ** (max(exponent, 1) - bias))
    return both(magnitudes)


MANT4 = [mant(a) for a in (0, 5, 10, 17, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120)] + [common(list(range(8)))]
FAMILIES: dict[str, list[list[float]]] = {
    "mant4": MANT4,
    "int4": [list(range(-7, 8))],
    "nf4": [list(format("nf4").members[0].levels)],  # checked level by level in test_grids.py
    "e4m3": [sorted({float(v) for v in np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn) if v == v})],
    "iq4nl": [[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]],
    "pot3": [[-8, -4, -2, -1, 1, 2, 4, 8]],
    "ams-e2m2k4": [shared_bit(2, 2, 0), shared_bit(2, 2, 1)],
    "ams-e2m3k3": [shared_bit(2, 3, 0), shared_bit(2, 3, 1)],
    "e2m1": [both(E2M1)],
    "bitmod3": [both([0, 1, 2, 4], v) for v in (3, -3, 6, -6)],
    "razer4": [both(E2M1, v) for v in (5, 8, -5, -8)],
    "if4": [both(E2M1), both([i * 6 / 7 for i in range(8)])],
    "ant4": [common(list(range(8))), both([0, 1, 2, 3, 4, 6, 8, 16]), both([0, 1, 2, 4, 8, 16, 32, 64]), both(E2M1)],
}

# -- the reference: scales --------------------------------------------------------------------------------------------

GRID = [2.0 ** ((8 - j) / 16) for j in range(80)]
NV = [2.0 ** (i / 16) for i in range(-8, 9)]
POT = [2 * 0.01 * i for i in range(1, 201)]  # s0 = amax / 2**(qmax-1) is twice amax / largest level
ROUND = {
    "fp16": lambda s, parent: F32(np.float16(np.clip(F32(s), 1e-7, 65504))),
    "bf16": lambda s, parent: F32(ml_dtypes.bfloat16(np.maximum(F32(s), 1e-7))),
    "e4m3": lambda s, parent: F32(ml_dtypes.float8_e4m3fn(np.clip(F32(s) / parent, 2.0**-9, 448))) * parent,
    "u8": lambda s, parent: F32(np.rint(np.clip(F32(s) / parent, 1, 255))) * parent,
    "e3m3": lambda s, parent: e3m3(np.clip(F32(s) / parent, 2.0**-5, 30)) * parent,
    "free": lambda s, parent: F32(max(F32(s), 2.0**-24)),
}
E3M3 = np.array([m / 32 for m in range(8)] + [2.0 ** (e - 3) * (1 + m / 8) for e in range(1, 8) for m in range(8)])


def e3m3(value: float) -> np.float32:
    distance = np.abs(E3M3 - float(value))
    ties = np.flatnonzero(distance == distance.min())
    return F32(E3M3[ties[0] if ties[0] % 2 == 0 else ties[-1]])


def powers(amax: float, top: float, rule: str) -> list[float]:
    if amax == 0:
        exponents = [-127]
    elif rule == "ceil":
        exponents = [math.ceil(math.log2(amax / top))]
    else:
        floor = math.floor(math.log2(amax)) - math.floor(math.log2(top))
        exponents = [floor - 1, floor, floor + 1] if rule == "mse" else [floor]
    return [2.0 ** max(-127, min(127, e)) for e in exponents]


def nearest(levels: list[float], u: np.ndarray) -> np.ndarray:
    table = np.array(levels, dtype=np.float64)
    return table[np.abs(table[None] - np.float64(u)[:, None]).argmin(1)]


def block_error(x: np.ndarray, h: np.ndarray, levels: list[float], scale: float) -> float:
    q = F32(nearest(levels, x / F32(scale))) * F32(scale)
    return float((h * (np.float64(q) - x) ** 2).sum())


# -- the reference: blocks --------------------------------------------------------------------------------------------


def blocks_of(k: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, k)) for i in range(0, k, block)]


@dataclasses.dataclass
class Case:
    """One format of the reference: family, block, scale storage, candidates."""

    family: str
    block: int | str
    store: str
    multipliers: list[float]
    unit: int | None = None
    cap: float = 1.0


def candidates(case: Case, amax: float, top: float, rule: str, parent: float, store: str | None = None) -> list[float]:
    store = store or case.store
    if store == "e8m0":
        return powers(amax, top, rule)
    factors = case.multipliers if rule == "mse" else [1.0]
    return [ROUND[store](F32(amax) / F32(top) * F32(f), F32(parent)) for f in factors]


def least(
    case: Case, x: np.ndarray, h: np.ndarray, rule: str, parent: float, store: str | None = None
) -> tuple[float, float]:
    """(least error of a block, scale of it) over members and candidates; AMS: members per unit under one scale."""
    family, amax = FAMILIES[case.family], float(np.abs(x).max())
    best = (math.inf, 0.0)
    if case.unit:
        top = max(max(levels) for levels in family)
        for s in candidates(case, amax, top, rule, parent, store):
            error = sum(
                min(block_error(x[u], h[u], levels, s) for levels in family) for u in blocks_of(len(x), case.unit)
            )
            best = min(best, (error, s))
        return best
    for levels in family:
        top = max(map(abs, levels))
        for s in candidates(case, amax, top, rule, parent, store):
            error = block_error(x, h, levels, s)
            if error < best[0]:
                best = error, s
    return best


def reference(case: Case, w: np.ndarray, h: np.ndarray, rule: str) -> np.ndarray:
    """Least errors [rows, blocks]."""
    rows, k = w.shape
    parts = blocks_of(k, k if case.block == "row" else int(case.block))
    parents = np.ones(rows)
    if case.store in ("u8", "e3m3") and case.family != "razer4":
        largest = [max(least(case, row[b], h[b], rule, 1.0, "free")[1] for b in parts) for row in w]
        parents = np.float64(np.float16(np.clip(np.array(largest, dtype=F32) / F32(case.cap), 2.0**-24, 65504)))
    elif case.store in ("e4m3", "e3m3"):
        top = min(max(map(abs, levels)) for levels in FAMILIES[case.family])
        parents[:] = F32(np.abs(w).max()) / F32(top * case.cap) if w.any() else 1.0
    return np.array([[least(case, row[b], h[b], rule, p)[0] for b in parts] for row, p in zip(w, parents)])


def chosen(q: QuantizedTensor, w: np.ndarray, h: np.ndarray, block: int | str) -> np.ndarray:
    """Errors of what was stored [rows, blocks], float64."""
    error = h * (q.dequantize().double().numpy() - w) ** 2
    k = w.shape[1]
    return np.stack([error[:, b].sum(1) for b in blocks_of(k, k if block == "row" else int(block))], 1)


# -- data -------------------------------------------------------------------------------------------------------------


def heavy(rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Rows of normal, heavy-tailed, one-sided and partly zero weights."""
    g = np.random.default_rng(seed)
    w = np.concatenate([g.standard_normal((rows - rows // 2, k)), g.standard_t(2, (rows // 2, k))])
    w *= np.exp(g.normal(-3, 1, (rows, 1)))
    w[0, : k // 3] = 0
    w[-1] = np.abs(w[-1])
    return w.astype(F32)


def uneven(k: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(100 + seed).normal(0, 1.5, k)).astype(F32)


CASES = {
    "mant4-g32": Case("mant4", 32, "fp16", GRID),
    "mant4-g16@e3m3": Case("mant4", 16, "e3m3", GRID, cap=30),
    "int4-g16@u8": Case("int4", 16, "u8", GRID, cap=255),
    "int4-g32@bf16": Case("int4", 32, "bf16", GRID),
    "int4-g32@e8m0": Case("int4", 32, "e8m0", []),
    "nf4-g32": Case("nf4", 32, "fp16", GRID),
    "nf4-row": Case("nf4", "row", "fp16", GRID),
    "e4m3-g32": Case("e4m3", 32, "fp16", GRID),
    "iq4nl": Case("iq4nl", 32, "fp16", GRID),
    "pot3-g32": Case("pot3", 32, "fp16", POT),
    "fp4.25": Case("ams-e2m2k4", "row", "fp16", GRID, unit=4),
    "ams-e2m2k4-g18": Case("ams-e2m2k4", 18, "fp16", GRID, unit=4),
    "fp5.33-g32": Case("ams-e2m3k3", 32, "fp16", GRID, unit=3),
    "fp5.33-g16@e3m3": Case("ams-e2m3k3", 16, "e3m3", GRID, unit=3, cap=30),
    "bitmod3-g32": Case("bitmod3", 32, "u8", GRID, cap=255),
    "nvfp4": Case("e2m1", 16, "e4m3", NV, cap=448),
    "mxfp4": Case("e2m1", 32, "e8m0", []),
    "razer4": Case("razer4", 16, "e3m3", NV, cap=28),
    "if4": Case("if4", 16, "e4m3", NV, cap=448),
    "mant4-g16@e4m3": Case("mant4", 16, "e4m3", NV, cap=448),
}


def agree(found: np.ndarray, wanted: np.ndarray, w: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12 * float(np.square(w).mean()))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", CASES)
def test_least_error(name: str, rule: str, weighted: bool) -> None:
    case = CASES[name]
    w = heavy(4, 70)
    h = uneven(70) if weighted else np.ones(70, dtype=F32)
    importance = torch.from_numpy(h) if weighted else None
    q = quantize_tensor(torch.from_numpy(w), name, scale_rule=rule, importance=importance)
    agree(chosen(q, w, h, case.block), reference(case, w, h, rule), w)


@pytest.mark.parametrize("name", ["mxfp4", "int4-g32@e8m0"])
@pytest.mark.parametrize("rule", ["floor", "ceil"])
def test_ocp_rules(name: str, rule: str) -> None:
    case = CASES[name]
    w, h = heavy(4, 70), np.ones(70, dtype=F32)
    w[1, :32] = np.linspace(-6, 6, 32) * 0.25  # the maximum maps to the largest level exactly: ceil needs no more
    w[1, 32:64] = np.nextafter(F32(1.5), F32(2))
    q = quantize_tensor(torch.from_numpy(w), name, scale_rule=rule)
    agree(chosen(q, w, h, case.block), reference(case, w, h, rule), w)
    assert rule == "floor" or np.abs(q.dequantize().numpy()).max() >= np.abs(w).max() * 0.7
    with pytest.raises(FormatError, match=rf"'{rule}' does not apply to int4-g32; choose one of mse, absmax$"):
        quantize_tensor(torch.from_numpy(w), "int4-g32", scale_rule=rule)


def test_absmax_on_e8m0_is_floor() -> None:
    w = torch.from_numpy(heavy(4, 64))
    floor, absmax = (quantize_tensor(w, "mxfp4", scale_rule=r).planes for r in ("floor", "absmax"))
    assert all(torch.equal(floor[n], absmax[n]) for n in floor)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize(
    ("name", "bits", "block"), [("uint3-g32", 3, 32), ("uint4-row", 4, "row"), ("uint8-g16", 8, 16)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_asymmetric_integers(name: str, bits: int, block: int | str, rule: str, weighted: bool) -> None:
    w = heavy(4, 70, 1)
    h = uneven(70) if weighted else np.ones(70, dtype=F32)
    importance = torch.from_numpy(h) if weighted else None
    q = quantize_tensor(torch.from_numpy(w), name, scale_rule=rule, importance=importance)
    top, best = 2**bits - 1, []
    for row in w:
        for b in blocks_of(70, 70 if block == "row" else int(block)):
            low, high = min(0, row[b].min()), max(0, row[b].max())
            errors = []
            for j in range(40 if rule == "mse" else 1):
                shrink = F32(2.0 ** (-j / 16))
                s = ROUND["fp16"]((F32(high) - F32(low)) / F32(top) * shrink, None)
                z = np.clip(np.rint(F32(-low) * shrink / s), 0, top)
                code = np.clip(np.rint(row[b] / s) + z, 0, top)
                errors.append(float((h[b] * ((code - z) * np.float64(s) - row[b]) ** 2).sum()))
            best.append(min(errors))
    agree(chosen(q, w, h, block).flatten(), np.array(best), w)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("base", ["int4", "uint4", "uint2", "e4m3", "iq4nl", "pot3", "mant4", "fp4.25", "bitmod4", "ant4"])
def test_every_scale_storage_is_near_fp16(base: str, rule: str) -> None:
    """Shorter scales cost what their steps cost, and no storage clips what another holds."""
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(12)) * 0.02
    stores = {"bf16": 1.1, "e4m3": 1.2, "e8m0": 6.0}  # floor clips up to half a binade and more
    if base != "ant4":
        stores |= {"u8": 1.1, "e3m3": 1.2}
    error = {
        store: float((quantize_tensor(w, f"{base}-g32@{store}", scale_rule=rule).dequantize() - w).square().sum())
        for store in ("fp16", *stores)
    }
    for store, factor in stores.items():
        assert error[store] <= factor * error["fp16"], store


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_member_per_tensor(rule: str, weighted: bool) -> None:
    w = heavy(5, 48, 2)
    h = uneven(48) if weighted else np.ones(48, dtype=F32)
    importance = torch.from_numpy(h) if weighted else None
    q = quantize_tensor(torch.from_numpy(w), "ant4", scale_rule=rule, importance=importance)
    totals = []
    for levels in FAMILIES["ant4"]:
        FAMILIES["one"] = [levels]
        totals.append(reference(Case("one", "row", "fp16", GRID), w, h, rule).sum())
    assert int(q.planes["member"]) == int(np.argmin(totals))
    assert chosen(q, w, h, "row").sum() == pytest.approx(min(totals), rel=1e-6)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", ["int4-tensor", "nf4-tensor@bf16", "fp4.25-tensor", "ant4-tensor", "int4-tensor@e8m0"])
def test_one_scale_per_tensor(name: str, rule: str) -> None:
    w, h = heavy(3, 36, 3), uneven(36)
    q = quantize_tensor(torch.from_numpy(w), name, scale_rule=rule, importance=torch.from_numpy(h))
    family = FAMILIES[{"fp4.25-tensor": "ams-e2m2k4"}.get(name, name.split("-")[0])]
    amax, totals = float(np.abs(w).max()), []
    store = (name.split("@") + ["fp16"])[1]
    if name.startswith("fp4.25"):
        for s in candidates(Case("", "", store, GRID), amax, 7.0, rule, 1.0):
            parts = product(w, blocks_of(36, 4))
            totals.append(sum(min(block_error(r[u], h[u], levels, s) for levels in family) for r, u in parts))
    else:
        for levels in family:
            for s in candidates(Case("", "", store, GRID), amax, max(map(abs, levels)), rule, 1.0):
                totals.append(sum(block_error(r, h, levels, s) for r in w))
    assert chosen(q, w, h, "row").sum() == pytest.approx(min(totals), rel=1e-6)


def test_four_over_six() -> None:
    """Absmax tries a maximum of 6 and of 4 in each block under a parent that leaves room for both."""
    w, h = heavy(4, 64, 4), np.ones(64)
    parent = F32(np.abs(w).max()) / F32(6 * 256)
    best = []
    for row, b in product(w, blocks_of(64, 16)):
        wanted = F32(np.abs(row[b]).max()) / F32(6)
        scales = [ROUND["e4m3"](wanted * F32(f), parent) for f in (1, 1.5)]
        best.append(min(block_error(row[b], h[b], FAMILIES["e2m1"][0], s) for s in scales))
    q = quantize_tensor(torch.from_numpy(w), "nvfp4-4over6", scale_rule="absmax")
    agree(chosen(q, w, h, 16).flatten(), np.array(best), w)
    plain = quantize_tensor(torch.from_numpy(w), "nvfp4", scale_rule="absmax")
    assert chosen(q, w, h, 16).sum() < chosen(plain, w, h, 16).sum()


def test_greedy_palette() -> None:
    """DynFP: add the candidate that lowers the summed error of absmax blocks most, sixteen times."""
    w, h = heavy(6, 64, 5), np.ones(64)
    grids = [sorted(set(g.levels)) for g in format("dynfp4").members]
    table = []
    for row, b in product(w, blocks_of(64, 32)):
        amax = np.abs(row[b]).max()
        scales = [ROUND["fp16"](F32(amax) / F32(max(map(abs, levels))), None) for levels in grids]
        table.append([block_error(row[b], h[b], levels, s) for levels, s in zip(grids, scales)])
    errors, kept = np.array(table), []
    current = np.full((len(errors), 1), np.inf)
    for _ in range(16):
        gain = np.minimum(errors, current).sum(0)
        gain[kept] = np.inf
        kept.append(int(gain.argmin()))
        current = np.minimum(current, errors[:, kept[-1:]])
    q = quantize_tensor(torch.from_numpy(w), "dynfp4", scale_rule="absmax")
    assert q.planes["palette"].tolist() == sorted(kept)


@pytest.mark.parametrize("name", ["mant4-g16@e3m3", "int4-g16@u8", "fp5.33-g16@e3m3"])
def test_two_level_parent(name: str) -> None:
    """The parent is the fp16 of the row's largest unrestricted scale over 30 or 255; stored scales hang under it."""
    case, w = CASES[name], heavy(4, 70, 6)
    q = quantize_tensor(torch.from_numpy(w), name)
    one = np.ones(70)
    for row, parent in zip(w, q.planes["parent"].tolist()):
        largest = max(least(case, row[b], one[b], "mse", 1.0, "free")[1] for b in blocks_of(70, int(case.block)))
        assert parent == pytest.approx(float(np.float16(F32(largest) / F32(case.cap))), rel=1e-3)
    _, params = q.params()
    assert float(params.scale.max()) <= case.cap and float(params.scale.min()) > 0


def test_ties_of_fit() -> None:
    """Equal errors: the lower member, shared bit 0, the larger scale."""
    row = torch.tensor([7.0, 0.25, 0.25, 0.25] + [0.375] * 4 + [0.0] * 4 + [0.25] * 4)  # the second unit ties: scale is 1
    q = quantize_tensor(row, "fp4.25", scale_rule="absmax")
    assert q.planes["scale"].tolist() == [1.0] and q.planes["member"].tolist() == [0b1001]
    both_exact = torch.tensor([6.0, -6.0] + [0.0] * 14)
    assert quantize_tensor(both_exact, "if4", scale_rule="absmax").planes["scale"].tolist() == [0x7E]  # sign clear: FP4
    two_scales = torch.tensor([2.0, -2.0] + [1.0] * 30)
    assert quantize_tensor(two_scales, "mxfp4").planes["scale"].tolist() == [127]  # 2**0 and 2**-1 are both exact
    assert quantize_tensor(torch.zeros(64), "ant4-row").planes["member"].tolist() == [0]


# -- pruning ----------------------------------------------------------------------------------------------------------


def same_planes(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    def as_bytes(plane: torch.Tensor) -> torch.Tensor:
        return plane.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    same = (torch.equal(as_bytes(p), as_bytes(b.planes[n])) for n, p in a.planes.items())
    return a.planes.keys() == b.planes.keys() and all(same)


def pruning_data() -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    g = torch.Generator().manual_seed(9)
    normal = torch.randn(4, 160, generator=g) * 0.02
    cauchy = torch.tan((torch.rand(4, 160, generator=g) - 0.5) * 3.1) * 0.01
    spikes = normal.clone()
    spikes[:, ::64] = 3.0
    zeros = normal.clone()
    zeros[:, 64:128] = 0
    zeros[3] = 0
    few = torch.randint(-2, 3, (4, 160), generator=g).float()
    h = torch.rand(160, generator=g).square() + 1e-3
    dead = h.clone()
    dead[64:128] = 0
    yield "normal", normal, None
    yield "few values", few, None
    for name, w in (("cauchy", cauchy), ("spikes", spikes), ("zeros", zeros)):
        for kind, importance in (("plain", None), ("weighted", h), ("dead", dead)):
            yield f"{name} {kind}", w, importance


@pytest.mark.parametrize(
    "name", ["mant4-g64", "mant4-g32@e3m3", "nf4-g64", "int4-g32", "uint4-g64", "fp4.25", "fp5.33-g64", "pot3-g64",
             "ant4-g64", "razer4", "bitmod4-g64", "iq4nl", "e4m3-g64", "nvfp4", "mant4-g64@e8m0"]
)  # fmt: skip
def test_pruning_finds_the_same_minimum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for what, w, importance in pruning_data():
        pruned = quantize_tensor(w, name, importance=importance)
        with monkeypatch.context() as patch:
            patch.setattr(fitter, "BATCH", 1000)  # all candidates in one batch: nothing is ever pruned
            full = quantize_tensor(w, name, importance=importance)
        assert same_planes(pruned, full), what


# -- known numbers and order ------------------------------------------------------------------------------------------


def relative_error(w: torch.Tensor, q: QuantizedTensor) -> float:
    blocks = w.double().view(-1, 64)
    error = (q.dequantize().double().view(-1, 64) - blocks).square().mean(1)
    return float((error / blocks.square().mean(1)).mean())


def test_published_error_of_mant4() -> None:
    """mant-family.md section 3 (and 4.3 for AMS): mean relative squared error in percent, Gaussian, g = 64, absmax."""
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(64))
    published = {"mant4-g64": 0.772, "nf4-g64": 0.848, "int4-g64": 1.149, "e2m1-g64": 1.123, "mantsv4-g64": 0.697,
                 "mant4s-g64": 0.787, "bitmod4-g64@fp16": 0.846, "ams-e2m2k4-g64": 0.564,
                 "uint4-g64": 0.828}  # fmt: skip
    for name, percent in published.items():
        found = 100 * relative_error(w, quantize_tensor(w, name, scale_rule="absmax"))
        assert found == pytest.approx(percent, rel=0.02), name


def test_searched_scales_improve_mant4() -> None:
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(65))
    found = 100 * relative_error(w, quantize_tensor(w, "mant4-g64", scale_rule="mse"))
    assert found < 0.725  # the coarser clip search of mant-family.md section 3 gives .719


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", ["mant4-g64", "mantsv4-g64", "bitmod4-g64@fp16", "if4-g64@fp16"])
def test_a_family_is_never_worse_than_its_members(name: str, rule: str) -> None:
    fmt = format(name)
    w = torch.from_numpy(heavy(6, 256, 7))
    one = np.ones(256)
    family = chosen(quantize_tensor(w, fmt, scale_rule=rule), w.numpy(), one, 64)
    for grid in fmt.members:
        alone = dataclasses.replace(fmt, members=(grid,), member_home="plane")
        single = chosen(quantize_tensor(w, alone, scale_rule=rule), w.numpy(), one, 64)
        if fmt.spare == 0 or rule == "mse":  # two merged bits cost the fp16 scale its last bit
            assert (family <= single * (1 + (1e-6 if fmt.spare == 0 else 0.02)) + 1e-15).all()


@pytest.mark.parametrize(
    "name",
    ["mant4-g32", "nf4-row", "fp4.25", "fp5.33-g64", "uint4-g64", "nvfp4", "mxfp4", "int4-tensor", "ant4", "if4"],
)
def test_importance_helps_what_it_weighs(name: str) -> None:
    w = heavy(6, 192, 8)
    for seed in range(3):
        h = uneven(192, seed)
        aware = quantize_tensor(torch.from_numpy(w), name, importance=torch.from_numpy(h))
        blind = quantize_tensor(torch.from_numpy(w), name)
        errors = [chosen(q, w, h, "row").sum() for q in (aware, blind)]
        assert errors[0] <= errors[1] * (1 + 1e-6)
        assert errors[0] < errors[1] or name == "mxfp4"


def test_importance_only_counts_in_proportion() -> None:
    w = torch.from_numpy(heavy(6, 192, 8))
    h = torch.from_numpy(uneven(192))
    base = quantize_tensor(w, "mant4-g64", importance=h)
    for factor in (2.0**-40, 2.0**-100, 2.0**40, 2.0**80):
        assert same_planes(base, quantize_tensor(w, "mant4-g64", importance=h * factor))
    equal = quantize_tensor(w, "mant4-g64", importance=torch.full((192,), 3.0))
    assert same_planes(equal, quantize_tensor(w, "mant4-g64"))


@pytest.mark.parametrize("name", ["mant4-g64", "fp4.25-g64", "uint4-g64", "nf4-g64", "mant4-g32@e3m3"])
def test_dead_importance(name: str) -> None:
    """Blocks that no input reaches still get a sensible scale; where nothing is reached, all count alike."""
    w = heavy(6, 192, 9)
    h = uneven(192)
    h[64:128] = 0
    q = quantize_tensor(torch.from_numpy(w), name, importance=torch.from_numpy(h))
    error, power = (np.square(v[:, 64:128]).sum() for v in (q.dequantize().numpy() - w, w))
    assert error < 0.05 * power
    zero = quantize_tensor(torch.from_numpy(w), name, importance=torch.zeros(192))
    assert same_planes(zero, quantize_tensor(torch.from_numpy(w), name))


# -- edges ------------------------------------------------------------------------------------------------------------

EVERY = [*bases(), "mant4-g32@e3m3", "int4-g64@u8", "int4-tensor", "uint4-tensor", "fp4.25-tensor", "ant4-tensor",
         "nf4-g64@bf16", "razer4-g64@fp16", "mant4-g64@e8m0", "uint4-g64@e8m0"]  # fmt: skip


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", EVERY)
def test_zero_tensors(name: str, rule: str) -> None:
    q = quantize_tensor(torch.zeros(2, 150), name, scale_rule=rule)
    back = q.dequantize()
    assert torch.isfinite(back).all()
    least = min(min(abs(v) for v in g.levels if v == v) for g in format(name).members)
    if least == 0:
        assert back.abs().max() < 1e-37  # exactly zero, but for the least power of two under a member without zero
    else:
        assert back.abs().max() < 2e-5  # no level is zero: the least scale times the least level
    mixed = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    mixed[:, :128] = 0
    assert torch.isfinite(quantize_tensor(mixed, name, scale_rule=rule).dequantize()).all()


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("base", [b for b in bases() if format(b).scale.parent != "row" and not format(b).palette])
def test_rows_of_one_weight(base: str, rule: str) -> None:
    w = torch.tensor([[0.5], [-0.25], [0.0], [3.0]])
    fmt = format(f"{base}-row")
    back = quantize_tensor(w, fmt, scale_rule=rule).dequantize()
    assert back.shape == w.shape and torch.isfinite(back).all()
    if fmt.scale.store == "fp16" and not fmt.zero and fmt.unit == "block":
        inside = w[[0, 1, 3]]
        assert torch.allclose(back[[0, 1, 3]], inside, rtol=0.15)
        assert torch.equal(back.sign()[[0, 1, 3]], inside.sign())
    one = quantize_tensor(w[0], fmt, scale_rule=rule)
    assert one.dequantize().shape == (1,)


@pytest.mark.parametrize("name", ["mant4-g64", "fp5.33-g64", "uint4-g64", "nf4-g64", "nvfp4", "mxfp4", "mant4-g32@e3m3",
                                  "int4-g64@u8", "dynfp4-g64"])  # fmt: skip
@pytest.mark.parametrize("k", [65, 127, 130, 191])
def test_short_last_blocks(name: str, k: int) -> None:
    """A short last block is fitted as a block of its own."""
    fmt = format(name)
    block, w = int(fmt.block), torch.from_numpy(heavy(4, k, 10))
    q = quantize_tensor(w, fmt)
    cut = k // block * block
    assert fmt.scale.parent == "row" or fmt.scale.parent == "tensor" or cut < k
    if fmt.scale.parent is None and not fmt.palette:
        whole = quantize_tensor(w[:, :cut], fmt).dequantize()
        assert torch.equal(q.dequantize()[:, :cut], whole)
        tail = quantize_tensor(w[:, cut:], dataclasses.replace(fmt, block="row")).dequantize()
        assert torch.equal(q.dequantize()[:, cut:], tail)
    error = (q.dequantize() - w).square().sum() / w.square().sum()
    assert error < 0.1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 3, 130)])
def test_no_rows(name: str, shape: tuple[int, ...]) -> None:
    q = quantize_tensor(torch.empty(shape), name)
    assert q.dequantize().shape == shape
    QuantizedTensor.from_planes(q.format, shape, q.planes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mant4", "fp4.25", "uint4", "nvfp4", "int4-tensor", "ant4", "mxfp4", "dynfp4"])
def test_half_precision_input(name: str, dtype: torch.dtype) -> None:
    w = torch.from_numpy(heavy(5, 150, 11)).to(dtype)
    assert same_planes(quantize_tensor(w, name), quantize_tensor(w.float(), name))


@pytest.mark.parametrize("name", EVERY)
def test_views_are_as_good_as_copies(name: str) -> None:
    w = torch.from_numpy(heavy(6, 150, 12))
    want = quantize_tensor(w, name, scale_rule="absmax")
    assert same_planes(quantize_tensor(w.t().contiguous().t(), name, scale_rule="absmax"), want)
    wide = torch.stack([w, w + 1], -1)[..., 0]
    assert same_planes(quantize_tensor(wide, name, scale_rule="absmax"), want)
    whole = w[:, :128]
    copied, turned = (v.t().contiguous().t() if i else v.clone() for i, v in enumerate((whole, whole)))
    assert same_planes(*(quantize_tensor(v, name, scale_rule="absmax") for v in (copied, turned)))
    cube = w.view(2, 3, 150)
    turned = cube.transpose(0, 1).contiguous().transpose(0, 1)
    flat = [quantize_tensor(c, name, scale_rule="absmax").dequantize() for c in (cube, turned)]
    assert torch.equal(*flat) and torch.equal(flat[0].view(6, 150), want.dequantize())


def test_the_input_is_left_alone() -> None:
    w = torch.from_numpy(heavy(4, 128))
    w.requires_grad_()
    before = w.detach().clone()
    q = quantize_tensor(w, "mant4", importance=torch.ones(128))
    assert torch.equal(w, before) and w.grad is None
    assert not any(p.requires_grad for p in q.planes.values())


@pytest.mark.parametrize("name", ["mant4-g64", "int4-g64", "fp4.25", "mxfp8-e4m3", "nvfp4", "int4-g64@e8m0",
                                  "uint4-g64@bf16", "int4-g64@bf16"])  # fmt: skip
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_magnitudes_that_the_storage_can_hold(name: str, rule: str) -> None:
    """The relative error does not depend on the magnitude, as far as the scale type reaches."""
    store = format(name).scale.store
    reach = {"fp16": (1e-2, 1e5), "bf16": (1e-4, 1e15), "e8m0": (1e-15, 1e15), "e4m3": (1e-15, 1e15)}[store]
    w = torch.from_numpy(heavy(4, 128, 13))
    errors = []
    for magnitude in (1.0, *reach):
        x = w / w.abs().max() * magnitude
        difference = quantize_tensor(x, name, scale_rule=rule).dequantize().double() - x.double()
        errors.append(float((difference / magnitude).square().sum()))
    assert max(errors) < 1.3 * errors[0]


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [("int4-g64", 1e6), ("fp4.25", 1e6), ("uint4", 1e7), ("razer4-g64@fp16", 1e6), ("mant4-g32@e3m3", 1e9),
     ("int4-g64@bf16", 1e30), ("mxfp8-e4m3", 1e30), ("nvfp4", 1e30), ("int4-tensor", 1e6)],
)  # fmt: skip
def test_weights_beyond_the_storage_are_refused(name: str, magnitude: float) -> None:
    """Scales that their type cannot hold would clip the weights to a fraction: never silently."""
    w = torch.from_numpy(heavy(4, 128, 13))
    with pytest.raises(FormatError, match="scale"):
        quantize_tensor(w / w.abs().max() * magnitude, name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_are_refused_with_their_place(bad: float, dtype: torch.dtype) -> None:
    w = torch.zeros(3, 4, 128, dtype=dtype)
    w[1, 2, 77] = bad
    w[2, 0, 5] = bad
    with pytest.raises(FormatError, match=rf"2 values that are NaN or Inf, the first \({bad}\) at index \[1, 2, 77\]"):
        quantize_tensor(w, "mant4")
    with pytest.raises(FormatError, match=r"at index \[2\]"):
        quantize_tensor(torch.tensor([0, 0, bad, 0], dtype=dtype), "int4-row")


def test_a_sum_that_overflows_is_not_a_weight_that_does() -> None:
    w = torch.full((2, 128), 6e4, dtype=torch.float16)
    assert torch.isfinite(quantize_tensor(w, "int4").dequantize()).all()


def test_refusals() -> None:
    w = torch.ones(2, 128)
    with pytest.raises(FormatError, match=r"int4-g256 has blocks of 256 .* only 128"):
        quantize_tensor(w, "int4-g256")
    with pytest.raises(FormatError, match="unknown format 'mant5'"):
        quantize_tensor(w, "mant5")
    with pytest.raises(FormatError, match="'best' does not apply to int4-g128; choose one of mse, absmax"):
        quantize_tensor(w, "int4", scale_rule="best")
    with pytest.raises(FormatError, match=r"not torch\.int8"):
        quantize_tensor(w.to(torch.int8), "int4")
    with pytest.raises(FormatError, match=r"importance has shape \(64,\), but the weight has 128"):
        quantize_tensor(w, "int4", importance=torch.ones(64))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(FormatError, match="importance must be finite and not negative"):
            quantize_tensor(w, "int4", importance=torch.full((128,), wrong))


# -- sameness ---------------------------------------------------------------------------------------------------------


def with_threads(count: int, work: Callable[[], QuantizedTensor]) -> QuantizedTensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["mant4-g64", "fp4.25", "uint4-row", "int4-tensor", "ant4", "mant4-g32@e3m3"])
def test_threads_do_not_change_bytes(name: str) -> None:
    w = torch.randn(9, 9000, generator=torch.Generator().manual_seed(3))
    h = torch.rand(9000, generator=torch.Generator().manual_seed(4))
    one, two = (with_threads(n, lambda: quantize_tensor(w, name, scale_rule="absmax", importance=h)) for n in (1, 2))
    assert same_planes(one, two)
    thin = w[:1, :6000]  # one row: a sum that torch would like to split
    one, two = (with_threads(n, lambda: quantize_tensor(thin, name)) for n in (1, 2))
    assert same_planes(one, two)


def test_default_dtype_does_not_change_bytes() -> None:
    """Models are often built under another default type; the fp32 of the search does not follow it."""
    for name in ("nf4-g64", "mant4-g32@e3m3", "uint4-g64", "mxfp4", "fp4.25"):
        w = torch.randn(24 if name == "nf4-g64" else 4, 256, generator=torch.Generator().manual_seed(3))
        want = quantize_tensor(w, name)
        for dtype in (torch.bfloat16, torch.float16):
            clear_caches()
            torch.set_default_dtype(dtype)
            try:
                found = quantize_tensor(w, name)
            finally:
                torch.set_default_dtype(torch.float32)
            assert same_planes(found, want), (name, dtype)
            assert same_planes(quantize_tensor(w, name), want)  # nor is anything of it remembered
    clear_caches()


def clear_caches() -> None:
    from numfit.formats.nearest import ladder, tables

    tables.cache_clear()
    ladder.cache_clear()


@pytest.mark.filterwarnings("error:torch.compile cannot build")
def test_compiled_and_eager_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough to be compiled by itself: the same bytes as the eager reference, for one thread and for two."""
    monkeypatch.setattr(fitter, "usable", lambda device: False)  # as where numfit's own kernels are missing
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(6))
    assert w.numel() * 16 * 20 * 8 >= fitter.COMPILE_FROM
    calls = []
    real = importlib.import_module("numfit.formats.fused").try_fused
    monkeypatch.setattr("numfit.formats.search.try_fused", lambda *a: calls.append(a[0].__name__) or real(*a))
    compiled = quantize_tensor(w, "mant4-g64")
    assert calls
    two = with_threads(1 if torch.get_num_threads() > 1 else 2, lambda: quantize_tensor(w, "mant4-g64"))
    assert same_planes(compiled, two)
    monkeypatch.setattr(fitter, "COMPILE_FROM", 1 << 62)
    before = len(calls)
    eager = quantize_tensor(w, "mant4-g64")
    assert len(calls) == before
    assert same_planes(compiled, eager)


def test_without_a_compiler_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import numfit.formats.fused as fused

    def broken(function: object) -> object:
        def fail(*args: object) -> object:
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(fitter, "usable", lambda device: False)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(6))
    want = quantize_tensor(w, "mant4-g64")
    monkeypatch.setattr(fused, "_state", {"works": True})
    monkeypatch.setattr(fused, "_compiled", broken)
    monkeypatch.setattr(fitter, "COMPILE_FROM", 0)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler.*several times slower"):
        found = quantize_tensor(w, "mant4-g64")
    assert same_planes(found, want)
