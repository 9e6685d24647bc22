"""Side terms: their names, their bits, what they decode to against fp64, and that they pay."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from numfit.errors import CheckpointError, FormatError
from numfit.formats import Format, QuantizedTensor, decode, format, pack, quantize_tensor
from numfit.formats.rotation import Rotation, rotate, unrotate
from numfit.formats.side import Side
from numfit.formats.terms import largest, leading, low_rank

NAMES = ("lm4-row+rot", "int4-g64+rank3", "uint3-g32+sparse20", "mant4-g32@e3m3+rot7+rank2+sparse5", "fp4.25+rot+sparse1")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spiky(rows: int, k: int) -> torch.Tensor:
    """Gaussian rows in which a few weights stand out."""
    w = gaussian(rows, k) * 0.02
    g = torch.Generator().manual_seed(1)
    return w + (torch.rand((rows, k), generator=g) < 0.004) * 0.4 * torch.randn((rows, k), generator=g).sign()


# -- the value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_and_json(name: str) -> None:
    fmt = format(name)
    assert fmt.name == name and format(fmt.name) == fmt
    data = json.loads(json.dumps(fmt.to_json()))
    assert data["version"] == 2 and Format.from_json(data) == fmt
    base = fmt.base
    assert not base.side and base == format(name.split("+")[0]) and base.name == name.split("+")[0]
    assert base.base is base and base.with_side(fmt.side) == fmt and base.with_side(fmt.side).name == name


def test_nothing_changes_without_side_terms() -> None:
    fmt = format("mant4-g64")
    data = fmt.to_json()
    assert "side" not in data and data["version"] == 1 and Format.from_json(data) == fmt
    assert not fmt.side and fmt.base is fmt and replace(fmt) == fmt
    assert format("lm4").name == "lm4-row" and format("LM4+ROT").name == "lm4-row+rot"
    assert format("lm4+sparse5+rot0+rank2").name == "lm4-row+rot+rank2+sparse5"  # any order in, one order out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm4+rott", "unknown suffix '.rott'.*did you mean '.rot'"),
        ("lm4+rnk8", "did you mean '.rank'"),
        ("lm4+sparce5", "did you mean '.sparse'"),
        ("lm4+", "unknown suffix"),
        ("lm4+rank", "needs a rank, such as .rank16"),
        ("lm4+rank0", "needs a rank"),
        ("lm4+sparse", "thousandths of a row"),
        ("lm4+rot+rot", "says '.rot' twice"),
        ("lm4+sparse501", "1 to 500 thousandths"),
        ("lm4+rank5000", "rank of 1 to 4096"),
        ("lm9+rot", "unknown format 'lm9'"),
        ("lm4+rot-g64", "unknown suffix"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        format(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=1),
        lambda d: d.update(version=3),
        lambda d: d.update(side=3),
        lambda d: d["side"].pop("rank"),
        lambda d: d["side"].update(rank="many"),
        lambda d: d["side"].update(rank=-1),
        lambda d: d["side"].update(sparse_per_mille=1000),
        lambda d: d["side"].update(rotation=7),
        lambda d: d["side"]["rotation"].update(kind="givens"),
        lambda d: d["side"]["rotation"].update(seed=-1),
    ],
)
def test_damaged_json(change: Any) -> None:
    data = copy.deepcopy(format("lm4-row+rot+rank2").to_json())
    change(data)
    with pytest.raises(FormatError):
        Format.from_json(data)


def test_bits_count_everything() -> None:
    shape = (512, 1536)
    bits = {n: format(n).bits_per_weight(shape) for n in ("int4-g64", "int4-g64+rot", "int4-g64+rank16", "int4-g64+sparse5")}
    assert bits["int4-g64+rot"] == bits["int4-g64"]
    assert bits["int4-g64+rank16"] - bits["int4-g64"] == pytest.approx(16 * 16 * (512 + 1536) / (512 * 1536))
    assert bits["int4-g64+sparse5"] - bits["int4-g64"] == pytest.approx(32 * round(0.005 * 1536) / 1536)
    assert format("int4-row+sparse1").planes((3, 40000))["sparse_index"].dtype == torch.int32
    assert format("int4-row+sparse1").planes((3, 20))["sparse_index"].shape == (3, 1)  # never none
    for name in NAMES:
        fmt = format(name)
        assert tuple(fmt.planes((4, 576))) == fmt.plane_names
    odd = replace(format("lm4+rot"), block=1031)  # a block that could not be rotated, in a row that can
    assert odd.plane_names == ("codes", "scale") and odd.planes((1, 2048))
    with pytest.raises(FormatError, match="odd factor may be at most 512"):
        odd.check_shape((4, 1031))


# -- what it decodes to ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 576), (3, 136), (2, 3, 64), (1, 100)])
def test_definition(name: str, shape: tuple[int, ...]) -> None:
    """(decode + B·A + S)·R in fp64 from the planes."""
    fmt = format(name)
    if isinstance(fmt.block, int) and fmt.block > shape[-1]:
        pytest.skip("the block is longer than the row")
    w = spiky(torch.Size(shape[:-1]).numel(), shape[-1]).view(shape)
    q = quantize_tensor(w, fmt)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in q.planes.items()} == dict(fmt.planes(shape).items())
    assert q.nbytes == fmt.nbytes(shape)
    base = q.base().dequantize().double().reshape(-1, shape[-1])
    terms = q.terms()
    if fmt.side.rank:
        base += terms["lowrank_b"].double().reshape(-1, fmt.side.rank) @ terms["lowrank_a"].double()
    if fmt.side.sparse:
        index = terms["sparse_index"].long().reshape(len(base), -1)
        assert bool((index.diff(dim=1) > 0).all())
        for r, row in enumerate(index.tolist()):
            for c, value in zip(row, terms["sparse_value"].double().reshape(len(base), -1)[r].tolist(), strict=True):
                base[r, c] += value
    want = base if fmt.side.rotation is None else unrotate(base, fmt.side.rotation)
    torch.testing.assert_close(q.dequantize().double(), want.view(shape), atol=2e-6, rtol=1e-5)
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    # any row alone is the same bits
    one = q.select(0)
    assert torch.equal(one.dequantize(), q.dequantize()[0])
    again = QuantizedTensor.from_planes(fmt, shape, q.state_dict())
    assert torch.equal(again.dequantize(), q.dequantize())


def test_rows_of_an_embedding() -> None:
    q = quantize_tensor(spiky(50, 576), "lm3+rot+rank2+sparse3")
    index = torch.tensor([49, 3, 3, 0])
    assert torch.equal(q.select(index).dequantize(), q.dequantize()[index])
    assert torch.equal(q.select(slice(10, 20)).dequantize(), q.dequantize()[10:20])
    assert quantize_tensor(torch.zeros(0, 64), "lm4+rot+rank2+sparse3").dequantize().shape == (0, 64)


def test_rotation_is_data_free_quantization_of_rotated_rows() -> None:
    w = spiky(16, 576)
    q = quantize_tensor(w, "lm4+rot3")
    turned = quantize_tensor(rotate(w, Rotation(3)), "lm4")
    assert torch.equal(q.planes["codes"], turned.planes["codes"]) and torch.equal(q.planes["scale"], turned.planes["scale"])
    assert torch.equal(q.dequantize(), unrotate(turned.dequantize(), Rotation(3)))


def test_verbs_see_the_base() -> None:
    q = quantize_tensor(spiky(4, 64), "int4-g32+rot+rank1")
    codes, params = q.params()
    assert torch.equal(decode(q.format, codes, params), q.base().dequantize())


@pytest.mark.parametrize("name", ["lm3+rot", "int4-g64+rank4+sparse10"])
def test_bytes_do_not_depend_on_threads(name: str) -> None:
    w = spiky(96, 576)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(quantize_tensor(w, name))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(plane, found[1].planes[n]) for n, plane in found[0].planes.items())


# -- that it pays ----------------------------------------------------------------------------------------------------------


def lost(w: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> float:
    d = (quantize_tensor(w, name, importance=importance).dequantize() - w).square()
    d, e = (d, w.square()) if importance is None else (d * importance, w.square() * importance)
    return float(d.sum() / e.sum())


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.0345), (4, 0.0095), (5, 0.0025), (6, 0.00064)])
def test_gaussian_error(bits: int, error: float) -> None:
    """The errors of Max's table; one scale per row of 4096 fits the row's own tails a little better than that."""
    w = gaussian(64, 4096, seed=bits)
    assert lost(w, f"lm{bits}") == pytest.approx(error, rel=0.05)
    assert lost(w, f"lm{bits}+rot") == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("name", ["lm2", "lm3", "lm4", "lm6"])
@pytest.mark.parametrize("kind", ["gaussian", "spiky", "one huge weight"])
def test_search_finds_the_scale_of_long_rows(name: str, kind: str) -> None:
    """Scales near the root mean square, far below absmax / max_level: against a dense search."""
    w = gaussian(8, 4096) if kind == "gaussian" else spiky(8, 4096)
    if kind == "one huge weight":
        w[:, 5] = 60 * w.std()
    fmt = format(name)
    levels = torch.tensor(sorted(fmt.members[0].levels))
    edges = (levels[1:] + levels[:-1]) / 2
    best = torch.full((8,), torch.inf)
    rms = w.square().mean(1, keepdim=True).sqrt()
    for factor in torch.logspace(-1.5, 2.5, 400, base=2).tolist():
        u = w / (rms * factor)
        best = torch.minimum(best, ((levels[torch.bucketize(u, edges)] - u) * rms * factor).square().sum(1))
    have = (quantize_tensor(w, fmt).dequantize() - w).square().sum(1)
    assert bool((have <= best * 1.01).all()), (have / best).tolist()


def test_rotation_helps_uneven_rows() -> None:
    w = spiky(32, 1024)
    assert lost(w, "lm4+rot") < 0.012 < lost(w, "lm4")
    assert lost(w, "lm4+sparse10") < lost(w, "lm4")


def test_low_rank_helps_and_full_rank_restores() -> None:
    w = gaussian(48, 96) + 3 * gaussian(48, 2) @ gaussian(2, 96, seed=1)
    errors = [lost(w, n) for n in ("int2-g32", "int2-g32+rank2", "int2-g32+rank8", "int2-g32+rank48")]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    assert lost(w, "int2-g32+rot+rank48") < 1e-6
    assert lost(w, "int2-g32+rank96") < 1e-6  # more room than the matrix has ranks
    assert lost(w, "int2-g32+sparse500") < 0.3 * errors[0]


def test_importance_weighs_the_terms() -> None:
    w = spiky(64, 256)
    importance = torch.logspace(-2, 2, 256)
    for name in ("int3-g64+rank8", "int3-g64+sparse10"):
        fmt = format(name)
        q = quantize_tensor(w, fmt, importance=importance)
        flat = pack(fmt, (64, 256), *q.params(), {**q.terms(), **_unweighted_terms(w, q)})
        score = [float(((t.dequantize() - w).square() * importance).sum()) for t in (q, flat)]
        assert score[0] < score[1]


def _unweighted_terms(w: torch.Tensor, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    error = w - q.base().dequantize()
    if q.format.side.rank:
        b, a = low_rank(error, q.format.side.rank)
        return {"lowrank_b": b, "lowrank_a": a}
    index = largest(error, q.format.side.outliers(w.shape[1]))
    return {"sparse_index": index, "sparse_value": error.gather(1, index)}


def test_subspace_iteration_against_the_full_decomposition() -> None:
    m = gaussian(700, 800) + 20 * gaussian(700, 12) @ torch.diag(0.8 ** torch.arange(12.0)) @ gaussian(12, 800)
    exact, quick = leading(m, 16, exact=True), leading(m, 16, exact=False)
    torch.testing.assert_close(quick[1][:12], exact[1][:12], rtol=1e-4, atol=1e-3)
    low = [float((m - u * s @ vh).square().sum()) for u, s, vh in (exact, quick)]
    assert low[0] <= low[1] < 1.005 * low[0]
    assert leading(m, 16)[0].shape == (700, 16)


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_planes_are_checked() -> None:
    q = quantize_tensor(spiky(4, 64), "int4-g32+rank1+sparse20")
    for plane in ("lowrank_a", "lowrank_b", "sparse_index", "sparse_value"):
        with pytest.raises(CheckpointError, match=f"has no '{plane}' plane"):
            QuantizedTensor.from_planes(q.format, q.shape, {n: p for n, p in q.planes.items() if n != plane})
    with pytest.raises(CheckpointError, match="has a 'lowrank_a' plane, which int4-g32 does not know"):
        QuantizedTensor.from_planes(q.format.base, q.shape, {**q.base().planes, "lowrank_a": q.planes["lowrank_a"]})
    for bad in (-1, 64):
        planes = {**q.planes, "sparse_index": torch.full_like(q.planes["sparse_index"], bad)}
        with pytest.raises(FormatError, match="points to columns"):
            QuantizedTensor.from_planes(q.format, q.shape, planes).dequantize()


def test_terms_are_checked() -> None:
    w = spiky(4, 64)
    q = quantize_tensor(w, "int4-g32+rank1")
    codes, params = q.params()
    with pytest.raises(FormatError, match=r"'lowrank_b'.* it is missing"):
        pack(q.format, (4, 64), codes, params)
    with pytest.raises(FormatError, match=r"'lowrank_a'.* it is \(2, 64\)"):
        pack(q.format, (4, 64), codes, params, {"lowrank_b": torch.zeros(4, 1), "lowrank_a": torch.zeros(2, 64)})


def test_bad_weights() -> None:
    with pytest.raises(FormatError, match="odd factor may be at most 512"):
        quantize_tensor(torch.zeros(4, 1031), "lm4+rot")
    w = torch.zeros(2, 64)
    w[1, 3] = torch.nan
    with pytest.raises(FormatError, match="NaN or Inf"):
        quantize_tensor(w, "lm4+rot")
    with pytest.raises(FormatError, match="importance has shape"):
        quantize_tensor(torch.zeros(2, 64), "lm4+rot", importance=torch.ones(63))
    assert float(quantize_tensor(torch.zeros(2, 64), "lm4+rot+rank1+sparse20").dequantize().abs().max()) < 1e-5
    with pytest.raises(FormatError, match=r"scales of int4-row.* end at"):
        quantize_tensor(torch.full((2, 64), 3e5), "int4-row+rot")


def test_side_values() -> None:
    assert not Side() and Side(Rotation()) and Side(rank=1) and Side(sparse=1)
    assert Side(Rotation()).stored is False and Side().suffix == ""
