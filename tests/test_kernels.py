"""The CPU kernels against float64: every format they serve, on every instruction set of this machine, with stated bounds.

What is asserted, and where it is derived:
- int8 activations: within `kernel_oracle.expected_int8`, whose only slack is fp32 summation and the stated rounding of
  levels; where levels are int8 numbers and the data makes every fp32 operation exact, equal to the integer result;
- exact activations: within fp32 summation of the dot product (`expected_exact`);
- results are the same bits for any number of threads and tokens, and with int8 activations on any instruction set;
- rows come back bit for bit as the format defines them, planes as the file had them;
- nothing is read or written beyond the arrays that were passed.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_abi import POISON, Fenced, Linear, Planes, Refused, bf16_bits, from_bf16_bits
from kernel_oracle import (
    dense,
    expected_exact,
    expected_int8,
    group_of_column,
    int8_step,
    max_level,
    quantize,
    quantum,
    sample,
    scale_of_weight,
)

from numfit.formats import Format, Grid, QuantizedTensor, Scale, bases, format
from numfit.formats.grid import shared_mantissa
from numfit.formats.scale import STORES
from numfit.native import isa_names, library, set_isa, set_threads

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")
ISAS = isa_names()
BEST = ISAS[-1] if ISAS else ""

NAMES = [
    *(name for name in bases() if not format(name).learned),
    "mant4-g32@e3m3", "mant4-g64@u8", "mant4-row", "mant4-g128", "mant4-g48", "ams-e2m2k4-g128", "fp5.33-g64@bf16",
    "fp5.33-g96", "ams-e2m2k4-g20", "ams-e4m3k5-g16@u8", "ams-e2m2k8-g64", "razer4-g64@fp16", "razer4-g16@e4m3",
    "razer4-g32@bf16", "if4-g32@fp16", "nf4-g64@bf16", "int4-tensor", "int4-row", "uint4-tensor@bf16", "uint3-g16@e3m3",
    "uint8-g32@e8m0", "fp4.25-tensor", "ant4-g32@e4m3", "int6-g32@e8m0", "int3-g24", "int5-g7@u8", "pot2-g1",
    "mantsv4-g16@e3m3", "e3m2-g128@e4m3",
]  # fmt: skip
# Levels that are whole multiples, at most 127, of one number: int8 sums are exact.
EXACT = [
    *(f"int{b}-g{g}" for b in range(2, 9) for g in (32, 64, 128)), *(f"uint{b}-g64" for b in range(2, 9)), "uint4-g128@u8",
    "int4-row", "int4-tensor", "uint8-row", "int4-g20", "int8-g100@bf16", "int4-g64@e8m0", "int4-g16@e4m3", "int4-g32@e3m3",
    "e1m1", "e2m0", "e2m1", "e2m2", "e2m3", "e2m4", "e1m2", "mxfp4", "mxfp6-e2m3", "nvfp4", "mxint8", "fp4.25", "fp5.33",
    "fp4.25-g64", "fp5.33-g96", "fp5.33-g64@u8", "ams-e2m1k4", "ams-e2m2k4-g128", "ams-e2m2k4-g20", "pot2", "pot3",
    "pot2-g32@e8m0", "pot3-log-g64@u8", "mant4", "mant4-g32@e3m3", "mant4-g128@u8", "mant4-row", "mant4s",
]  # fmt: skip
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 33, 70)


@pytest.fixture(autouse=True)
def best_kernels() -> Iterator[None]:
    """Every test starts, and leaves the process, with the best instruction set and one thread."""
    set_isa(BEST)
    set_threads(1)
    yield
    set_isa(BEST)
    set_threads(1)


def shapes(fmt: Format) -> list[tuple[int, int]]:
    """(rows, columns): one row and row blocks that are short, whole, and one more; rows that end inside blocks and tiles."""
    if isinstance(fmt.block, str):
        return [(1, 1), (16, 64), (17, 65), (5, 131), (33, 200), (3, 48)]
    b = fmt.block
    return [(1, b), (17, b + 1), (16, 2 * b), (5, 2 * b + b // 3 + 1), (33, 4 * b - 1), (3, 3 * b + b // 2)]


def activations(m: int, k: int, seed: int) -> np.ndarray:
    """fp32 [m, k]: normal numbers with outliers, some tokens scaled, some groups zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * np.where(rng.random((m, k)) < 0.01, 30, 1)
    x *= np.exp(rng.uniform(-6, 6, (m, 1)))
    x[:, k // 2 : k // 2 + 16] *= rng.random((m, 1)) < 0.7
    return x.astype(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, so that minus zero is not zero; any NaN equals any NaN."""
    return bool(np.array_equal(np.isnan(a), np.isnan(b))) and bool(
        np.array_equal(np.where(np.isnan(a), 0, a).view(np.uint32), np.where(np.isnan(b), 0, b).view(np.uint32))
    )


def linear(q: QuantizedTensor) -> Linear:
    return Linear(Planes(q))


# -- the bound, for every format ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_within_its_bound(name: str) -> None:
    fmt = format(name)
    for turn, (n, k) in enumerate(shapes(fmt)):
        q = sample(fmt, n, k, seed=turn)
        x = activations(TOKENS[-1], k, turn)
        bias = np.random.default_rng(turn).standard_normal(n).astype(np.float32) if turn % 2 else None
        w = linear(q)
        int8, exact = expected_int8(q, x, bias, w.rounding), expected_exact(q, x, bias)
        first: np.ndarray | None = None
        for isa in ISAS:
            set_isa(isa)
            whole = w.apply(x, bias), w.apply(x, bias, exact=True)
            int8.check(whole[0], (name, n, k, isa))
            exact.check(whole[1], (name, n, k, isa, "exact"))
            first = whole[0] if first is None else first
            assert same_bits(whole[0], first), (name, n, k, isa)
            for m in TOKENS[:-1] if isa == BEST else TOKENS[1:-1:4]:
                assert same_bits(w.apply(x[:m], bias), whole[0][:m]), (name, n, k, isa, m)
                assert same_bits(w.apply(x[:m], bias, exact=True), whole[1][:m]), (name, n, k, isa, m, "exact")
        # not by way of this file's quantization: no result is farther from x itself than half a step of each group
        unrounded = dataclasses.replace(exact, bound=exact.bound + int8.bound + int8_step(q, x))
        assert first is not None
        unrounded.check(first, (name, n, k, "step"))


@pytest.mark.parametrize(
    "name", ["int4-g64", "mant4", "nf4", "fp5.33", "fp4.25", "uint4-g128", "int8-g128", "pot2", "bitmod3", "mant4-g32@e3m3"]
)
def test_long_rows_and_many_tokens(name: str) -> None:
    """More tiles and more tokens than any kernel holds at a time."""
    q = sample(format(name), 18, 2200, seed=1)
    x = activations(1100, 2200, 2)
    w = linear(q)
    int8, exact = expected_int8(q, x, None, w.rounding), expected_exact(q, x, None)
    results = []
    for isa in ISAS[1:] or ISAS:
        set_isa(isa)
        results.append(w.apply(x))
        int8.check(results[-1], (name, isa))
        assert same_bits(results[-1], results[0])
        for m in (1, 7, 512, 513, 515):
            assert same_bits(w.apply(x[1100 - m :]), results[0][1100 - m :]), (name, isa, m)
    fp32 = w.apply(x[:260], exact=True)
    exact.check(fp32, (name, "exact"))
    for m in (1, 128, 129, 131):
        assert same_bits(w.apply(x[260 - m : 260], exact=True), fp32[260 - m :]), (name, m)


@pytest.mark.parametrize("name", ["int4-g64", "nf4", "uint4-g64", "mant4", "mant4-g32@e3m3", "fp4.25", "fp5.33", "nvfp4"])
@pytest.mark.parametrize("rows", [383, 515, 891])
def test_squares_of_tokens_and_rows(name: str, rows: int) -> None:
    """Rows enough that a thread has 3, 4, 7 blocks of them at a time, and tokens that fill squares of 64 partly."""
    q = sample(format(name), rows, 150, seed=3)
    x, w = activations(130, 150, 4), linear(q)
    set_isa(ISAS[0])
    plain = w.apply(x)
    expected_int8(q, x, None, w.rounding).check(plain, (name, rows))
    for isa in ISAS[1:]:
        set_isa(isa)
        assert same_bits(w.apply(x), plain), (name, rows, isa)
    for m in (9, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 97, 113):
        assert same_bits(w.apply(x[:m]), plain[:m]), (name, rows, m)
    set_threads(3)
    assert same_bits(w.apply(x), plain), (name, rows, "threads")


# -- bit for bit ----------------------------------------------------------------------------------------------------------


def whole_numbers(m: int, group: np.ndarray, seed: int, most: int) -> np.ndarray:
    """Activations that int8 holds exactly: integers times a power of two, one of each group ±127, the others within ±most."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-most, most + 1, (m, len(group))).astype(np.float64)
    for g in range(group[-1] + 1):
        columns = np.flatnonzero(group == g)
        x[np.arange(m), rng.choice(columns, m)] = rng.choice([-127, 127], m)
        x[:, columns] *= 2.0 ** rng.integers(-1, 2, (m, 1))
    return x.astype(np.float32)


@pytest.mark.parametrize("name", EXACT)
def test_exact_paths_equal_the_integer_result(name: str) -> None:
    fmt = format(name)
    block = fmt.block if isinstance(fmt.block, int) else 64
    for turn, (n, k) in enumerate([(19, 2 * block + block // 3), (16, block), (1, block + 1)]):
        q = sample(fmt, n, k, seed=turn, kind="pow2")
        w = linear(q)
        assert w.rounding == 0, name
        group = group_of_column(fmt, k)
        weights = dense(q)
        for most in (127, 9, 1):  # as large as the 24 bits of fp32 allow
            x = whole_numbers(21, group, turn, most)
            acts = quantize(x, group)
            assert np.array_equal(acts.value, x), "the data is not exact"
            unit = quantum(fmt) * scale_of_weight(q).min() * acts.scale.min()
            y = x.astype(np.float64) @ weights.T
            terms = np.abs(x) @ np.maximum(np.abs(weights), max_level(fmt) * scale_of_weight(q) * fmt.zero).T
            if terms.max() / unit < 2**24:
                break
        else:
            raise AssertionError("no activations are small enough for exact fp32 sums")
        for isa in ISAS:
            set_isa(isa)
            for m in (1, 2, 21):
                np.testing.assert_array_equal(w.apply(x[:m]), y[:m].astype(np.float32), err_msg=f"{name} {n} {k} {isa} {m}")


def test_every_level_is_what_the_stated_rounding_says() -> None:
    """One-hot activations read every level that int8 sums use; the largest error is the one stated, no less and no more."""
    for name in NAMES:
        fmt = format(name)
        k = 2 * fmt.block if isinstance(fmt.block, int) and fmt.block > 20 else 48
        tensors = [sample(fmt, 600, k, seed=s, kind="pow2") for s in range(6 if fmt.unit == "tensor" or fmt.palette else 1)]
        for q in tensors:
            w = linear(q)
            _, params = q.params()
            zero = np.zeros((1, 1)) if params.zero is None else params.zero.double().numpy()
            block_of = np.arange(k) // fmt.geometry(k).block
            zero = zero[:, block_of] if zero.shape[1] > 1 else zero
            scale = scale_of_weight(q)
            level = dense(q) / scale + zero
            for most in range(0, k, 64):
                x = np.zeros((min(64, k - most), k), dtype=np.float32)
                x[np.arange(len(x)), most + np.arange(len(x))] = 127
                y = w.apply(x).astype(np.float64).T / 127 / scale[:, most : most + 64]  # [N, columns]
                error = np.abs(y + (zero[:, most : most + 64] if zero.shape[1] > 1 else zero) - level[:, most : most + 64])
                assert error.max() <= (w.rounding + 1e-6) * max_level(fmt), name
    assert linear(sample(format("nf4"), 16, 64)).rounding > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_code_comes_back(name: str) -> None:
    """Rows of any code and member are the bits that the format defines, also as products with exact activations."""
    fmt = format(name)
    for turn, (n, k) in enumerate(shapes(fmt)):
        for kind in ("plain", "extreme"):
            q = sample(fmt, n, k, seed=turn, kind=kind)
            w = linear(q)
            weights = q.dequantize().numpy()
            index = np.random.default_rng(turn).integers(0, n, 2 * n + 1)
            assert same_bits(w.gather(index), weights[index]), (name, n, k, kind)
            if np.isfinite(weights).all():
                for isa in ISAS:
                    set_isa(isa)
                    np.testing.assert_array_equal(
                        w.apply(np.eye(k, dtype=np.float32), exact=True).T, weights, err_msg=f"{name} {isa}"
                    )


# -- extremes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_extreme_scales_and_activations(name: str) -> None:
    """The least and largest words of every scale storage, subnormal ones too, with tokens from 2**-140 to 2**100."""
    fmt = format(name)
    n, k = shapes(fmt)[3]
    for seed in range(3):
        q = sample(fmt, n, k, seed=seed, kind="extreme")
        x = activations(24, k, seed) * np.ldexp(1.0, np.linspace(-140, 100, 24).astype(int))[:, None].astype(np.float32)
        w = linear(q)
        with np.errstate(over="ignore"):
            if not np.isfinite(dense(q)).all():
                continue
        int8, exact = expected_int8(q, x, None, w.rounding), expected_exact(q, x, None)
        for isa in ISAS:
            set_isa(isa)
            int8.check(w.apply(x), (name, isa))
            exact.check(w.apply(x, exact=True), (name, isa, "exact"))
            int8.check(w.apply(x[:5]), (name, isa))


@pytest.mark.parametrize("name", ["int4-g64", "mant4", "nf4", "fp4.25", "fp5.33", "uint4-g64", "e4m3", "pot3"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_stay_in_their_token(name: str, bad: float) -> None:
    q = sample(format(name), 37, 150, seed=5)
    x = activations(20, 150, 6)
    w = linear(q)
    for isa in ISAS:
        set_isa(isa)
        for exact in (False, True):
            for m in (3, 20):
                clean = w.apply(x[:m], exact=exact)
                for column in (0, 77, 149):
                    hurt = x[:m].copy()
                    hurt[1, column] = bad
                    y = w.apply(hurt, exact=exact)
                    others = np.arange(m) != 1
                    assert same_bits(y[others], clean[others]), (isa, exact, m, column)
                    assert not np.isfinite(y[1]).any(), (isa, exact, m, column)
                    if not exact:
                        assert np.isnan(y[1]).all()


@pytest.mark.parametrize("name", ["int4-g64", "mant4", "nf4", "fp4.25", "fp5.33", "uint4-g64", "e5m2", "pot3"])
def test_zero_activations_give_the_bias(name: str) -> None:
    q = sample(format(name), 37, 150, seed=5, kind="extreme")
    w = linear(q)
    bias = np.random.default_rng(0).standard_normal(37).astype(np.float32)
    for isa in ISAS:
        set_isa(isa)
        for m in (1, 12):
            for zero in (0.0, -0.0):
                x = np.full((m, 150), zero, dtype=np.float32)
                for exact in (False, True):
                    np.testing.assert_array_equal(w.apply(x, bias, exact), np.broadcast_to(bias, (m, 37)))
                    np.testing.assert_array_equal(w.apply(x, None, exact), np.zeros((m, 37), dtype=np.float32))


def test_codes_round_half_to_even() -> None:
    """Halves and their fp32 neighbours, for scales that are and are not powers of two."""
    fmt = format("int2-row")
    k = 64
    q = sample(fmt, 16, k, seed=0, kind="pow2")
    halves = np.arange(-63, 63) + 0.5
    rng = np.random.default_rng(0)
    rows = []
    for peak in (127, 127 * 0.73, 127 * 1.37e-5, 1.0, 3.1e8, 127 / 3):
        for nudge in (-1, 0, 1):
            values = (rng.choice(halves, (40, k)) * peak / 127).astype(np.float32)
            values = np.nextafter(values, np.float32(np.inf) * nudge) if nudge else values
            values[:, 5] = peak
            rows.append(values)
    x = np.concatenate(rows).astype(np.float32)
    w = linear(q)
    int8 = expected_int8(q, x, None, 0.0)
    for isa in ISAS:
        set_isa(isa)
        int8.check(w.apply(x), isa)
        int8.check(w.apply(x[:4]), isa)


# -- threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4-g64", "mant4", "fp5.33", "nf4", "uint4-g128"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    """Enough rows that a thread claims several blocks of rows at a time, and a last chunk that is short."""
    q = sample(format(name), 1093, 300, seed=3)
    x = activations(70, 300, 4)
    w = linear(q)
    expected_int8(q, x, None, w.rounding).check(w.apply(x), name)
    expected_exact(q, x, None).check(w.apply(x, exact=True), name)
    for isa in ISAS[1:] or ISAS:
        set_isa(isa)
        set_threads(1)
        alone = {(m, exact): w.apply(x[:m], exact=exact) for m in (1, 6, 70) for exact in (False, True)}
        for threads in (2, 3, 4, 1):
            set_threads(threads)
            for (m, exact), y in alone.items():
                for _ in range(5):
                    assert same_bits(w.apply(x[:m], exact=exact), y), (isa, threads, m, exact)


def test_several_callers_at_once() -> None:
    """Calls from many threads (ctypes lets go of the interpreter's lock) do not disturb each other."""
    set_threads(3)
    tensors = [sample(format(name), 200, 320, seed=i) for i, name in enumerate(["mant4", "int4-g64", "fp4.25", "nf4"])]
    layers = [linear(q) for q in tensors]
    x = activations(17, 320, 1)
    wanted = [w.apply(x) for w in layers]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(60):
            if not same_bits(layers[i].apply(x), wanted[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert wrong == []


def test_a_forked_process_can_go_on() -> None:
    """Workers do not survive a fork; the child must neither wait for them nor compute anything else."""
    set_threads(3)
    w = linear(sample(format("mant4"), 300, 256, seed=0))
    x = activations(9, 256, 0)
    y = w.apply(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(w.apply(x), y) and same_bits(w.apply(x[:1]), y[:1]) else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise AssertionError("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


# -- memory ---------------------------------------------------------------------------------------------------------------

FENCED = [
    "int4-g64", "mant4", "fp5.33", "fp4.25", "int2-g32", "int3-g48", "e2m2", "int6-g32@e3m3", "uint8-g64", "nf4-g64@u8",
    "int4-tensor", "mxfp4", "nvfp4", "bitmod3",
]  # fmt: skip


@pytest.mark.parametrize("side", ["front", "back"])
@pytest.mark.parametrize("name", FENCED)
def test_nothing_beyond_the_arrays_is_touched(name: str, side: str) -> None:
    """Planes, inputs and outputs border on forbidden pages; gaps between rows hold NaN going in and guard words coming out."""
    front = side == "front"
    fmt = format(name)
    for n, k in shapes(fmt)[1:5]:
        q = sample(fmt, n, k, seed=k)
        w = Linear(Planes(q, side))
        want = linear(q)
        bias = Fenced(np.random.default_rng(k).standard_normal(n).astype(np.float32), front)
        index = Fenced(np.arange(n)[::-1].copy(), front)
        rows = Fenced(np.full((n, k), POISON, np.uint32), front)
        error = b"\0" * 256
        assert w.lib.nf_gather(w.handle, index.address, n, rows.address, error) == 0
        assert same_bits(rows.array.view(np.float32)[::-1], q.dequantize().numpy())
        for m in (1, 3, 21):
            x = activations(m, k, m)
            for gap_x, gap_y in ((0, 0), (1, 3), (7, 16)):
                wide = np.full(m * (k + gap_x) - gap_x, np.nan, dtype=np.float32)
                strided(wide, m, k, k + gap_x)[...] = x
                source = Fenced(wide, front)
                for isa in ISAS:
                    set_isa(isa)
                    for exact in (False, True):
                        y = Fenced(np.full(m * (n + gap_y) - gap_y, POISON, dtype=np.uint32), front)
                        w.call(source.address, m, k + gap_x, y.address, n + gap_y, bias.address, int(exact))
                        got = strided(y.array.view(np.float32), m, n, n + gap_y)
                        assert same_bits(np.ascontiguousarray(got), want.apply(x, bias.array, exact)), (n, k, m, isa, exact)
                        got.view(np.uint32)[...] = POISON  # what is left is the gaps
                        assert (y.array == POISON).all(), (n, k, m, isa, exact)


def strided(flat: np.ndarray, m: int, width: int, stride: int) -> np.ndarray:
    """The rows [m, width] that lie `stride` apart in `flat`."""
    item = flat.itemsize
    return np.lib.stride_tricks.as_strided(flat, (m, width), (stride * item, item))


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_addresses_of_any_alignment(offset: int) -> None:
    """Arrays that begin at any element of a cache line, in fp32 and in bf16."""
    for name in ("mant4", "int4-g64", "fp5.33"):
        n, k, m = 33, 150, 11
        q = sample(format(name), n, k, seed=1)
        w = linear(q)
        x, bias = activations(m, k, 0), np.arange(n, dtype=np.float32)
        for isa in ISAS:
            set_isa(isa)
            for exact in (False, True):
                for bf16 in (False, True):
                    values = bf16_bits(x) if bf16 else x
                    source, b = shifted(values, offset), shifted(bias, offset)
                    out = shifted(np.zeros((m, n), dtype=np.uint16 if bf16 else np.float32), offset)
                    w.call(source.ctypes.data, m, k, out.ctypes.data, n, b.ctypes.data, int(exact), bf16)
                    np.testing.assert_array_equal(out, w.apply(values, bias, exact))


def shifted(values: np.ndarray, elements: int) -> np.ndarray:
    """A copy that starts `elements` past a multiple of 64 bytes."""
    buffer = np.empty(values.nbytes + 128, dtype=np.uint8)
    start = -buffer.ctypes.data % 64 + elements * values.itemsize
    out = buffer[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


# -- bf16 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4-g64", "mant4", "nf4", "fp4.25", "fp5.33", "pot2", "uint4-g64"])
def test_bf16_is_fp32_rounded_once(name: str) -> None:
    """bf16 in and out: the fp32 result for the same values, rounded to nearest, ties to even."""
    q = sample(format(name), 35, 200, seed=8)
    w = linear(q)
    bits = bf16_bits(activations(40, 200, 9))
    bias = np.random.default_rng(1).standard_normal(35).astype(np.float32)
    for isa in ISAS:
        set_isa(isa)
        for exact in (False, True):
            for m in (0, 1, 5, 40):
                got = w.apply(bits[:m], bias, exact)
                np.testing.assert_array_equal(got, bf16_bits(w.apply(from_bf16_bits(bits[:m]), bias, exact)))
    hurt = bits[:3].copy()
    hurt[1, 7] = 0x7FC0
    y = from_bf16_bits(w.apply(hurt))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


# -- formats nobody has named ---------------------------------------------------------------------------------------------


@st.composite
def formats(draw: st.DrawFn) -> tuple[Format, int]:
    """A format of random parts and a row length that it can hold."""
    bits = draw(st.integers(1, 8))
    zero = draw(st.integers(0, 5)) == 0
    count = 1 if zero else draw(st.one_of(st.just(1), st.just(2), st.integers(1, min(31, 512 >> bits))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    style = draw(st.sampled_from(["floats", "integers", "special", "shared"]))
    if zero:
        grids: tuple[Grid, ...] = (Grid("u", tuple(float(i) for i in range(1 << bits))),)
    elif style == "shared" and bits >= 3:
        e = int(rng.integers(1, bits - 1)) if bits > 3 else 1
        grids, count = shared_mantissa(min(e, 4), bits - 1 - min(e, 4) + 1), 2
    else:
        grids = tuple(Grid(f"m{m}", _levels(rng, bits, style)) for m in range(count))
    k = draw(st.integers(1, 300))
    block = draw(st.one_of(st.integers(1, k), st.sampled_from(["row", "tensor"]), st.sampled_from([16, 32, 64, 128])))
    store = draw(st.sampled_from(["fp16", "bf16", "e8m0"] if block == "tensor" else list(STORES)))
    if isinstance(block, str) and STORES[store].parent == "row":
        store = "fp16"
    if isinstance(block, int):
        k = max(k, block)
    unit = draw(st.one_of(st.sampled_from(["block", "block", 3, 4, 8, 16]), st.integers(1, 70)))
    if len(grids) > 1 and block == "tensor":
        unit = draw(st.sampled_from([4, 3, 7, "tensor"]))
    elif len(grids) > 1 and STORES[store].parent != "row" and draw(st.integers(0, 6)) == 0:
        unit = "tensor"
    if isinstance(unit, int) and isinstance(block, int):
        unit = min(unit, block)
    if block == "tensor" and unit == "block" and len(grids) > 1:
        unit = 4
    scale = Scale(store, STORES[store].parent, STORES[store].cap)
    return Format("drawn", bits, grids, unit=unit, block=block, scale=scale, zero=zero), k


def _levels(rng: np.random.Generator, bits: int, style: str) -> tuple[float, ...]:
    values = rng.integers(-127, 128, 1 << bits) if style == "integers" else rng.standard_normal(1 << bits)
    out = [float(np.float32(v)) for v in values]
    if style == "special":
        for bad in (np.nan, np.inf, -np.inf, 0.0):
            out[rng.integers(0, len(out))] = float(bad)
    if not any(np.isfinite(v) and v != 0 for v in out):
        out[-1] = 1.5
    return tuple(out)


REFUSALS = ("have no kernel",)  # families too large for a decode table


@settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    drawn=formats(),
    n=st.integers(1, 50),
    m=st.integers(0, 70),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["plain", "plain", "extreme"]),
)
def test_formats_of_random_parts(drawn: tuple[Format, int], n: int, m: int, seed: int, kind: str) -> None:
    fmt, k = drawn
    q = sample(fmt, n, k, seed, kind)
    with np.errstate(over="ignore"):
        if not np.isfinite(dense(q)).all():
            return
    try:
        w = linear(q)
    except Refused as refusal:
        assert any(word in str(refusal) for word in REFUSALS), refusal
        return
    set_isa(ISAS[seed % len(ISAS)])
    x = activations(m, k, seed)
    bias = np.linspace(-1, 1, n, dtype=np.float32)
    y = w.apply(x, bias)
    expected_int8(q, x, bias, w.rounding).check(y, "int8")
    expected_exact(q, x, bias).check(w.apply(x, bias, exact=True), "exact")
    set_isa(BEST)
    set_threads(2)
    assert same_bits(w.apply(x, bias), y)
    if m:
        assert same_bits(w.apply(x[m // 2 : m // 2 + 1], bias), y[m // 2 : m // 2 + 1])
    # the sign of a zero is nobody's promise: families that differ in it alone are equal and share the reference's tables
    assert np.array_equal(w.gather(np.arange(n)), q.dequantize().numpy())
