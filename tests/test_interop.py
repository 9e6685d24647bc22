"""Our planes in the hands of others: compressed-tensors, gfloat and gguf decode them to our values, and back."""

from __future__ import annotations

import gfloat
import gfloat.formats as gf
import numpy as np
import pytest
import torch

from numfit.formats import QuantizedTensor, format, quantize_tensor

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam


def weight(rows: int = 6, k: int = 192, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, k, generator=g) * torch.exp(torch.randn(rows, k // 32, generator=g)).repeat_interleave(32, 1)
    w[1, 32:64] = 0
    return w * 0.03


def float4(group: int) -> QuantizationScheme:
    strategy = "tensor_group" if group == 16 else "group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, symmetric=True, group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=args)


# -- NVFP4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_nvfp4_decoded_by_compressed_tensors(rule: str) -> None:
    """Same nibbles, same e4m3 bytes; their global scale is the inverse of our parent."""
    w = weight()
    q = quantize_tensor(w, "nvfp4", scale_rule=rule)
    theirs = {
        "weight_packed": q.planes["codes"],
        "weight_scale": q.planes["scale"],
        "weight_global_scale": 1 / q.planes["parent"],
    }
    values = unpack_fp4_from_uint8(theirs["weight_packed"], 6, 192, dtype=torch.float32)
    scale = theirs["weight_scale"].float() / theirs["weight_global_scale"]
    torch.testing.assert_close(values * scale.repeat_interleave(16, 1), q.dequantize(), rtol=3e-7, atol=0)
    back = NVFP4PackedCompressor.decompress(theirs, float4(16))["weight"]  # in bf16, their working type
    torch.testing.assert_close(back.float(), q.dequantize(), rtol=2**-6, atol=1e-9)


def test_nvfp4_global_scale_is_the_inverse_of_the_parent() -> None:
    w = weight()
    theirs = generate_gparam(w.min(), w.max())
    ours = quantize_tensor(w, "nvfp4", scale_rule="absmax").planes["parent"]
    torch.testing.assert_close(ours, 1 / theirs, rtol=3e-7, atol=0)


def test_nvfp4_encoded_by_compressed_tensors() -> None:
    """Their absmax encoder and ours write the same bytes, and ours reads theirs."""
    w = weight(seed=1)
    g = generate_gparam(w.min(), w.max())
    blocks = w.view(6, -1, 16)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), float4(16).weights, global_scale=g)
    scale = scale.to(torch.float8_e4m3fn).float()  # elements are rounded under the scale as stored
    state = {"weight": w, "weight_scale": scale, "weight_global_scale": g}
    theirs = NVFP4PackedCompressor.compress(state, float4(16))
    ours = quantize_tensor(w, "nvfp4", scale_rule="absmax")
    zero = torch.zeros(6, 12, dtype=torch.bool)
    zero[1, 2:4] = True  # blocks of zeros: their scale is not ours, and neither matters
    words = [p.view(torch.uint8)[~zero] for p in (theirs["weight_scale"], ours.planes["scale"])]
    assert torch.equal(*words)
    planes = {"codes": theirs["weight_packed"], "scale": theirs["weight_scale"], "parent": 1 / g}
    read = QuantizedTensor.from_planes(format("nvfp4"), (6, 192), planes)
    torch.testing.assert_close(read.dequantize(), ours.dequantize(), rtol=1e-6, atol=0)
    minus_zero = 0x8  # they write it where a small negative rounds to zero, we never do
    codes = [unpacked(p) for p in (theirs["weight_packed"], ours.planes["codes"])]
    assert torch.equal(torch.where(codes[0] == minus_zero, 0, codes[0]), codes[1])
    assert not (codes[1] == minus_zero).any()


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def test_every_nibble() -> None:
    """All 256 bytes mean the same to both."""
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    planes = {"codes": every, "scale": torch.full((2, 8), 127, dtype=torch.uint8)}
    ours = QuantizedTensor.from_planes(format("mxfp4"), (2, 256), planes).dequantize()
    assert torch.equal(ours, unpack_fp4_from_uint8(every, 2, 256, dtype=torch.float32))
    fields = quantize_tensor(ours, "mxfp4").planes["codes"]
    positive = torch.where(ours == 0, torch.zeros_like(ours), ours)  # minus zero is not emitted
    scale = quantize_tensor(ours, "mxfp4").planes["scale"]
    assert (scale == 127).all() and torch.equal(fields, pack_fp4_to_uint8(positive))


# -- MX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["floor", "ceil", "mse"])
def test_mxfp4_decoded_by_compressed_tensors(rule: str) -> None:
    mxfp4 = pytest.importorskip("compressed_tensors.compressors.mxfp4.base")
    q = quantize_tensor(weight(), "mxfp4", scale_rule=rule)
    theirs = {"weight_packed": q.planes["codes"], "weight_scale": q.planes["scale"]}
    back = mxfp4.MXFP4PackedCompressor.decompress(theirs, float4(32))["weight"]
    assert torch.equal(back.float(), q.dequantize())  # powers of two and e2m1: exact even in bf16


def test_mxfp6_stream_is_that_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.mxfp6.helpers")
    q = quantize_tensor(weight(), "mxfp6-e2m3")
    values = helpers.unpack_fp6_from_uint8(q.planes["codes"], 6, 192, dtype=torch.float32)
    scale = torch.ldexp(torch.ones(6, 6), q.planes["scale"].int() - 127)
    assert torch.equal(values * scale.repeat_interleave(32, 1), q.dequantize())
    assert torch.equal(helpers.pack_fp6_to_uint8(values), q.planes["codes"])


GFLOAT_BLOCKS = {
    "mxfp4": gf.format_info_mxfp4_e2m1, "mxfp6-e2m3": gf.format_info_mxfp6_e2m3,
    "mxfp6-e3m2": gf.format_info_mxfp6_e3m2, "mxfp8-e4m3": gf.format_info_mxfp8_e4m3,
    "mxfp8-e5m2": gf.format_info_mxfp8_e5m2, "mxint8": gf.format_info_mxint8,
}  # fmt: skip


@pytest.mark.parametrize("name", GFLOAT_BLOCKS)
def test_mx_blocks_against_gfloat(name: str) -> None:
    """Floor rule, ties to even, saturation: gfloat encodes each block to the same words."""
    info = GFLOAT_BLOCKS[name]
    w = weight(3, 64, 2)
    q = quantize_tensor(w, name, scale_rule="floor")
    codes, params = q.params()
    rounded = np.float64(w.numpy()).reshape(-1, 32)
    for block, found, scale in zip(rounded, codes.view(-1, 32).tolist(), params.scale.flatten().tolist()):
        if not block.any():
            assert scale == 2.0**-127 and set(found) == {0}
            continue
        expected = gfloat.compute_scale_amax(info.etype.emax, block)
        assert scale == expected
        elements = gfloat.round_ndarray(info.etype, block / scale, sat=True)
        limit = -(2**7 - 1) / 64 if name == "mxint8" else -np.inf  # we keep integers symmetric
        elements = np.maximum(elements, limit) + 0.0  # + 0.0: no minus zero
        np.testing.assert_array_equal(gfloat.encode_ndarray(info.etype, elements), found)
        np.testing.assert_array_equal(
            list(gfloat.decode_block(info, [round(np.log2(scale)) + 127, *found])), elements * scale
        )


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_decoded_by_compressed_tensors(bits: int) -> None:
    """Their packed int32 holds our stream in offset binary."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = quantize_tensor(weight(), f"int{bits}-g64")
    flip = 0x88 if bits == 4 else 0x80
    words = torch.from_numpy((q.planes["codes"] ^ flip).numpy().view(np.int32))
    integers = helpers.unpack_from_int32(words, bits, torch.Size((6, 192)))
    scale = q.planes["scale"].float().repeat_interleave(64, 1)
    assert torch.equal(integers.float() * scale, q.dequantize())


# -- gguf -------------------------------------------------------------------------------------------------------------


def halves_to_pairs(codes: torch.Tensor) -> np.ndarray:
    """gguf's nibble order: weights j (low) and j + 16 (high) of a block of 32 share a byte."""
    blocks = codes.view(-1, 32)
    return (blocks[:, :16] | blocks[:, 16:] << 4).numpy()


def test_iq4nl_decoded_by_gguf() -> None:
    quants = pytest.importorskip("gguf.quants")
    q = quantize_tensor(weight(), "iq4nl")
    codes, _ = q.params()
    scale = q.planes["scale"].view(-1, 1).numpy().view(np.uint8)
    values = quants.IQ4_NL.dequantize_blocks(np.concatenate([scale, halves_to_pairs(codes)], 1))
    np.testing.assert_array_equal(values.reshape(6, 192), q.dequantize().numpy())


def test_mxfp4_decoded_by_gguf() -> None:
    quants = pytest.importorskip("gguf.quants")
    q = quantize_tensor(weight(), "mxfp4")
    codes, _ = q.params()
    scale = q.planes["scale"].view(-1, 1).numpy()
    values = quants.MXFP4.dequantize_blocks(np.concatenate([scale, halves_to_pairs(codes)], 1))
    np.testing.assert_array_equal(values.reshape(6, 192), q.dequantize().numpy())
