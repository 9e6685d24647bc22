"""Trellis codes: every fast path against the bit-by-bit decoder, encoders against each other and against exhaustive search."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json

import pytest
import torch
from torch import Tensor

from numfit import native
from numfit.errors import CheckpointError, FormatError, OptionError
from numfit.formats import Format, QuantizedTensor, format, quantize_tensor
from numfit.formats import decode as decode_format
from numfit.formats import pack as pack_format
from numfit.formats.trellis import LEVEL, Trellis, names, trellis
from numfit.formats.trellis_codec import (
    decode,
    decode_levels,
    decode_levels_eager,
    decode_scalar,
    encode,
    encode_values,
    pack,
    refit,
    start_scale,
    unpack,
)
from numfit.formats.trellis_viterbi import EXHAUSTIVE, UNIT, circle_states, costs_table, encode_circles, tiles_of
from numfit.kernels import PackedLinear, embedding, linear
from numfit.kernels.trellis import repack
from numfit.kernels.trellis import unpack as unpack_kernel
from numfit.solvers import SolverOptions, solve
from numfit.solvers.trellis import solve_trellis

SHAPES = ((64, 4), (128, 64), (192, 200), (70, 9), (1, 1), (3, 7), (64, 66), (130, 130), (1, 6), (5, 1))
# mean squared error of unit-variance Gaussians, as published for these constructions; ours may be 2 % worse
GAUSSIAN = {
    "trellis2": 0.0698, "trellis3": 0.0188, "trellis4": 0.0049,
    "trellis2-t8": 0.0753, "trellis3-t8": 0.0204, "trellis4-t8": 0.0057,
}  # fmt: skip
needs_native = pytest.mark.skipif(native.library() is None, reason="the CPU kernels are not installed")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symbols_of(t: Trellis, n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << t.bits, (n, k), generator=seeded(seed), dtype=torch.uint8)


@pytest.fixture
def each_isa():
    """Runs a function on every instruction set and returns the results."""
    before = native.isa()

    def run(function):
        out = []
        for name in native.isa_names():
            native.set_isa(name)
            out.append(function())
        return out

    yield run
    if before is not None:
        native.set_isa(before)


# -- decoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_decoders_agree_bit_for_bit(name):
    t = trellis(name)
    seen = torch.zeros(1 << t.state_bits, dtype=torch.bool)
    for n, k in SHAPES:
        symbols = symbols_of(t, n, k)
        stream = pack(t, symbols)
        assert stream.numel() == t.stream_bytes(n, k)
        assert torch.equal(unpack(t, stream, n, k), symbols)
        wanted = torch.tensor(decode_scalar(t, bytes(stream.tolist()), n, k), dtype=torch.int8)
        assert torch.equal(decode_levels_eager(t, symbols), wanted)
        assert torch.equal(decode_levels(t, symbols), wanted)
        if n >= 64:
            whole = tiles_of(symbols[: n - n % 64, : k - k % 4], 64, 4)
            seen[circle_states(whole, t.bits, t.state_bits).flatten().long()] = True
    assert seen.all(), "the shapes above must visit every state"


@pytest.mark.parametrize("name", names())
def test_sizes(name):
    t = trellis(name)
    for n, k in SHAPES:
        tiles = [(min(64, n - r), min(4, k - c)) for r in range(0, n, 64) for c in range(0, k, 4)]
        assert t.stream_bytes(n, k) == sum((a * b * t.bits + 7) // 8 for a, b in tiles)
        assert format(name).nbytes((n, k)) == t.stream_bytes(n, k) + 2 * n
    assert format(name).bits_per_weight((4096, 4096)) == t.bits + 16 / 4096
    assert format(name).nbytes((3, 128, 9)) == 3 * format(name).nbytes((128, 9))


# first levels of a stream of bytes 0, 37, 74, … for one tile of 64 × 8, and the digest of all of them
GOLDEN = json.loads("""
{
    "trellis2": [[-65, -43, 15, -53, 26, 53, 32, 28, -6], [-26, 9, 28, 28, -21, 13, 21, -41, -6], "43651e70a06a2c99"],
    "trellis3": [[23, 85, -17, 103, 9, 79, 33, 68, -17], [-26, 103, 17, -35, 45, -17, 26, 41, 10], "c3d63dcb0e2917fe"],
    "trellis4": [[48, -54, 11, 17, -11, -33, -49, 5, 48], [24, -47, 71, -5, -47, 32, 24, 7, -17], "d92870d76fb14931"],
    "trellis2-t8": [[-127, 23, -23, -45, 23, -23, -10, -8, 127], [62, -9, -42, -8, 60, 42, -57, -21, 22], "076935b337e6222f"],
    "trellis3-t8": [[-127, 9, 26, 4, -26, 51, -43, -26, -48], [34, 5, -9, 19, -3, -46, -31, -4, -57], "7ebda3e81c2d64c5"],
    "trellis4-t8": [[-127, 57, 50, -8, 127, -8, -50, 57, -127], [-2, -23, 73, -127, 23, 24, -2, -32, -29], "3cff26efe8635693"]
}
""")


@pytest.mark.parametrize("name", names())
def test_golden(name):
    t = trellis(name)
    stream = torch.arange(t.stream_bytes(66, 9), dtype=torch.int64).mul(37).remainder(256).to(torch.uint8)
    levels = decode_levels(t, unpack(t, stream, 66, 9))
    digest = hashlib.sha256(bytes(levels.flatten().view(torch.uint8).tolist())).hexdigest()[:16]
    assert [levels[0].tolist(), levels[65].tolist(), digest] == GOLDEN[name]


def test_streams_of_another_size_are_refused():
    t = trellis("trellis2")
    with pytest.raises(CheckpointError, match="stores"):
        unpack(t, torch.zeros(5, dtype=torch.uint8), 64, 4)


# -- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_json_round_trip(name):
    t = trellis(name)
    assert Trellis.from_json(json.loads(json.dumps(t.to_json()))) == t


def test_impossible_codes_are_refused():
    t = trellis("trellis2-t8")
    good = t.to_json()
    changes = {"bits": 5, "state_bits": 13, "levels": [0] * 256, "masks": [1 << 13], "deviation": 0.0}
    for change in [{part: value} for part, value in changes.items()] + [{"levels": [1]}]:
        with pytest.raises(FormatError):
            Trellis.from_json({**good, **change})
    with pytest.raises(FormatError, match="damaged"):
        Trellis.from_json({"bits": 2})
    with pytest.raises(FormatError, match="unknown trellis"):
        trellis("trellis9")


@pytest.mark.parametrize("name", names())
def test_levels_have_an_opposite(name):
    """What halves the tables of the kernels: some change of the index negates every level."""
    levels = torch.tensor(trellis(name).levels)
    index = torch.arange(len(levels))
    assert any(bool((levels[index ^ c] == -levels).all()) for c in range(1, len(levels)))


# -- encoding -----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", names())
def test_native_encoder_gives_the_symbols_of_the_eager_one(name, each_isa):
    t = trellis(name)
    table = costs_table(t.table, t.deviation)
    for n, k in ((64, 8), (65, 5), (2, 2), (1, 1), (1, 3), (7, 3)):
        w = torch.randn(n, k, generator=seeded(n + k)) * torch.linspace(0.1, 3, n)[:, None]
        w[0, 0] = 30.0  # saturates
        scale = start_scale(t, w)
        inverse = UNIT / (scale * (LEVEL * t.deviation))
        v = (w * inverse[:, None]).clamp(-32767, 32767).round().to(torch.int16)
        wanted = torch.empty((n, k), dtype=torch.uint8)
        for r in range(0, n, 64):
            for c in range(0, k, 4):
                part = v[r : r + 64, c : c + 4]
                wanted[r : r + 64, c : c + 4] = encode_circles(table, t.bits, part.reshape(1, -1)).view(part.shape)
        for symbols, levels in each_isa(lambda: encode_values(t, w, scale)):  # noqa: B023
            assert torch.equal(symbols, wanted)
            assert torch.equal(levels, decode_levels_eager(t, wanted))


@pytest.mark.parametrize("name", ["trellis2-t8", "trellis4-t8", "trellis3"])
def test_short_circles_are_encoded_at_their_best(name):
    """Against every sequence of symbols, as far as the encoder tries them all too; longer ones lose little to their seam."""
    t = trellis(name)
    table = costs_table(t.table, t.deviation)
    for n in range(1, EXHAUSTIVE // t.bits + 1):
        everything = torch.tensor(list(itertools.product(range(1 << t.bits), repeat=n)), dtype=torch.uint8)
        levels = table[circle_states(everything, t.bits, t.state_bits).long()].double() / UNIT
        v = (torch.randn(40, n, generator=seeded(n)) * UNIT).to(torch.int16)
        best = (v[:, None].double() / UNIT - levels).square().sum(-1).amin(1)
        found = encode_circles(table, t.bits, v)
        mine = (v / UNIT - table[circle_states(found, t.bits, t.state_bits).long()].double() / UNIT).square().sum(-1)
        assert (mine <= best + 1e-3 * n).all()  # but for costs that are rounded, and saturate at one deviation or more
    v = (torch.randn(100, 32, generator=seeded(0)) * UNIT).clamp(-32767, 32767).to(torch.int16)
    found = table[circle_states(encode_circles(table, t.bits, v), t.bits, t.state_bits).long()].double() / UNIT
    assert (v / UNIT - found).square().mean() < 1.3 * GAUSSIAN[name]


def test_tail_biting_costs_less_than_one_percent():
    """Against the exact search, one pass in double precision for every state in which the circle may close."""
    t = trellis("trellis4-t8")
    levels = t.table.double() / t.deviation
    w = torch.randn(6, 256, generator=seeded(5), dtype=torch.float64)
    time, overlaps, fan = w.flip(1), 1 << (t.state_bits - t.bits), 1 << t.bits
    states = torch.arange(fan)[:, None] * overlaps + torch.arange(overlaps)  # [oldest symbol, overlap after]
    best = torch.full((len(w),), torch.inf, dtype=torch.float64)
    for closing in range(overlaps):
        costs = torch.full((len(w), overlaps), torch.inf, dtype=torch.float64)
        costs[:, closing] = 0
        for step in range(256):
            d = (time[:, step, None, None] - levels[states]).square()
            costs = (costs[:, states >> t.bits] + d).amin(1)
        best = torch.minimum(best, costs[:, closing])
    v = (w * UNIT).round().clamp(-32767, 32767).to(torch.int16)
    found = encode_circles(costs_table(t.table, t.deviation), t.bits, v)
    mine = (w - levels[circle_states(found, t.bits, t.state_bits).long()]).square().sum(1)
    assert (mine >= best * (1 - 1e-9)).all()
    assert mine.sum() <= best.sum() * 1.01


@pytest.mark.parametrize("name", names())
def test_encoding_what_was_decoded_changes_nothing(name):
    t = trellis(name)
    w = torch.randn(64, 12, generator=seeded(1))
    scale = start_scale(t, w)
    once = decode(t, encode(t, w, scale), scale)
    assert torch.equal(decode(t, encode(t, once, scale), scale), once)


@needs_native
@pytest.mark.parametrize("name", names())
def test_gaussian_error(name):
    t = trellis(name)
    w = torch.randn(64 * 128, 8, generator=seeded(11))
    table = torch.full((len(w),), 1.0 / (t.deviation * LEVEL))
    error = float((decode(t, encode(t, w, table), table) - w).square().mean())
    assert error <= 1.02 * GAUSSIAN[name]


def test_scale_refit_is_the_least_squares_solution():
    t = trellis("trellis3-t8")
    w = torch.randn(64, 16, generator=seeded(2)) * 0.02
    x = torch.randn(50, 16, generator=seeded(3))
    h = x.T @ x
    start = start_scale(t, w)
    _, levels = encode_values(t, w, start)
    scale = refit(t, w, levels, h, start)
    q = levels.double() * LEVEL
    for row in (0, 17, 63):
        s = torch.linalg.lstsq((x.double() @ q[row])[:, None], (x.double() @ w[row].double())[:, None]).solution
        assert scale[row].item() == pytest.approx(float(s), rel=1e-3)
    with pytest.raises(FormatError, match="fp16"):
        refit(t, w * 1e8, levels, h, start)


# -- solving ------------------------------------------------------------------------------------------------------------


def problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    w = torch.randn(n, k, generator=seeded(seed)) * 0.05
    x = torch.randn(4 * k, k, generator=seeded(seed + 1)) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=seeded(seed + 2)))
    return w, x.T @ x * (2 / len(x))


def loss_of(w: Tensor, h: Tensor, scale: Tensor, levels: Tensor) -> float:
    e = w - scale.float()[:, None] * (levels.float() * LEVEL)
    return float((e @ h * e).double().sum())


@needs_native
@pytest.mark.parametrize("name", ["trellis2", "trellis3-t8", "trellis4"])
def test_feedback_lowers_the_loss(name):
    t = trellis(name)
    for n, k in ((70, 66), (64, 260)):
        w, h = problem(n, k)
        blind, aware, more = solve_trellis(w, None, t), solve_trellis(w, h, t), solve_trellis(w, h, t, sweeps=1)
        before = loss_of(w, h, blind.scale, blind.levels)
        after = loss_of(w, h, aware.scale, aware.levels)
        assert after < 0.85 * before
        assert loss_of(w, h, more.scale, more.levels) <= after * (1 + 1e-5)
        assert torch.equal(decode_levels_eager(t, aware.symbols), aware.levels)
        assert torch.equal(aware.weight(), decode(t, aware.symbols, aware.scale))


@needs_native
def test_with_an_identity_nothing_is_passed_on():
    t = trellis("trellis2-t8")
    w, _ = problem(64, 36)
    assert torch.equal(solve_trellis(w, torch.eye(36), t).symbols, solve_trellis(w, None, t).symbols)


@needs_native
def test_solving_by_strips_is_what_the_formula_says():
    """Against the sweep written down with a dense inverse: GPTQ's, in blocks of four columns."""
    t = trellis("trellis4-t8")
    w, h = problem(64, 24)
    h = h / h.diagonal().mean()
    u = torch.linalg.cholesky(torch.linalg.inv(h.double() + 0.01 * torch.eye(24)), upper=True)
    work, scale = w.double().clone(), start_scale(t, w)
    symbols = torch.empty((64, 24), dtype=torch.uint8)
    for j in range(0, 24, 4):
        own = slice(j, j + 4)
        symbols[:, own], levels = encode_values(t, work[:, own].float(), scale)
        e = (work[:, own] - scale.double()[:, None] * LEVEL * levels) @ torch.linalg.inv(u[own, own])
        work[:, j + 4 :] -= e @ u[own, j + 4 :]
    assert (solve_trellis(w, h, t).symbols == symbols).float().mean() > 0.99  # but for roundings


@needs_native
def test_threads_do_not_matter():
    t = trellis("trellis3")
    w, _ = problem(130, 40)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(encode_values(t, w, start_scale(t, w)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))


def test_zeros_and_bad_weights():
    t = trellis("trellis2-t8")
    w, h = problem(66, 12)
    w[3] = 0
    found = solve_trellis(w, h, t)
    assert torch.isfinite(found.scale).all()
    assert (decode(t, found.symbols, found.scale)[3] == 0).all()
    for bad in (float("nan"), float("inf")):
        w[5, 5] = bad
        with pytest.raises(FormatError, match="NaN or Inf"):
            solve_trellis(w, h, t)
    w[5, 5] = 0
    with pytest.raises(OptionError, match="12 × 12"):
        solve_trellis(w, h[:5, :5], t)
    with pytest.raises(OptionError, match="NaN"):
        solve_trellis(w, h * float("nan"), t)
    with pytest.raises(FormatError, match="matrices"):
        solve_trellis(w[0], h, t)
    assert torch.isfinite(solve_trellis(w, torch.zeros(12, 12), t).weight()).all()  # nothing known of the inputs


# -- kernels ------------------------------------------------------------------------------------------------------------


def apply(handle: int, n: int, x: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    lib, error = native.library(), ctypes.create_string_buffer(native.ERROR_BYTES)
    y = torch.empty(len(x), n)
    where = None if bias is None else bias.data_ptr()
    assert not lib.nf_apply(handle, x.data_ptr(), len(x), x.shape[1], y.data_ptr(), n, where, exact, error), error.value
    return y


@needs_native
@pytest.mark.parametrize("name", names())
def test_kernels_against_the_scalar_decoder(name, each_isa):
    """Activations that are integers up to 127 in every group are exact in int8, and so are their sums in fp32."""
    t = trellis(name)
    lib, error = native.library(), ctypes.create_string_buffer(native.ERROR_BYTES)
    for n, k in SHAPES:
        symbols = symbols_of(t, n, k, 7)
        stream = pack(t, symbols)
        levels = torch.tensor(decode_scalar(t, bytes(stream.tolist()), n, k)).double()
        scale = torch.rand(n, generator=seeded(n)) + 0.5
        handle = repack(t, (n, k), stream, scale)
        assert torch.equal(unpack_kernel(t, (n, k), handle), stream)
        rows, out = torch.arange(n).flip(0).contiguous(), torch.empty(n, k)
        assert not lib.nf_gather(handle, rows.data_ptr(), n, out.data_ptr(), error)
        assert torch.equal(out.flip(0), scale[:, None] * (levels.float() * LEVEL))
        ones = repack(t, (n, k), stream, torch.full((n,), 32.0))
        for m in (1, 2, 5, 8, 9, 35):
            x = torch.randint(-127, 128, (m, k), generator=seeded(m)).float()
            x[:, ::64] = 127.0
            bias = torch.randn(n, generator=seeded(m))
            wanted = x.double() @ levels.T
            for y in each_isa(lambda: apply(ones, n, x, None, False)):  # noqa: B023
                assert torch.equal(y.double(), wanted)
            z = torch.randn(m, k, generator=seeded(m))
            rough = each_isa(lambda: apply(handle, n, z, bias, False))  # noqa: B023
            assert all(torch.equal(y, rough[0]) for y in rough)
            product = z.double() @ (levels * scale.double()[:, None] * LEVEL).T + bias.double()
            assert (rough[0] - product).norm() < 0.02 * product.norm() + 0.05
            for y in each_isa(lambda: apply(handle, n, z, bias, True)):  # noqa: B023
                assert (y - product).abs().max() < 1e-5 * (1 + k)
        lib.nf_free(handle)
        lib.nf_free(ones)


@needs_native
def test_tables_without_an_opposite_have_kernels_too(each_isa):
    base = trellis("trellis3-t8").to_json()
    base["levels"] = torch.randint(-127, 128, (256,), generator=seeded(0)).tolist()
    wide = {**trellis("trellis4").to_json(), "levels": base["levels"]}
    for t in (Trellis.from_json(base), Trellis.from_json(wide)):
        symbols = symbols_of(t, 64, 64)
        handle = repack(t, (64, 64), pack(t, symbols), torch.full((64,), 32.0))
        x = torch.full((1, 64), 127.0)
        for y in each_isa(lambda: apply(handle, 64, x, None, False)):  # noqa: B023
            assert torch.equal(y[0], 127.0 * decode_levels_eager(t, symbols).float().sum(1))
        native.library().nf_free(handle)


@needs_native
def test_kernels_refuse_what_they_cannot_hold():
    t = trellis("trellis2")
    stream = torch.zeros(t.stream_bytes(64, 4), dtype=torch.uint8)
    with pytest.raises(FormatError, match="does not fit"):
        repack(t, (64, 8), stream, torch.ones(64))
    with pytest.raises(FormatError, match="row 3 is NaN or Inf"):
        repack(t, (64, 4), stream, torch.ones(64).index_fill(0, torch.tensor([3]), float("nan")))


# -- as a format --------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", [*names(), "trellis3+rot", "trellis4-t8+rot3+rank2"])
def test_the_format(name):
    fmt = format(name)
    assert Format.from_json(json.loads(json.dumps(fmt.to_json()))) == fmt
    w = torch.randn(130, 48, generator=seeded(3)) * 0.03
    packed = quantize_tensor(w, name)
    assert packed.nbytes == fmt.nbytes((130, 48)) == sum(p.nbytes for p in packed.planes.values())
    whole = packed.dequantize()
    bits = fmt.trellis.bits
    assert (w - whole).square().mean() < 1.25 * {2: 0.0753, 3: 0.0204, 4: 0.0057}[bits] * w.square().mean()
    again = QuantizedTensor.from_planes(fmt, (130, 48), packed.planes)
    assert torch.equal(again.dequantize(torch.bfloat16), whole.bfloat16())
    for index in (slice(0, 3), torch.tensor([129, 5, 64, 5]), slice(60, 130), 7):
        assert torch.equal(packed.rows(index), whole[index])
    for index in (slice(64, 130), slice(0, 64), slice(128, 130)):
        assert torch.equal(packed.select(index).dequantize(), whole[index])
    with pytest.raises(FormatError, match="whole tiles"):
        packed.select(slice(3, 9))
    x = torch.randn(3, 48, generator=seeded(4))
    assert torch.allclose(linear(x, packed), x @ whole.T, atol=1e-5)
    assert torch.equal(embedding(torch.tensor([[1, 129]]), packed), whole[torch.tensor([[1, 129]])])
    params = packed.base().params()
    assert torch.equal(pack_format(fmt.base, (130, 48), *params).planes["codes"], packed.planes["codes"])


@needs_native
def test_stacks_and_vectors():
    w = torch.randn(3, 64, 12, generator=seeded(5))
    packed = quantize_tensor(w, "trellis2")
    assert torch.equal(packed.select(1).dequantize(), packed.dequantize()[1])
    assert torch.equal(packed.rows(slice(1, 3)), packed.dequantize()[1:])
    assert torch.equal(packed.select(1).dequantize(), quantize_tensor(w[1], "trellis2").dequantize())
    with pytest.raises(FormatError, match="fill tiles of 64"):
        quantize_tensor(w[:, :63], "trellis2")
    assert quantize_tensor(w[0, 0], "trellis2").dequantize().shape == (12,)


def test_what_does_not_go_with_a_trellis_is_refused():
    for name in ("trellis2-g64", "trellis2@bf16", "trellis2-tensor"):
        with pytest.raises(FormatError, match="trellis"):
            format(name)
    with pytest.raises(FormatError, match="absmax"):
        quantize_tensor(torch.ones(4, 4), "trellis2", scale_rule="absmax")
    assert format("trellis2-row") == format("trellis2")
    assert format("trellis2") != format("trellis2-t8")


@needs_native
@pytest.mark.parametrize("name", names())
def test_packed_linear(name):
    w = torch.randn(130, 70, generator=seeded(6))
    weight = quantize_tensor(w, name)
    packed = PackedLinear.pack(weight)
    whole = weight.dequantize()
    assert torch.equal(packed.rows(torch.tensor([5, 129])), whole[[5, 129]])
    assert all(torch.equal(a, weight.planes[n]) for n, a in packed.unpack().planes.items())
    x = torch.randn(2, 5, 70, generator=seeded(7))
    for exact, bound in (("exact", 1e-4), ("int8", 0.02)):
        y = packed.apply(x, torch.ones(130), exact)
        assert (y - (x @ whole.T + 1)).norm() < bound * y.norm()
    assert "trellis" in packed.kernel and packed.rounding == 0


@needs_native
def test_the_solver_room_knows_it():
    w, h = problem(64, 64)
    fmt = format("trellis3-t8")
    near, swept, twice = (solve(w, h, fmt, steps) for steps in ("nearest", "gptq", "gptq+descent"))
    assert near.loss > swept.loss >= twice.loss
    again = decode_format(fmt, swept.codes, swept.params)
    assert float(((w - again) @ h * (w - again)).sum()) == pytest.approx(swept.loss, rel=1e-3)
    with pytest.raises(OptionError, match="second moment"):
        solve(w, None, fmt, "gptq")
    moved = solve(w, h, fmt, SolverOptions.parse("gptq", beta=1.0), cross=0.3 * h)
    assert not torch.equal(moved.codes, swept.codes)
    for numbers in ({"order": "act"}, {"ridge": 0.1}, {"importance": False}, {"gptaq": 0.2}, {"rescomp": 0.2}):
        with pytest.raises(OptionError, match=f"{next(iter(numbers))} .* does not apply to trellis3-t8"):
            solve(w, h, fmt, SolverOptions.parse("gptq", **numbers), cross=h)
    for chain in ("nearest+descent", "gptq+refit"):
        with pytest.raises(OptionError, match="does not apply to trellis3-t8"):
            solve(w, h, fmt, chain)


@needs_native
def test_a_model_of_trellises_runs(tmp_path):
    """Calibrated, written, read again, and run by planes and by kernels."""
    from tiny_models import build, from_reference, logits, save_tokenizer, words

    from numfit import load
    from numfit.checkpoint import verify
    from numfit.pipeline import quantize

    build("llama-tied", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options = {"calibration": words(2000), "solver": "gptq", "windows": 4, "context": 64}
    options |= {"progress": False, "embedding": "keep"}
    quantize(tmp_path / "model", "trellis4-t8+rot", tmp_path / "out", **options)
    verify(tmp_path / "out")
    wanted = logits(from_reference(tmp_path / "model"))
    for activations in ("reference", "exact", "int8"):
        model, _ = load(tmp_path / "out", dtype="float32", activations=activations)
        assert (logits(model) - wanted).norm() < 0.25 * wanted.norm()
