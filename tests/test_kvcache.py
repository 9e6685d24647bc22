"""Codecs of the KV cache: levels against published tables, errors against measured ones, rows of every size and kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.kvcache import PRESETS, Stream, codebook, constants, decode, encode, preset, stream
from numfit.kvcache.coders import LloydMax, Octahedral, Residual, Sign, Ternary, Uniform, WordBook, row_bytes
from numfit.kvcache.digits import digit_bytes, pack_digits, pack_words, unpack_digits, unpack_words
from numfit.kvcache.rotation import KINDS, basis, rotate, unrotate
from numfit.kvcache.store import Store, packed_count
from numfit.kvcache.typed import mant_coder, typed

# Max (1960) and the exact marginals of the sphere, positive halves, times √d: b → levels.
NORMAL = {
    1: [0.797885], 2: [0.452780, 1.510418], 3: [0.245094, 0.756005, 1.343909, 2.151946],
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
}  # fmt: skip
SPHERE = {
    (64, 2): [0.4521, 1.5000], (64, 4): [0.1272, 0.3844, 0.6501, 0.9314, 1.2389, 1.5904, 2.0228, 2.6460],
    (80, 3): [0.2440, 0.7516, 1.3321, 2.1192], (96, 3): [0.2441, 0.7523, 1.3340, 2.1246],
    (128, 1): [0.7994], (128, 4): [0.1278, 0.3861, 0.6532, 0.9366, 1.2472, 1.6038, 2.0454, 2.6884],
    (256, 4): [0.1280, 0.3869, 0.6548, 0.9393, 1.2515, 1.6107, 2.0569, 2.7102],
}  # fmt: skip
ODD = {3: [0.0, 1.2240], 5: [0.0, 0.7646, 1.7241], 6: [0.3177, 1.0001, 1.8935], 9: [0.0, 0.4436, 0.9187, 1.4762, 2.2545]}
NAMES = [
    "asym4-g128/channel", "asym4-g64", "asym2-g32", "sym8-g32", "sym4-g32", "tq4", "tq2+plain", "tq3+unbiased", "tq-k5",
    "tq-k10",
    "rotvq", "oct3", "ternary-g32", "qjl3", "mant4-paper3", "mant4-paper8/channel", "mant4-table16", "mant4-search8/channel",
    "mant4-search16", "nf4-g64", "mxfp4", "nvfp4", "fp4.25", "fp8-row", "tq4+centred", "asym3-g64+permuted",
    "asym3-g128/channel+outliers0.02", "mant4-search8+centred", "polar4-g128", "sign-g32/channel+fourier",
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(codec: Stream, x: Tensor) -> Tensor:
    """x [B, H, T, D] through a stream, out of its basis again."""
    const = constants(codec, x[:, :, :128])
    y = decode(codec, encode(codec, x, const), x.shape[-1], const)
    matrix = codec.basis(x.shape[-1], x.device)
    return y if matrix is None else unrotate(y, matrix)


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().sum() / x.square().sum())


# -- levels -----------------------------------------------------------------------------------------------------------


def test_levels_are_the_published_ones() -> None:
    for bits, half in NORMAL.items():
        assert codebook.normal(1 << bits)[1 << (bits - 1) :].tolist() == pytest.approx(half, abs=2e-3)
    for (n, bits), half in SPHERE.items():
        assert codebook.sphere(1 << bits, n)[1 << (bits - 1) :].tolist() == pytest.approx(half, abs=2e-3)
    for count, half in ODD.items():
        assert codebook.normal(count)[count // 2 :].tolist() == pytest.approx(half, abs=2e-3)
    assert codebook.octahedral(8)[4:].tolist() == pytest.approx([0.1430, 0.3845, 0.6169, 0.8575], abs=2e-3)
    assert (codebook.radius(4, 128) / math.sqrt(3)).tolist() == pytest.approx([0.4589, 0.8154, 1.1680, 1.6162], abs=2e-3)


# relative squared error on normal vectors of 128: coder → error (TurboQuant, OCTOPUS, and measured by us)
SYNTHETIC = [
    (LloydMax(2, "plain"), 0.361), (LloydMax(4, "plain"), 0.116), (LloydMax(8, "plain"), 0.0340),
    (LloydMax(16, "plain"), 0.0093),
    (LloydMax(4, "renorm"), 0.119), (LloydMax(8, "renorm"), 0.0338), (LloydMax(16, "renorm"), 0.0091),
    (LloydMax(2, "unbiased"), 0.567), (LloydMax(4, "unbiased"), 0.130), (LloydMax(8, "unbiased"), 0.0347),
    (LloydMax(5, "plain"), 0.0787), (LloydMax(10, "plain"), 0.0224), (WordBook(), 0.0982),
    (Octahedral(2, False), 0.0898), (Octahedral(2), 0.0833), (Octahedral(3, False), 0.0259), (Octahedral(3), 0.0242),
    (Octahedral(4, False), 0.0071), (Octahedral(4), 0.0066),
]  # fmt: skip
# groups of 64: types by table and by search on normal and on Laplace numbers
MANT = [("search16", 0.0077, 0.0095), ("table16", 0.0087, 0.0109), ("paper8", 0.0094, 0.0116), ("paper3", 0.0095, 0.0122),
        ("search8", 0.0078, 0.0098)]  # fmt: skip


@pytest.mark.parametrize(("coder", "expected"), SYNTHETIC, ids=str)
def test_errors_of_rotated_coders(coder: LloydMax, expected: float) -> None:
    x = normal(3000, 128)
    assert error(x, coder.decode(coder.encode(x), 128)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("choice", "gauss", "laplace"), MANT)
def test_errors_of_mant(choice: str, gauss: float, laplace: float) -> None:
    coder = mant_coder(choice)
    x = normal(4000, 64)
    u = torch.rand((4000, 64), generator=torch.Generator().manual_seed(1)) - 0.5
    y = -u.sign() * torch.log1p(-2 * u.abs())
    assert error(x, coder.decode(coder.encode(x), 64)) == pytest.approx(gauss, rel=0.03)
    assert error(y, coder.decode(coder.encode(y), 64)) == pytest.approx(laplace, rel=0.03)


def test_errors_of_uniform_codes() -> None:
    x = normal(4000, 64)
    for coder, expected in ((Uniform(4, 64), 0.0080), (Uniform(4, 64, True), 0.0116)):
        assert error(x, coder.decode(coder.encode(x), 64)) == pytest.approx(expected, rel=0.03)


def test_unbiased_inner_products() -> None:
    """⟨x̂, x⟩ = |x|² exactly for `unbiased`; `plain` shrinks."""
    x = normal(500, 128)
    for norm, slope in (("unbiased", 1.0), ("plain", 0.967)):
        coder = LloydMax(8, norm)
        y = coder.decode(coder.encode(x), 128)
        assert float((x * y).sum() / x.square().sum()) == pytest.approx(slope, abs=2e-3)


def test_sign_projection_is_worse_than_nothing() -> None:
    x = normal(500, 128)
    one_bit_less = Residual(4)
    whole = LloydMax(8, "unbiased")
    assert row_bytes(one_bit_less, 128) > row_bytes(whole, 128)
    assert error(x, one_bit_less.decode(one_bit_less.encode(x), 128)) > 3 * error(x, whole.decode(whole.encode(x), 128))


def test_octahedra_lose_at_equal_rate() -> None:
    """3b + 1 bits per three values: 2.375 bits for b = 2, against a table of 5 levels at 2.375."""
    x = normal(2000, 128)
    scalar, octahedral = LloydMax(5, "plain"), Octahedral(2)
    assert row_bytes(scalar, 128) <= row_bytes(octahedral, 128)
    assert error(x, scalar.decode(scalar.encode(x), 128)) < error(x, octahedral.decode(octahedral.encode(x), 128))


# -- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 16, 100])
@pytest.mark.parametrize("n", [1, 5, 43, 64])
def test_digits(levels: int, n: int) -> None:
    codes = torch.randint(0, levels, (7, n), generator=torch.Generator().manual_seed(n))
    stream_ = pack_digits(codes, levels)
    assert stream_.shape[-1] == digit_bytes(n, levels) and stream_.dtype == torch.uint8
    assert torch.equal(unpack_digits(stream_, levels, n).long(), codes)


def test_words_are_little_endian() -> None:
    words = torch.tensor([[0x3FF, 0x001, 0x2A5]])
    packed = pack_words(words, 10)
    assert sum(int(b) << 8 * i for i, b in enumerate(packed[0])) == 0x3FF | 0x001 << 10 | 0x2A5 << 20
    assert torch.equal(unpack_words(packed, 10, 3), words)


# -- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 80, 96, 128, 256])
def test_bases_are_orthonormal_and_seeded(n: int) -> None:
    for kind in KINDS:
        if kind == "hadamard" and n & (n - 1):
            with pytest.raises(OptionError, match="power of two"):
                basis(kind, n, 0, torch.device("cpu"))
            continue
        matrix = basis(kind, n, 3, torch.device("cpu"))
        assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert kind == "fourier" or not torch.equal(matrix, basis(kind, n, 4, torch.device("cpu")))
        basis.cache_clear()
        assert torch.equal(matrix, basis(kind, n, 3, torch.device("cpu")))
        x = normal(5, n)
        assert torch.allclose(unrotate(rotate(x, matrix), matrix), x, atol=1e-5)


def test_sparse_vectors_survive_both_rotations() -> None:
    """One round of signs and Hadamard would leave a one-hot vector with magnitudes all alike: error 0.26 at 2 bits."""
    x = torch.eye(128).view(1, 1, 128, 128)
    for kind in ("haar", "hadamard"):
        assert error(x, round_trip(stream(f"tq2+{kind}"), x)) < 0.16


# -- rows of every kind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_stream_on_every_head_size(name: str, dim: int) -> None:
    codec = stream(name)
    x = normal(1, 2, 128, dim, seed=dim)
    const = constants(codec, x)
    planes = encode(codec, x, const)
    rows = x.numel() // codec.row(dim)
    assert {k: (p.dtype, p.shape[-1]) for k, p in planes.items()} == {k: tuple(s) for k, s in codec.planes(dim).items()}
    assert 8 * sum(p.nbytes for p in planes.values()) == pytest.approx(codec.bits_per_value(dim) * x.numel())
    assert all(p.numel() == rows * p.shape[-1] for p in planes.values())
    limit = {"2": 0.3, "3": 0.5}.get(next((c for c in name if c in "23"), ""), 0.03)
    loose = 0.55 if any(part in name for part in ("qjl", "ternary", "oct", "rotvq", "g32", "tq-k5", "sign")) else limit
    assert error(x, round_trip(codec, x)) < loose


@pytest.mark.parametrize("name", NAMES)
def test_awkward_vectors(name: str) -> None:
    """Zeros stay next to nothing; one-hot, huge and tiny ones come back finite and of the right size; constants do no harm."""
    codec = stream(name)
    dim = 64
    zeros = torch.zeros(1, 1, 128, dim)
    assert float(round_trip(codec, zeros).abs().max()) < 1e-6  # (M-ANT has no zero: its least scale times its least level)
    hot = torch.zeros(1, 1, 128, dim)
    hot[..., 7] = 3.0
    mixed = normal(1, 1, 128, dim)
    for x in (hot, mixed * 1e4, torch.full((1, 1, 128, dim), -0.0), torch.full((1, 1, 128, dim), 2.5)):
        y = round_trip(codec, x)
        assert torch.isfinite(y).all()
        assert error(x, y) < 0.8 or not x.any()
    tiny = mixed * 1e-12  # below every fp16 scale: lost, but to zero and not to NaN
    assert float((round_trip(codec, tiny) - tiny).abs().max()) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6])
def test_what_cannot_be_held_is_refused_by_place(value: float) -> None:
    store = Store(stream("asym4-g64"), 4, 0, "keys of layer 7")
    x = normal(1, 2, 200, 64)
    x[0, 1, 150, 9] = value
    with pytest.raises(FormatError, match=r"keys of layer 7, position 4.*head 1, 146 tokens on, channel 9"):
        store.append(x)


def test_names() -> None:
    for name, (key, value, _) in PRESETS.items():
        assert preset(name) == (stream(key), stream(value))
    assert preset("nf4-g64, tq3")[1] == stream("tq3")
    assert stream("asym4-g128/channel").window == 128 and stream("mant4-paper3/channel").window == 64
    long = "tq3+hadamard+seed7+plain"
    assert stream(long) == Stream(long, LloydMax(8, "plain"), rotation="hadamard", seed=7)
    bad_types = (
        "asym9-g64", "", "nf4/token", "tq3+nothing", "asym4-g64+plain", "dynfp4", "ant4", "trellis3", "ternary-g0", "sign-g0",
    )  # fmt: skip
    for bad in ("kv5", *(f"tq3,{name}" for name in bad_types)):
        with pytest.raises(OptionError):
            preset(bad)
    with pytest.raises(OptionError, match="whole tensor"):
        typed("ant4-row")


def test_bits_of_the_presets() -> None:
    bits = {name: tuple(s.bits_per_value(128) for s in preset(name)) for name in PRESETS}
    assert bits["kv8"] == (8.5, 8.5)
    assert bits["kv4"] == (4.25, 4.5)
    assert bits["kv4-rot"] == (4.125, 4.125)
    assert bits["kv3"] == (3.25, 3.125)
    assert bits["mant4"] == (4.3125, 4.375)
    assert stream("polar4-g128").bits_per_value(128) == 4.25 and stream("sign-g32/channel").bits_per_value(128) == 1.5


# -- streaming --------------------------------------------------------------------------------------------------------


def stored(store: Store) -> dict[str, Tensor]:
    """Everything a store has encoded, idle space left out."""
    size = store.stream.unit
    rows = store.count // size
    return {name: torch.cat([b[name] for b in store.blocks], 2)[:, :, :rows] for name in store.blocks[0]}


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_threads_do_not_matter(name: str) -> None:
    x = (normal(2, 2, 700, 64) + 2 * normal(1, 2, 1, 64, seed=1)).bfloat16()
    results = []
    for chunks, threads in (([700], 1), ([1] * 700, 1), ([3, 64, 65, 1, 200, 367], 2), ([500, 200], 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            store = Store(stream(name), 4, 64, "keys of layer 0")
            for part in x.split(chunks, 2):
                store.append(part)
        finally:
            torch.set_num_threads(before)
        results.append(store)
    first = results[0]
    assert first.count == packed_count(first.stream, 696, 64) > 0
    for other in results[1:]:
        assert other.count == first.count
        assert torch.equal(other.tail, first.tail) and torch.equal(other.sinks, first.sinks)
        assert all(torch.equal(t, first.const[k]) for k, t in other.const.items())
        a, b = stored(first), stored(other)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_counted_to_the_byte(name: str) -> None:
    codec = stream(name)
    store = Store(codec, 4, 64, "keys of layer 0")
    store.append(normal(2, 3, 600, 64).bfloat16())
    memory = store.memory()
    planes = stored(store)
    const = sum(t.nbytes for t in store.const.values())
    assert memory["packed"] == planes["codes"].nbytes
    assert memory["metadata"] == sum(p.nbytes for k, p in planes.items() if k != "codes") + const
    assert memory["residual"] == 2 * 6 * 64 * (600 - store.count)
    allocated = sum(p.nbytes for b in store.blocks for p in b.values())
    assert memory["packed"] + memory["metadata"] + memory["idle"] == allocated + const
    assert 8 * (memory["packed"] + memory["metadata"] - const) == pytest.approx(codec.bits_per_value(64) * 6 * 64 * store.count)


def test_seeds_make_codes() -> None:
    x = normal(1, 1, 64, 64)
    one, again, other = (encode(stream(f"tq4+seed{s}"), x, {})["codes"] for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_centring_and_permuting_pay_where_channels_differ() -> None:
    x = normal(1, 1, 256, 64)
    shifted = x + 8 * normal(1, 1, 1, 64, seed=3)
    spread = x * torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    off = lambda name, x, y: float((x - round_trip(stream(name), x)).square().sum() / y.square().sum())  # noqa: E731
    assert off("tq4+centred", shifted, x) < 0.1 * off("tq4", shifted, x)
    each = lambda name: float(  # noqa: E731  (the mean over channels of their relative errors)
        ((spread - round_trip(stream(name), spread)).square().mean(2) / spread.square().mean(2)).mean()
    )
    assert each("asym4-g16+permuted") < 0.1 * each("asym4-g16")
    spiky = x.clone()
    spiky[..., ::64, :] *= 30
    assert off("asym4-g128/channel+outliers0.02", spiky, spiky) < 0.5 * off("asym4-g128/channel", spiky, spiky)


def test_ternary_scale_is_the_mean_of_what_is_kept() -> None:
    x = torch.tensor([[4.0, -2.0, 0.5, -0.5] * 8])
    assert Ternary(32).decode(Ternary(32).encode(x), 32)[0, :4].tolist() == [3.0, -3.0, 0.0, 0.0]


def test_the_spectrum_is_the_fourier_transform() -> None:
    for n in (8, 80, 7):
        matrix = basis("fourier", n, 0, torch.device("cpu"))
        x = normal(3, n).double()
        half = torch.fft.rfft(x, norm="ortho")
        y = x @ matrix.T
        scale = torch.full((n // 2 + 1,), math.sqrt(2), dtype=torch.float64)
        scale[0] = 1
        if n % 2 == 0:
            scale[-1] = 1
        assert torch.allclose(y[:, : n // 2 + 1], half.real * scale)
        assert torch.allclose(y[:, n // 2 + 1 :], -half.imag[:, 1 : (n + 1) // 2] * math.sqrt(2))


def test_errors_of_signs() -> None:
    """1 − E[mean|x|²] over groups of 32 normal numbers: (1 − 2/π)(1 − 1/32)."""
    x = normal(4000, 64)
    assert error(x, Sign(32).decode(Sign(32).encode(x), 64)) == pytest.approx((1 - 2 / math.pi) * 31 / 32, rel=0.03)
    assert Sign(4).decode(Sign(4).encode(torch.tensor([[4.0, -2.0, 1.0, -1.0]])), 4).tolist() == [[2.0, -2.0, 2.0, -2.0]]


def test_polar_pairs_are_the_published_ones() -> None:
    """Length and angle by floor, decoded in the middles of bins, number by number (Wu et al.); and pairs are RoPE's."""
    x = normal(1, 2, 128, 8) + 2
    y = round_trip(stream("polar4-g128"), x)
    for head in range(2):
        for pair in range(4):
            a, b = (x[0, head, :, pair + 4 * half].tolist() for half in (0, 1))
            parts = []
            for numbers in ([math.hypot(*ab) for ab in zip(a, b)], [math.atan2(d, c) % (2 * math.pi) for c, d in zip(a, b)]):
                low, step = min(numbers), (max(numbers) - min(numbers)) / 16
                codes = [min(15, math.floor((v - low) / step)) for v in numbers]
                parts.append([low + (code + 0.5) * step for code in codes])
            want = torch.tensor([(r * math.cos(t), r * math.sin(t)) for r, t in zip(*parts)])
            got = torch.stack([y[0, head, :, pair], y[0, head, :, pair + 4]], 1)
            off = (got - want).abs().amax(1)
            assert int((off > 0.02).sum()) <= 2  # scales are fp16 here: a number at the edge of a bin may fall into the next
    with pytest.raises(FormatError, match="beyond"):
        round_trip(stream("polar4-g128"), torch.full((1, 1, 128, 8), 6e4))


def test_what_is_encoded_stays_as_it_is() -> None:
    """Each token is encoded once: later ones change no byte of it, nor move it."""
    for name in ("asym4-g128/channel", "tq4+centred", "mant4-search8/channel"):
        store = Store(stream(name), 4, 64, "keys of layer 0")
        x = normal(1, 2, 900, 64).bfloat16()
        store.append(x[:, :, :400])
        rows = store.count // store.stream.unit
        before = {k: p.clone() for k, p in stored(store).items()}
        places = [p.data_ptr() for block in store.blocks for p in block.values()]
        for i in range(400, 900, 7):
            store.append(x[:, :, i : i + 7])
        after = stored(store)
        assert store.count > 600 and all(torch.equal(before[k], after[k][:, :, :rows]) for k in before)
        assert [p.data_ptr() for block in store.blocks for p in block.values()][: len(places)] == places


@pytest.mark.parametrize("sink", [0, 4])
def test_constants_come_from_the_first_tokens_after_the_sinks(sink: int) -> None:
    x = (normal(1, 2, 400, 64) + torch.arange(400)[:, None] / 10).bfloat16()  # a mean that wanders
    codec = stream("tq4+centred+permuted")
    store = Store(codec, sink, 0, "keys of layer 0")
    for i in range(sink + 127):
        store.append(x[:, :, i : i + 1])
        assert store.count == 0 and not store.const
    store.append(x[:, :, sink + 127 :])
    want = constants(codec, x[:, :, sink : sink + 128])
    assert store.count > 128 and store.const.keys() == want.keys() == {"mean", "order"}
    assert all(torch.equal(t, want[k]) for k, t in store.const.items())
