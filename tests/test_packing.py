"""Bit streams against a reference that sets one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numfit.formats.packing import pack_bits, packed_bytes, unpack_bits


def slow_pack(values: list[int], bits: int) -> bytes:
    """Bit j of value i is bit (i·bits + j) of the stream; bit b of the stream is bit b % 8 of byte b // 8."""
    stream = bytearray(-(-len(values) * bits // 8))
    for i, value in enumerate(values):
        for j in range(bits):
            position = i * bits + j
            stream[position // 8] |= (value >> j & 1) << position % 8
    return bytes(stream)


def slow_unpack(stream: bytes, bits: int, count: int) -> list[int]:
    number = int.from_bytes(stream, "little")
    return [number >> i * bits & (1 << bits) - 1 for i in range(count)]


def values_of(bits: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [*range(1, 26), 63, 64, 65, 127, 333])
def test_against_slow_reference(bits: int, count: int) -> None:
    values = values_of(bits, (3, count), seed=count)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, packed_bytes(count, bits))
    for row, stream in zip(values.tolist(), packed):
        assert bytes(stream.tolist()) == slow_pack(row, bits)
        assert slow_unpack(bytes(stream.tolist()), bits, count) == row
    assert torch.equal(unpack_bits(packed, bits, count), values)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_any_values(bits: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=70))
    packed = pack_bits(torch.tensor([row]), bits)
    assert bytes(packed[0].tolist()) == slow_pack(row, bits)
    assert unpack_bits(packed, bits, len(row))[0].tolist() == row


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_and_the_unused_end_bits(bits: int) -> None:
    every = torch.arange(1 << bits).repeat(2)[None, :-1]
    packed = pack_bits(every, bits)
    assert torch.equal(unpack_bits(packed, bits, every.shape[1]).long(), every)
    ones = pack_bits(torch.full((1, 1), (1 << bits) - 1), bits)
    assert ones.tolist() == [[(1 << bits) - 1]]  # what is absent is zero


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(7,), (2, 3, 11), (0, 9), (1, 1), (2, 0, 5)])
def test_leading_axes(bits: int, shape: tuple[int, ...]) -> None:
    values = values_of(bits, shape)
    packed = pack_bits(values, bits)
    assert packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), values)


@pytest.mark.parametrize("bits", [3, 4, 5, 7])
def test_beyond_one_chunk(bits: int) -> None:
    values = values_of(bits, (5, (1 << 19) + 13))
    packed = pack_bits(values, bits)
    assert torch.equal(unpack_bits(packed, bits, values.shape[1]), values)
    tail = values[-1, -64:].tolist()  # the last row's end lies in a later chunk than the first's
    number = int.from_bytes(bytes(packed[-1].tolist()[-64:]), "little")
    used = 64 * 8 - (packed.shape[1] * 8 - values.shape[1] * bits)
    found = [number >> used - (64 - i) * bits & (1 << bits) - 1 for i in range(64)]
    assert found == tail


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types_and_strides(dtype: torch.dtype) -> None:
    values = values_of(5, (13, 6)).to(dtype)
    assert torch.equal(pack_bits(values.t(), 5), pack_bits(values.t().contiguous(), 5))
    packed = pack_bits(values, 5)
    wide = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(unpack_bits(wide, 5, 6), values.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_wrong_length_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bytes a row"):
        unpack_bits(torch.zeros((2, packed_bytes(17, bits) + 1), dtype=torch.uint8), bits, 17)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [32, 64, 96])
def test_against_compressed_tensors(bits: int, count: int) -> None:
    """Widths that divide 32: the same stream, but for their offset binary in place of our two's complement."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = values_of(bits, (4, count))
    half = 1 << bits - 1
    signed = torch.where(codes >= half, codes.to(torch.int16) - 2 * half, codes.to(torch.int16)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits).numpy().view(np.uint8)
    np.testing.assert_array_equal(pack_bits(codes ^ half, bits).numpy(), theirs)
