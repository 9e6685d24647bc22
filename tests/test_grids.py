"""Every level of every type, against independent sources: ml_dtypes, gfloat, gguf, formulas, and solvers written here.

Nothing below calls numfit's own generators to make its expectations.
"""

from __future__ import annotations

import math

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
import torch

from numfit.formats import bases, format
from numfit.formats.grid import ranked
from numfit.formats.scale import Scale, from_word, to_word


def levels(name: str, member: int = 0) -> np.ndarray:
    return np.array(format(name).members[member].levels, dtype=np.float64)


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values[: len(values) // 2], values[len(values) // 2 :]


# -- floats -----------------------------------------------------------------------------------------------------------


def float_value(e: int, m: int, code: int) -> float:
    """An eXmY code, field by field: all codes are numbers, bias 2**(e-1) - 1 but at least 1."""
    sign, exponent, mantissa = code >> (e + m), code >> m & (1 << e) - 1, code & (1 << m) - 1
    bias = max(1, 2 ** (e - 1) - 1)
    value = mantissa / 2**m * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 2**m) * 2.0 ** (exponent - bias)
    return -value if sign else value


MINIFLOATS = [(e, m) for e in range(1, 6) for m in range(7) if 2 <= 1 + e + m <= 8]


@pytest.mark.parametrize(("e", "m"), MINIFLOATS)
def test_minifloat_fields(e: int, m: int) -> None:
    expected = np.array([float_value(e, m, code) for code in range(1 << (1 + e + m))])
    found = levels(f"e{e}m{m}")
    numbers = np.isfinite(found)
    assert (found[numbers] == expected[numbers]).all()
    ocp_specials = {(4, 3): 2, (5, 2): 8}  # NaN of e4m3; Inf and NaN of e5m2
    assert (~numbers).sum() == ocp_specials.get((e, m), 0)


ML_DTYPES = {
    "e2m1": "float4_e2m1fn", "e2m3": "float6_e2m3fn", "e3m2": "float6_e3m2fn", "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2", "fp4": "float4_e2m1fn", "fp6": "float6_e2m3fn", "fp8": "float8_e4m3fn",
    "mxfp4": "float4_e2m1fn", "mxfp6-e2m3": "float6_e2m3fn", "mxfp6-e3m2": "float6_e3m2fn",
    "mxfp8-e4m3": "float8_e4m3fn", "mxfp8-e5m2": "float8_e5m2", "nvfp4": "float4_e2m1fn",
    "nvfp4-4over6": "float4_e2m1fn", "int2": "int2", "int4": "int4", "int8": "int8", "nvint4": "int4", "uint2": "uint2",
    "uint4": "uint4", "uint8": "uint8",
}  # fmt: skip


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_against_ml_dtypes(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, ML_DTYPES[name], ML_DTYPES[name]))
    found = levels(name)
    expected = np.arange(len(found), dtype=np.uint8).view(dtype).astype(np.float64)
    np.testing.assert_array_equal(found, expected)


GFLOAT = {
    "e2m1": gf.format_info_ocp_e2m1, "e2m3": gf.format_info_ocp_e2m3, "e3m2": gf.format_info_ocp_e3m2,
    "e4m3": gf.format_info_ocp_e4m3, "e5m2": gf.format_info_ocp_e5m2, "mxint8": gf.format_info_ocp_int8,
}  # fmt: skip


@pytest.mark.parametrize("name", GFLOAT)
def test_every_code_against_gfloat(name: str) -> None:
    found = levels(name)
    np.testing.assert_array_equal(found, gfloat.decode_ndarray(GFLOAT[name], np.arange(len(found))))


def test_e1mx_is_uniform() -> None:
    np.testing.assert_array_equal(levels("e1m2")[:8] * 2, np.arange(8) / 2)
    np.testing.assert_array_equal(levels("e1m1")[:4], [0, 0.5, 1, 1.5])


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits: int) -> None:
    signed = [int.from_bytes(code.to_bytes(1, "little"), "little") for code in range(1 << bits)]
    signed = [code - (1 << bits) if code >> (bits - 1) else code for code in signed]
    np.testing.assert_array_equal(levels(f"int{bits}"), signed)
    emitted = [level for level, _ in ranked(format(f"int{bits}").members[0])]
    half = 2 ** (bits - 1) - 1
    assert emitted == list(range(-half, half + 1))  # narrow range
    np.testing.assert_array_equal(levels(f"uint{bits}"), np.arange(1 << bits))


def test_mx_integers_are_fractions() -> None:
    np.testing.assert_array_equal(levels("mxint8") * 64, levels("int8"))
    np.testing.assert_array_equal(levels("mxint4") * 4, levels("int4"))


# -- tables -----------------------------------------------------------------------------------------------------------


def quantile_float(bits: int) -> np.ndarray:
    """NF levels by torch's inverse normal distribution, in float64."""
    off = (1 / 32 + 1 / 30) / 2
    half = 2 ** (bits - 1)
    low = torch.special.ndtri(torch.linspace(off, 0.5, half, dtype=torch.float64))
    high = torch.special.ndtri(torch.linspace(0.5, 1 - off, half + 1, dtype=torch.float64))[1:]
    both = torch.cat([low, high])
    return (both / both.abs().max()).numpy()


def test_normal_float() -> None:
    np.testing.assert_allclose(levels("nf3"), quantile_float(3), atol=1e-12)
    np.testing.assert_allclose(levels("nf4"), quantile_float(4), atol=2e-7)  # the QLoRA table went through fp32
    published = np.float32([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ])  # fmt: skip
    np.testing.assert_array_equal(levels("nf4").astype(np.float32), published)


def test_iq4nl_against_gguf() -> None:
    quants = pytest.importorskip("gguf.quants")
    np.testing.assert_array_equal(levels("iq4nl"), quants.IQ4_NL.kvalues)


def lloyd_max(bits: int) -> tuple[np.ndarray, float]:
    """Newton's method on the centroid conditions of N(0,1): (positive half, squared error)."""
    n = 2 ** (bits - 1)

    def centroids(c: torch.Tensor) -> torch.Tensor:
        edges = torch.cat([torch.zeros(1, dtype=c.dtype), (c[1:] + c[:-1]) / 2, torch.full((1,), 40.0, dtype=c.dtype)])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = -torch.special.erfc(edges / math.sqrt(2)).diff() / 2
        return -density.diff() / mass

    c = torch.linspace(0.2, 2.6, n, dtype=torch.float64)
    for _ in range(200):
        c = centroids(c)  # Lloyd's iteration, to come near
    for _ in range(20):
        jacobian = torch.autograd.functional.jacobian(lambda x: x - centroids(x), c)
        c = c - torch.linalg.solve(jacobian, c - centroids(c))
    assert float((c - centroids(c)).abs().max()) < 1e-12
    edges = torch.cat([torch.zeros(1, dtype=c.dtype), (c[1:] + c[:-1]) / 2, torch.full((1,), 40.0, dtype=c.dtype)])
    mass = -torch.special.erfc(edges / math.sqrt(2)).diff() / 2
    return c.numpy(), float(1 - 2 * (mass * c * c).sum())


@pytest.mark.parametrize(
    ("bits", "error"), [(2, 0.117482), (3, 0.034548), (4, 0.009501), (5, 0.002505), (6, 0.000644)]
)
def test_lloyd_max(bits: int, error: float) -> None:
    half, squared = lloyd_max(bits)
    np.testing.assert_allclose(levels(f"lm{bits}"), np.concatenate([-half[::-1], half]), atol=1e-6)
    assert squared == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("name", ["nf3", "nf4", "iq4nl", "lm2", "lm3", "lm4", "lm5", "lm6"])
def test_tables_ascend_with_the_code(name: str) -> None:
    assert (np.diff(levels(name)) > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_powers_of_two(bits: int) -> None:
    for name in (f"pot{bits}", f"pot{bits}-log"):
        positive, negative = halves(levels(name))
        np.testing.assert_array_equal(positive, [2.0**i for i in range(2 ** (bits - 1))])
        np.testing.assert_array_equal(negative, -positive)


def test_flint_by_leading_zeros() -> None:
    expected = []
    for code in range(8):
        if code < 4:
            expected.append(code)
        elif code == 4:
            expected.append(2**4)
        else:  # r = lower two bits, z leading zeros in two bits, the rest is mantissa
            r = code & 3
            z = 2 - r.bit_length()
            p = 1 - z
            expected.append(2 ** (2 + z) * (1 + (r % 2**p) / 2**p))
    assert sorted(expected) == [0, 1, 2, 3, 4, 6, 8, 16]
    positive, negative = halves(levels("flint4"))
    np.testing.assert_array_equal(positive, sorted(expected))
    np.testing.assert_array_equal(negative, -positive)


def test_apot_is_all_sums_of_two_powers() -> None:
    sums = sorted(a + b for a in (0, 2**-1, 2**-2, 2**-4) for b in (0, 2**-3))
    positive, negative = halves(levels("apot4"))
    np.testing.assert_array_equal(positive, sums)
    np.testing.assert_array_equal(negative, -positive)


# -- M-ANT ------------------------------------------------------------------------------------------------------------

COEFFICIENTS = (0, 5, 10, 17, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120)


def same_up_to_power_of_two(found: np.ndarray, raw: np.ndarray) -> bool:
    factor = found[-1] / raw[-1]
    return math.frexp(factor)[0] == 0.5 and bool((found == raw * factor).all())


def check_mant(found: np.ndarray, a: int, bits: int) -> None:
    raw = np.array([a * i + 2**i for i in range(2 ** (bits - 1))], dtype=np.float64)
    positive, negative = halves(found)
    assert same_up_to_power_of_two(positive, raw)
    np.testing.assert_array_equal(negative, -positive)
    assert 4 <= positive[-1] < 8  # members share one range, so that short scales fit all of them


def check_int_member(found: np.ndarray, bits: int) -> None:
    positive, negative = halves(found)
    assert same_up_to_power_of_two(positive, np.arange(2.0 ** (bits - 1)))
    np.testing.assert_array_equal(negative, -positive)


@pytest.mark.parametrize(
    ("name", "bits", "coefficients"),
    [("mant4", 4, COEFFICIENTS), ("mant4s", 4, (4, 7, 13, 18, 27, 44, 93)), ("mant3", 3, (0, 1, 2, 4, 6, 8, 12))],
)
def test_mant_family(name: str, bits: int, coefficients: tuple[int, ...]) -> None:
    members = format(name).members
    assert len(members) == len(coefficients) + 1
    for m, a in enumerate(coefficients):
        check_mant(levels(name, m), a, bits)
    check_int_member(levels(name, len(coefficients)), bits)
    emitted = {code for _, code in ranked(members[-1])}
    assert 1 << (bits - 1) not in emitted  # minus zero of the integer member
    assert len(emitted) == 2**bits - 1


def test_mant_17_conformance() -> None:
    positive, _ = halves(levels("mant4", COEFFICIENTS.index(17)))
    np.testing.assert_array_equal(positive / positive[0], [1, 19, 38, 59, 84, 117, 166, 247])
    normal = {
        0: ".0078 .0156 .0312 .0625 .125 .25 .5 1",
        17: ".0040 .0769 .1538 .2389 .3401 .4737 .6721 1",
        60: ".0018 .1131 .2263 .3431 .4672 .6058 .7737 1",
        120: ".0010 .1260 .2521 .3802 .5124 .6529 .8099 1",
    }
    for a, text in normal.items():
        positive, _ = halves(levels("mant4", COEFFICIENTS.index(a)))
        np.testing.assert_allclose(positive / positive[-1], [float(v) for v in text.split()], atol=6e-5)


def test_mantsv4_special_values() -> None:
    fmt = format("mantsv4")
    assert len(fmt.members) == 31 and fmt.member_bits == 5
    for m in range(30):
        found = levels("mantsv4", m)
        plain = found.copy()
        plain[8] = -found[0]
        check_mant(plain, COEFFICIENTS[m // 2], 4)
        midpoint = (found[7] + found[6]) / 2
        assert found[8] == (midpoint if m % 2 == 0 else -midpoint)
    check_int_member(levels("mantsv4", 30), 4)


# -- AMS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["fp4.25", "fp5.33", "ams-e2m1k4", "ams-e3m2k3", "ams-e3m1k5", "ams-e1m3k2", "ams-e4m3k8", "ams-e2m5k2"]
)
def test_prefix_and_shared_bit_make_the_full_code(name: str) -> None:
    full = {"fp4.25": "ams-e2m2k4", "fp5.33": "ams-e2m3k3"}.get(name, name)
    e, m, k = int(full[5]), int(full[7]), int(full[9:])
    fmt = format(name)
    assert (fmt.bits, fmt.unit, len(fmt.members), fmt.member_bits) == (e + m, k, 2, 1)
    for shared in (0, 1):
        expected = [float_value(e, m, prefix << 1 | shared) for prefix in range(1 << (e + m))]
        np.testing.assert_array_equal(levels(name, shared), expected)
    assert 0.0 in levels(name, 0) and 0.0 not in levels(name, 1)


def test_lsb_zero_of_e2m3_is_e2m2() -> None:
    np.testing.assert_array_equal(levels("fp5.33", 0), levels("e2m2"))
    np.testing.assert_array_equal(levels("fp4.25", 0), levels("e2m1"))


# -- other families ---------------------------------------------------------------------------------------------------

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("name", "half", "specials"),
    [("bitmod3", [0, 1, 2, 4], (3, -3, 6, -6)), ("bitmod4", E2M1, (5, -5, 8, -8)), ("razer4", E2M1, (5, 8, -5, -8))],
)
def test_special_values(name: str, half: list[float], specials: tuple[int, ...]) -> None:
    fmt = format(name)
    assert len(fmt.members) == 4
    for m, special in enumerate(specials):
        expected = [*half, special, *(-v for v in half[1:])]
        np.testing.assert_array_equal(levels(name, m), expected)
        assert fmt.members[m].max_level == max(half[-1], abs(special))
        assert len(ranked(fmt.members[m])) == 2**fmt.bits  # no code is wasted


def test_if4() -> None:
    np.testing.assert_array_equal(levels("if4", 0), [float_value(2, 1, c) for c in range(16)])
    magnitudes = np.array([i * 6 / 7 for i in range(8)])
    positive, negative = halves(levels("if4", 1))
    np.testing.assert_allclose(positive, magnitudes, rtol=1e-15)
    np.testing.assert_array_equal(negative, -positive)
    assert format("if4").members[0].max_level == format("if4").members[1].max_level == 6


def test_ant4() -> None:
    fmt = format("ant4")
    shapes = [np.arange(8.0), [0, 1, 2, 3, 4, 6, 8, 16], [0, 1, 2, 4, 8, 16, 32, 64], E2M1]
    assert len(fmt.members) == 4
    for m, raw in enumerate(shapes):
        positive, negative = halves(levels("ant4", m))
        assert same_up_to_power_of_two(positive, np.array(raw, dtype=np.float64))
        np.testing.assert_array_equal(negative, -positive)


def test_dynfp4_candidates() -> None:
    fmt = format("dynfp4")
    assert (len(fmt.members), fmt.palette, fmt.member_bits) == (96, 16, 4)
    found = {tuple(g.levels) for g in fmt.members}
    assert len(found) == 96  # no two candidates are the same
    layouts = {tuple(g.levels[:8]) for g in fmt.members}
    assert len(layouts) == 4
    for half in layouts:
        remaps = sorted(g.levels[8] / half[-1] for g in fmt.members if tuple(g.levels[:8]) == half)
        assert len(remaps) == 24 and remaps == pytest.approx([-v for v in reversed(remaps)])
        for g in fmt.members:
            if tuple(g.levels[:8]) == half:
                assert g.levels[9:] == tuple(-v for v in half[1:])


# -- what holds for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(bases()))
def test_emitted_codes(name: str) -> None:
    fmt = format(name)
    for grid in fmt.members:
        assert len(grid.levels) == 2**fmt.bits
        pairs = ranked(grid)
        values = [level for level, _ in pairs]
        assert values == sorted(set(values)) and all(map(math.isfinite, values))
        for level, code in pairs:
            assert grid.levels[code] == level and code not in grid.never
            assert code == min(c for c, v in enumerate(grid.levels) if v == level and c not in grid.never)
            assert not (level == 0 and math.copysign(1, level) < 0)
        assert grid.max_level == max(map(abs, values))
        assert grid.symmetric == (values == [-v for v in reversed(values)])


# -- scale words ------------------------------------------------------------------------------------------------------


def test_every_e8m0_word() -> None:
    words = np.arange(256, dtype=np.uint8)
    found, _ = from_word(Scale("e8m0"), torch.from_numpy(words), 0)
    np.testing.assert_array_equal(found.numpy(), words.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    theirs = gfloat.decode_ndarray(gf.format_info_ocp_e8m0, words)
    np.testing.assert_array_equal(found.numpy(), theirs.astype(np.float32))
    back = to_word(Scale("e8m0"), found[:255], None, 0)
    np.testing.assert_array_equal(back.numpy(), words[:255])


def test_every_e4m3_word() -> None:
    words = torch.arange(127, dtype=torch.uint8)
    expected = words.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found, _ = from_word(Scale("e4m3", "tensor"), words.view(torch.float8_e4m3fn), 0)
    np.testing.assert_array_equal(found.numpy(), expected)
    for member in (0, 1):  # the sign bit carries the member and never alters the scale
        word = to_word(Scale("e4m3", "tensor"), found, torch.full((127,), member, dtype=torch.uint8), 1)
        np.testing.assert_array_equal(word.numpy(), words.numpy() | member << 7)
        scale, back = from_word(Scale("e4m3", "tensor"), word, 1)
        np.testing.assert_array_equal(scale.numpy(), expected)
        assert (back == member).all()


def e3m3_value(word: int) -> float:
    exponent, mantissa = word >> 3, word & 7
    return mantissa * 2.0**-5 if exponent == 0 else 2.0 ** (exponent - 3) * (1 + mantissa / 8)


def test_every_e3m3_word() -> None:
    values = [e3m3_value(word) for word in range(64)]
    assert values == sorted(values) and values[1] == 2.0**-5 and values[-1] == 30.0
    words = torch.arange(64, dtype=torch.uint8)
    found, _ = from_word(Scale("e3m3", "row"), words, 0)
    np.testing.assert_array_equal(found.numpy(), values)
    np.testing.assert_array_equal(to_word(Scale("e3m3", "row"), found, None, 0).numpy(), words.numpy())
    for member in range(4):  # RaZeR: two bits beside the six
        word = to_word(Scale("e3m3", "tensor"), found, torch.full((64,), member, dtype=torch.uint8), 2)
        np.testing.assert_array_equal(word.numpy(), words.numpy() | member << 6)
        scale, back = from_word(Scale("e3m3", "tensor"), word, 2)
        np.testing.assert_array_equal(scale.numpy(), values)
        assert (back == member).all()


@pytest.mark.parametrize(("store", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_every_positive_half_word(store: str, dtype: torch.dtype, spare: int) -> None:
    top = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))
    words = torch.arange(2 if spare == 2 else 1, top + 1, 2 if spare == 2 else 1, dtype=torch.int32).to(torch.int16)
    values = words.view(dtype)
    for member in range(1 << spare):
        index = torch.full(words.shape, member, dtype=torch.uint8)
        word = to_word(Scale(store), values.float(), index if spare else None, spare)
        scale, back = from_word(Scale(store), word, spare)
        assert torch.equal(scale, values.float())
        assert back is None if spare == 0 else bool((back == member).all())
        if spare == 1:
            expected = words if member == 0 else words | -32768
        elif spare == 2:
            expected = (words | member & 1) | (-32768 if member >> 1 else 0)
        else:
            expected = words
        assert torch.equal(word.view(torch.int16), expected)
