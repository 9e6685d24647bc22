"""Encode and decode: every code of every type, ties, nearest by brute force, and the tensor that holds the planes.

Planes are laid out here by hand (streams as one big integer, words by ml_dtypes), so decoding is checked against the
description of the file and not against numfit's own packing.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numfit.errors import CheckpointError, FormatError
from numfit.formats import Format, Params, QuantizedTensor, bases, decode, encode, format, quantize_tensor
from numfit.formats.grid import ranked

FIXED = [name for name in bases() if not format(name).learned]  # the others' levels are no part of the format: test_learned.py
NAMES = [
    *FIXED, "mant4-g32@e3m3", "mant4-g64@u8", "ams-e2m2k4-g128", "fp5.33-g64@bf16", "razer4-g64@fp16",
    "razer4-g16@e4m3", "razer4-g32@bf16", "if4-g32@fp16", "nf4-g64@bf16", "int4-tensor", "uint4-tensor@bf16",
    "uint3-g16@e3m3", "fp4.25-tensor", "ant4-g32@e4m3", "int6-g32@e8m0", "ams-e4m3k5-g16@u8", "mantsv4-g16@e3m3",
]  # fmt: skip


def put(values: list[int], bits: int) -> list[int]:
    """LSB-first stream of one row, as a list of bytes."""
    number = sum(value << i * bits for i, value in enumerate(values))
    return list(number.to_bytes(-(-len(values) * bits // 8), "little"))


def rows_of(values: np.ndarray, bits: int) -> torch.Tensor:
    return torch.tensor([put(row, bits) for row in values.tolist()], dtype=torch.uint8)


def scale_words(fmt: Format, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(words as unsigned integers, the numbers they stand for): odd scales, spread over the range."""
    i = np.arange(count)
    store = fmt.scale.store
    if store in ("fp16", "bf16"):
        step = 2 if fmt.spare == 2 else 1  # two merged bits take the sign and the last mantissa bit
        words = ((0x2E67 if store == "fp16" else 0x3CD1) + 37 * i) // step * step
        dtype = np.float16 if store == "fp16" else ml_dtypes.bfloat16
        return words, words.astype(np.uint16).view(dtype).astype(np.float32)
    if store == "e8m0":
        words = 120 + i % 14
        return words, words.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    if store == "e4m3":
        words = 1 + 29 * i % 126
        return words, words.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if store == "u8":
        words = 1 + 53 * i % 255
        return words, words.astype(np.float32)
    words = 1 + 11 * i % 63
    exponent, mantissa = words >> 3, words & 7
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 3), mantissa / 32)
    return words, value.astype(np.float32)


def merge(fmt: Format, word: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Member indices in the spare bits of the scale word."""
    store = fmt.scale.store
    if store in ("fp16", "bf16"):
        return word | (member >> 1) << 15 | member & 1 if fmt.spare == 2 else word | member << 15
    return word | member << {"e4m3": 7, "e3m3": 6}[store]


@dataclasses.dataclass
class Hand:
    """A tensor laid out by hand, and the parts of its formula: one entry per weight [R, K]."""

    tensor: QuantizedTensor
    codes: np.ndarray
    member: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def by_hand(fmt: Format, rows: int, k: int, codes: np.ndarray, choose: np.ndarray, palette: list[int] | None) -> Hand:
    """`codes` [rows, k]; `choose` [rows, units] of members, or [1, 1] for one member per tensor."""
    block = k if isinstance(fmt.block, str) else min(fmt.block, k)
    unit = block if isinstance(fmt.unit, str) else min(fmt.unit, block)
    block_of = np.arange(k) // block
    starts = [s + u for s in range(0, k, block) for u in range(0, min(block, k - s), unit)]
    unit_of = np.searchsorted(starts, np.arange(k), side="right") - 1
    blocks = block_of[-1] + 1
    one = fmt.block == "tensor"
    words, numbers = scale_words(fmt, 1 if one else rows * blocks)
    words, numbers = (v.reshape(1, 1) if one else v.reshape(rows, blocks) for v in (words, numbers))
    wide = np.broadcast_to
    member = wide(choose, (rows, k)) if choose.size == 1 else choose[:, unit_of]
    planes = {"codes": rows_of(codes, fmt.bits)}
    merged = merge(fmt, words, wide(choose, words.shape)) if fmt.spare else words
    store = fmt.scale.store
    if store in ("fp16", "bf16"):
        word = torch.from_numpy(merged.astype(np.uint16).view(np.int16))
        planes["scale"] = word if fmt.spare else word.view(torch.float16 if store == "fp16" else torch.bfloat16)
    elif store == "e3m3" and not fmt.spare:
        planes["scale"] = rows_of(merged, 6)
    else:
        byte = torch.from_numpy(merged.astype(np.uint8))
        planes["scale"] = byte.view(torch.float8_e4m3fn) if store == "e4m3" and not fmt.spare else byte
    if one:
        planes["scale"] = planes["scale"].view(1)
    if fmt.member_bits and not fmt.spare:
        one_member = torch.tensor([int(choose.flat[0])], dtype=torch.uint8)
        planes["member"] = one_member if fmt.unit == "tensor" else rows_of(choose, fmt.member_bits)
    zero = np.zeros((1, 1), dtype=np.int64)
    if fmt.zero:
        zero = (np.arange(words.size) * 5 % 2**fmt.bits).reshape(words.shape)
        planes["zero"] = torch.tensor([int(zero[0, 0])], dtype=torch.uint8) if one else rows_of(zero, fmt.bits)
    parent = np.ones((1, 1), dtype=np.float32)
    if fmt.scale.parent == "row":
        parent = (0.0123 * (1 + np.arange(rows))).astype(np.float16).astype(np.float32)[:, None]
        planes["parent"] = torch.from_numpy(parent[:, 0]).half()
    elif fmt.scale.parent == "tensor":
        parent = np.float32([[0.00371]])
        planes["parent"] = torch.from_numpy(parent[0])
    if palette:
        planes["palette"] = torch.tensor(palette, dtype=torch.uint8)
        member = np.array(palette)[member]
    per_weight = [wide(v, words.shape)[:, block_of] if not one else wide(v, (1, 1)) for v in (numbers, zero)]
    scale = wide(per_weight[0], (rows, k)) * wide(parent, (rows, 1))  # rounded once to fp32
    tensor = QuantizedTensor.from_planes(fmt, (rows, k), planes)
    return Hand(tensor, codes, member, scale.astype(np.float32), wide(per_weight[1], (rows, k)))


def all_codes(fmt: Format) -> list[Hand]:
    """Tensors that together hold every code of every member, with short last blocks."""
    block = fmt.block if isinstance(fmt.block, int) else 20
    k = 2 * block + max(1, block // 3)
    turns = -(-(2**fmt.bits) // k)
    members = fmt.palette or len(fmt.members)
    whole = fmt.unit == "tensor" and members > 1
    rows = turns if whole else turns * members
    turn = np.arange(rows) if whole else np.arange(rows) // members
    codes = (turn[:, None] * k + np.arange(k)) % 2**fmt.bits
    units = fmt.geometry(k).units
    out = []
    palettes = [list(range(p, len(fmt.members), 6)) for p in range(6)] if fmt.palette else [None]
    for palette in palettes:
        if whole:
            out += [by_hand(fmt, rows, k, codes, np.array([[m]]), palette) for m in range(members)]
        else:
            choose = np.broadcast_to((np.arange(rows) % members)[:, None], (rows, units))
            out.append(by_hand(fmt, rows, k, codes, np.ascontiguousarray(choose), palette))
    mixed = np.random.default_rng(3).integers(0, members, (rows, units))
    if not whole:
        out.append(by_hand(fmt, rows, k, codes[:, ::-1].copy(), mixed, palettes[0]))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes(name: str) -> None:
    fmt = format(name)
    table = np.array([grid.levels for grid in fmt.members], dtype=np.float32)
    seen = set()
    for hand in all_codes(fmt):
        with np.errstate(invalid="ignore"):
            expected = (table[hand.member, hand.codes] - hand.zero.astype(np.float32)) * hand.scale
        np.testing.assert_array_equal(hand.tensor.dequantize().numpy(), expected)
        seen |= set(zip(hand.member.flatten().tolist(), hand.codes.flatten().tolist()))
    assert len(seen) == len(fmt.members) << fmt.bits  # every code of every member was there


@pytest.mark.parametrize("name", NAMES)
def test_encode_of_decode_is_the_identity(name: str) -> None:
    fmt = format(name)
    emitted = [{code: level for level, code in ranked(grid)} for grid in fmt.members]
    for hand in all_codes(fmt):
        fixed = np.array(
            [[c if c in emitted[m] else min(emitted[m]) for c, m in zip(*row)] for row in zip(hand.codes, hand.member)]
        )
        _, params = hand.tensor.params()
        w = decode(fmt, torch.from_numpy(fixed).to(torch.uint8), params)
        np.testing.assert_array_equal(encode(fmt, w, params).numpy(), fixed)


# -- nearest ----------------------------------------------------------------------------------------------------------

ONE_MEMBER = [
    "int2", "int4", "int8", "e1m1", "e2m1", "e3m0", "e2m3", "e4m3", "e5m2", "nf3", "nf4", "iq4nl", "lm3", "pot2",
    "pot4", "pot3-log", "apot4", "flint4", "mxfp4", "mxint8", "nvfp4", "uint2", "uint4", "uint8",
]  # fmt: skip
FAMILIES = ["mant4", "mant3", "mantsv4", "fp4.25", "fp5.33", "bitmod3", "razer4", "if4", "ant4"]


def fixed_params(fmt: Format, scale: float, member: int, zero: int) -> Params:
    """One row of one block."""
    parent = torch.ones(1, 1) if fmt.scale.parent else None
    return Params(
        torch.tensor([[scale]]),
        parent,
        torch.tensor([[member]], dtype=torch.uint8) if len(fmt.members) > 1 else None,
        torch.tensor([[float(zero)]]) if fmt.zero else None,
    )


def one_block(name: str) -> Format:
    """The type with one block and one unit per row, whatever its scale storage."""
    return dataclasses.replace(format(name), block=1 << 20, unit="block")


weights = st.floats(-1e4, 1e4, width=32, allow_subnormal=True)
scales = st.one_of(st.sampled_from([1.0, 0.5, 3.0, 1 / 3, 0.1, 1e-4, 7.77e-3]), st.floats(2.0**-17, 10, width=32))
names = st.sampled_from(ONE_MEMBER + FAMILIES)


@settings(max_examples=400, deadline=None)
@given(name=names, scale=scales, w=st.lists(weights, min_size=1, max_size=40), data=st.data())
def test_nearest_by_brute_force(name: str, scale: float, w: list[float], data: st.DataObject) -> None:
    fmt = one_block(name)
    member = data.draw(st.integers(0, len(fmt.members) - 1))
    zero = data.draw(st.integers(0, 2**fmt.bits - 1)) if fmt.zero else 0
    scale = float(np.float32(scale))
    params = fixed_params(fmt, scale, member, zero)
    x = torch.tensor([w], dtype=torch.float32)
    codes = encode(fmt, x, params)[0].tolist()
    emitted = {code: level for level, code in ranked(fmt.members[member])}
    levels = np.array(list(emitted.values())) - zero
    for code, value in zip(codes, x[0].tolist()):
        u = value / scale
        chosen = emitted[code] - zero
        if fmt.rounding == "log" and u != 0:
            assert chosen * u > 0  # the sign is kept, and the exponent is the nearest
            distance = np.abs(np.log2(np.abs(levels[levels * u > 0])) - math.log2(abs(u)))
            assert abs(math.log2(abs(chosen)) - math.log2(abs(u))) <= distance.min() + 1e-6
        else:
            slack = 2.0**-22 * (abs(u) + abs(chosen) + zero)  # the division and the thresholds are fp32
            assert abs(chosen - u) <= np.abs(levels - u).min() + slack


def check_edge(fmt: Format, member: int, u: float, code: int) -> None:
    found = encode(fmt, torch.tensor([[u]], dtype=torch.float32), fixed_params(fmt, 1.0, member, 0))
    assert int(found) == code, (fmt.name, fmt.members[member].name, u)


@pytest.mark.parametrize("name", FIXED)
def test_ties(name: str) -> None:
    """At a midpoint that fp32 holds exactly the rule decides; one ulp to either side the nearer level wins."""
    fmt = one_block(name)
    if fmt.palette:
        fmt = dataclasses.replace(fmt, palette=0)
    ties = 0
    for m, grid in enumerate(fmt.members):
        pairs = ranked(grid)
        for (low, low_code), (high, high_code) in pairwise(pairs):
            geometric = fmt.rounding == "log" and low * high > 0
            middle = math.copysign(math.sqrt(low * high), low) if geometric else (low + high) / 2
            edge = np.float32(middle)
            exact = float(edge) == middle
            if exact and fmt.rounding == "down":
                check_edge(fmt, m, edge, low_code)
            elif exact and fmt.rounding == "even":
                check_edge(fmt, m, edge, low_code if low_code % 2 == 0 else high_code)
                assert (low_code + high_code) % 2 == 1
            elif exact:
                check_edge(fmt, m, edge, high_code if edge == 0 else low_code)
            ties += exact
            check_edge(fmt, m, np.nextafter(edge, np.float32(-np.inf)), low_code)
            check_edge(fmt, m, np.nextafter(edge, np.float32(np.inf)), high_code)
    tabulated = ("nf3", "nf4", "lm2", "lm3", "lm4")
    assert ties > 0 or name in tabulated


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2", "nvfp4"])
def test_casts_agree_with_ml_dtypes(name: str) -> None:
    """Round to nearest even, saturating, as hardware casts: ties, subnormals, minus zero and all."""
    fmt = one_block(name)
    types = {4: ml_dtypes.float4_e2m1fn, 6: ml_dtypes.float6_e2m3fn, 8: ml_dtypes.float8_e4m3fn}
    dtype = {"mxfp6-e3m2": ml_dtypes.float6_e3m2fn, "mxfp8-e5m2": ml_dtypes.float8_e5m2}.get(name, types[fmt.bits])
    levels = np.array([level for level, _ in ranked(fmt.members[0])], dtype=np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    ulp = [np.nextafter(middles, np.float32(s)) for s in (-np.inf, np.inf)]
    g = np.random.default_rng(1)
    spread = g.standard_normal(4000) * 2.0 ** g.integers(-20, 17, 4000)
    x = np.concatenate([levels, middles, *ulp, [-0.0, 0.0, 1e-45, -1e-45], spread]).astype(np.float32)
    expected = np.clip(x, -levels[-1], levels[-1]).astype(dtype).astype(np.float32)
    params = fixed_params(fmt, 1.0, 0, 0)
    codes = encode(fmt, torch.from_numpy(x)[None], params)
    np.testing.assert_array_equal(decode(fmt, codes, params)[0].numpy(), expected)
    assert not (codes == 1 << fmt.bits - 1).any()  # minus zero is never emitted


@pytest.mark.parametrize("name", [n for n in bases() if not format(n).palette])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_saturate(name: str, sign: float) -> None:
    fmt = one_block(name)
    for m, grid in enumerate(fmt.members):
        pairs = ranked(grid)
        extreme = pairs[-1] if sign > 0 else pairs[0]
        for u in (3e38, 1e30, abs(extreme[0]) * 1.0001 + 1e-3):
            check_edge(fmt, m, sign * u, extreme[1])


@pytest.mark.parametrize("name", [n for n in bases() if not format(n).palette])
def test_zero_and_minus_zero(name: str) -> None:
    fmt = one_block(name)
    for m, grid in enumerate(fmt.members):
        by_level = dict(ranked(grid))
        zeros = [encode(fmt, torch.tensor([[z]]), fixed_params(fmt, 0.25, m, 0)) for z in (0.0, -0.0)]
        assert torch.equal(*zeros)
        if 0.0 in by_level:
            assert int(zeros[0]) == by_level[0.0]
        else:
            assert abs(grid.levels[int(zeros[0])]) == min(map(abs, by_level))
    if name.endswith("-log"):
        assert grid.levels[int(zeros[0])] == 1.0  # PoTPTQ: the sign of zero is plus


def test_subnormal_scales_and_weights() -> None:
    fmt = one_block("mxfp4")
    params = fixed_params(fmt, 2.0**-127, 0, 0)
    x = torch.tensor([[0.0, 6.0, -6.0, 1.5, -0.5, 1e9]]) * 2.0**-127
    codes = encode(fmt, x, params)
    assert codes.tolist() == [[0, 7, 15, 3, 9, 7]]
    assert torch.equal(decode(fmt, codes, params)[:, :5], x[:, :5])


def test_uint_zero_point() -> None:
    fmt = one_block("uint3")
    params = fixed_params(fmt, 0.5, 0, 3)
    x = torch.tensor([[-99.0, -1.5, -1.0, 0.0, 0.26, 0.24, 2.0, 99.0]])
    codes = encode(fmt, x, params)
    assert codes.tolist() == [[0, 0, 1, 3, 4, 3, 7, 7]]
    assert decode(fmt, codes, params).tolist() == [[-1.5, -1.5, -1.0, 0.0, 0.5, 0.0, 2.0, 2.0]]


@pytest.mark.parametrize("name", ["int4", "nf4-g64", "mant4-g64", "e4m3-row", "uint8", "fp4.25"])
def test_short_and_long_inputs_agree(name: str) -> None:
    """Rows are encoded alike alone and among many (a chain of comparisons, or a binary search)."""
    w = torch.randn(80, 128, generator=torch.Generator().manual_seed(5))
    q = quantize_tensor(w, name, scale_rule="absmax")
    for row in (0, 41, 79):
        alone = quantize_tensor(w[row], name, scale_rule="absmax")
        assert torch.equal(alone.planes["codes"], q.planes["codes"][row])
        assert torch.equal(alone.dequantize(), q.dequantize()[row])


# -- the tensor -------------------------------------------------------------------------------------------------------

HELD = ["mant4-g32@e3m3", "mant4", "nvfp4", "int4-tensor", "ant4", "dynfp4", "mxfp4", "fp4.25", "fp5.33-g64", "uint3",
        "uint4-tensor", "bitmod3", "razer4", "if4", "nf4-g64@bf16", "fp4.25-tensor"]  # fmt: skip


def held(name: str, shape: tuple[int, ...]) -> QuantizedTensor:
    return quantize_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(2)), name, scale_rule="absmax")


def check_valid(q: QuantizedTensor) -> None:
    QuantizedTensor.from_planes(q.format, q.shape, q.planes)  # the planes are those of a tensor of this shape
    for plane in q.planes.values():
        strides = torch.empty(plane.shape).stride()
        assert plane.stride() == strides  # plainly contiguous, so that any plane can be viewed as bytes
        plane.view(torch.uint8)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("shape", [(4, 150), (3, 5, 128), (1, 128)])
def test_select(name: str, shape: tuple[int, ...]) -> None:
    q = held(name, shape)
    full = q.dequantize()
    last = shape[0] - 1
    for index in (0, last, -1, slice(1, None), slice(None, None, 2), slice(0, 0), torch.tensor([last, 0, 0]),
                  torch.tensor([[0, last], [last, last]]), torch.tensor(last)):  # fmt: skip
        part = q.select(index)
        expected = full[index]
        assert part.shape == tuple(expected.shape)
        assert torch.equal(part.dequantize(), expected)
        check_valid(part)


def test_select_refuses() -> None:
    with pytest.raises(FormatError, match="no rows"):
        held("int4", (128,)).select(0)
    with pytest.raises(IndexError):
        held("int4", (3, 128)).select(3)


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("shape", [(150,), (2, 150), (2, 2, 128), (2, 129), (1, 1, 128)])
def test_planes_of_any_shape_are_plain(name: str, shape: tuple[int, ...]) -> None:
    q = held(name, shape)
    check_valid(q)
    assert q.dequantize().shape == shape
    if len(shape) == 3:
        flat = quantize_tensor(
            torch.randn(shape, generator=torch.Generator().manual_seed(2)).flatten(0, 1), name, scale_rule="absmax"
        )
        for plane, value in q.planes.items():
            assert torch.equal(value.flatten().view(torch.uint8), flat.planes[plane].flatten().view(torch.uint8))


@pytest.mark.parametrize("name", HELD)
def test_to_and_state_dict(name: str) -> None:
    q = held(name, (3, 128))
    moved = q.to("cpu")
    back = QuantizedTensor.from_planes(q.format, q.shape, q.state_dict())
    for other in (moved, back):
        assert other.shape == q.shape and other.format == q.format
        assert torch.equal(other.dequantize(), q.dequantize())
    state = q.state_dict()
    state.clear()
    assert q.planes  # a copy of the dict, not the dict
    meta = q.to("meta")
    assert all(p.device.type == "meta" for p in meta.planes.values()) and meta.nbytes == q.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mant4", "nf4", "uint4", "nvfp4"])
def test_dequantize_rounds_once(name: str, dtype: torch.dtype) -> None:
    q = held(name, (5, 128))
    found = q.dequantize(dtype)
    assert found.dtype == dtype and torch.equal(found, q.dequantize().to(dtype))


def test_repr() -> None:
    assert repr(held("mant4", (4, 128))) == "QuantizedTensor(mant4-g64, shape=(4, 128), 4.312 bits per weight)"
    assert repr(held("mxfp4", (2, 2, 64))) == "QuantizedTensor(mxfp4, shape=(2, 2, 64), 4.25 bits per weight)"


@pytest.mark.parametrize("plane", ["codes", "scale", "member", "parent"])
def test_from_planes_names_what_is_wrong(plane: str) -> None:
    q = held("mant4-g32@e3m3", (4, 128))

    def build(**changed: torch.Tensor | None) -> None:
        planes = {n: p for n, p in {**q.planes, **changed}.items() if p is not None}
        QuantizedTensor.from_planes(q.format, q.shape, planes, "model.x.weight")

    build()
    good = q.planes[plane]
    with pytest.raises(CheckpointError, match=f"model.x.weight has no '{plane}' plane"):
        build(**{plane: None})
    with pytest.raises(CheckpointError, match=f"plane '{plane}' of model.x.weight is torch.int32"):
        build(**{plane: good.to(torch.int32)})
    with pytest.raises(CheckpointError, match=f"plane '{plane}' of model.x.weight .*mant4-g32@e3m3 of shape"):
        build(**{plane: good[:-1]})
    with pytest.raises(CheckpointError, match="has a 'zero' plane, which mant4-g32@e3m3 does not know"):
        build(zero=good)


def test_from_planes_refuses_a_shape_the_format_cannot_have() -> None:
    q = held("mant4", (4, 128))
    with pytest.raises(FormatError, match="blocks of 64"):
        QuantizedTensor.from_planes(q.format, (4, 32), q.planes)
    with pytest.raises(CheckpointError, match="codes"):
        QuantizedTensor.from_planes(q.format, (4, 192), q.planes)


@pytest.mark.parametrize("name", ["int4", "mant4", "fp4.25", "uint4", "razer4", "fp5.33-g64"])
def test_strided_arguments(name: str) -> None:
    fmt = format(name)
    w = torch.randn(6, 192, generator=torch.Generator().manual_seed(2))
    codes, params = quantize_tensor(w, fmt, scale_rule="absmax").params()
    assert torch.equal(encode(fmt, w.t().contiguous().t(), params), codes)
    assert torch.equal(decode(fmt, codes.t().contiguous().t(), params), decode(fmt, codes, params))


@pytest.mark.filterwarnings("error:torch.compile cannot build")
@pytest.mark.parametrize("name", ["mant4", "fp4.25"])
def test_fused_codes_are_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled chain of comparisons that large tensors use gives the codes of the eager one."""
    module = importlib.import_module("numfit.formats.codec")
    fmt, w = format(name), torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    params = quantize_tensor(w, fmt, scale_rule="absmax").params()[1]
    monkeypatch.setattr(module, "usable", lambda device: False)  # as where numfit's own kernels are missing
    eager = encode(fmt, w, params)
    used = []
    fused = module.try_fused
    monkeypatch.setattr(module, "FUSE_FROM", 0)
    monkeypatch.setattr(module, "try_fused", lambda *args: used.append(args[0]) or fused(*args))
    assert torch.equal(encode(fmt, w, params), eager) and used
