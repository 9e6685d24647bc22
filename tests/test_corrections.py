"""Corrections against their definitions: optimal where they claim it, harmless everywhere, counted in bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from numfit.corrections import (
    alternate,
    bias_shift,
    fold_shift,
    loss,
    low_rank,
    lqer_metric,
    mean_shift,
    outliers,
    shared_low_rank,
)
from numfit.errors import OptionError
from numfit.formats import Params, QuantizedTensor, decode, encode, fit, format, pack
from numfit.formats.rotation import rotate


def problem(n: int, k: int, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs with strong and weak directions, and the rounding error of the weight to three bits."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn((k, k), generator=g) * torch.logspace(1, -1, k)
    x = torch.randn((tokens, k), generator=g) @ mix / math.sqrt(k)
    w = torch.randn((n, k), generator=g)
    params = fit(format("int3-g16"), w)
    return w, x, w - decode(format("int3-g16"), encode(format("int3-g16"), w, params), params)


def moment(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def left(error: Tensor, rank: int, metric: Tensor | None, judge: Tensor) -> float:
    b, a = low_rank(error, rank, metric)
    return loss(error - b @ a, judge)


# -- low rank --------------------------------------------------------------------------------------------------------------


def test_loss_is_the_output_error() -> None:
    _, x, error = problem(24, 32)
    want = 2 / len(x) * float((x.double() @ error.double().T).square().sum())
    assert loss(error, moment(x)) == pytest.approx(want, rel=1e-5)
    assert loss(error) == pytest.approx(float(error.double().square().sum()))
    assert loss(error, torch.arange(32.0)) == pytest.approx(loss(error, torch.diag(torch.arange(32.0))))


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
@pytest.mark.parametrize("known", ["nothing", "diagonal", "all"])
def test_full_rank_restores_the_weight(shape: tuple[int, int], known: str) -> None:
    _, x, error = problem(*shape)
    metric = {"nothing": None, "diagonal": moment(x).diagonal(), "all": moment(x)}[known]
    b, a = low_rank(error, min(shape), metric)
    torch.testing.assert_close(b @ a, error, atol=1e-5, rtol=1e-4)
    more_b, more_a = low_rank(error, min(shape) + 5, metric)
    assert more_b.shape == (shape[0], min(shape) + 5) and more_a.shape == (min(shape) + 5, shape[1])
    torch.testing.assert_close(more_b @ more_a, error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
def test_against_the_published_form(shape: tuple[int, int]) -> None:
    """SVD of E·M with M = Q·Λ^½ of eigh(H), A brought back by M⁻¹: EoRA's recipe, in fp64."""
    _, x, error = problem(*shape)
    h = moment(x).double()
    values, vectors = torch.linalg.eigh(h)
    m, inverse = vectors * values.sqrt(), (vectors / values.sqrt()).T
    u, s, vh = torch.linalg.svd(error.double() @ m, full_matrices=False)
    for rank in (1, 5, 20):
        want = (u[:, :rank] * s[:rank]) @ vh[:rank] @ inverse
        b, a = low_rank(error, rank, h)
        torch.testing.assert_close(b.double() @ a.double(), want, atol=1e-5, rtol=1e-4)
        assert loss(error - b @ a, h) == pytest.approx(float(s[rank:].square().sum()), rel=1e-4)


def test_more_knowledge_is_never_worse_at_any_rank() -> None:
    _, x, error = problem(40, 56)
    h = moment(x)
    previous = loss(error, h)
    for rank in range(1, 41):
        full, diagonal, plain = (left(error, rank, m, h) for m in (h, h.diagonal(), None))
        assert full <= diagonal * (1 + 1e-5) + 1e-6 and full <= plain * (1 + 1e-5) + 1e-6
        assert full <= previous * (1 + 1e-5) + 1e-6
        previous = full
        assert left(error, rank, None, torch.eye(56)) <= left(error, rank, h, torch.eye(56)) * (1 + 1e-5) + 1e-6
    assert left(error, 8, h, h) < 0.9 * left(error, 8, None, h)
    assert left(error, 8, h.diagonal(), h.diagonal()) < left(error, 8, None, h.diagonal())


def test_singular_second_moments_do_no_harm() -> None:
    """Fewer tokens than channels, and dead channels."""
    _, x, error = problem(24, 64, tokens=20)
    x[:, 7] = 0
    h = moment(x)
    b, a = low_rank(error, 20, h)
    assert bool(b.isfinite().all()) and bool(a.isfinite().all()) and float(a.abs().max()) < 100
    assert loss(error - b @ a, h) < 1e-5 * loss(error, h)  # rank 20 serves 20 tokens
    assert loss(error - b @ a) <= loss(error) * (1 + 1e-6)  # a projection of the error never makes it larger
    zero_b, zero_a = low_rank(torch.zeros(4, 8), 2, torch.zeros(8, 8))
    assert float(zero_b.abs().max()) == 0 and float(zero_a.abs().max()) == 0


def test_scale_of_the_second_moment_does_not_matter() -> None:
    _, x, error = problem(16, 24)
    for factor in (1e-8, 1e8):
        b, a = low_rank(error, 4, moment(x) * factor)
        c, d = low_rank(error, 4, moment(x))
        torch.testing.assert_close(b @ a, c @ d, atol=1e-5, rtol=1e-4)


def test_factors_are_balanced_and_survive_fp16() -> None:
    _, x, error = problem(64, 96)
    h = moment(x)
    b, a = low_rank(error * 1e-3, 8, h)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=1e-7)
    exact, stored = loss(error * 1e-3 - b @ a, h), loss(error * 1e-3 - b.half().float() @ a.half().float(), h)
    assert stored < exact * 1.001


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("known", ["nothing", "diagonal", "all"])
def test_randomized_is_nearly_as_good(shape: tuple[int, int], known: str) -> None:
    _, x, error = problem(*shape)
    h = moment(x)
    metric = {"nothing": None, "diagonal": h.diagonal(), "all": h}[known]
    for rank in (4, 16):
        exact = loss(error - torch.matmul(*low_rank(error, rank, metric, randomized=False)), metric)
        quick = loss(error - torch.matmul(*low_rank(error, rank, metric, randomized=True)), metric)
        assert exact * (1 - 1e-5) <= quick <= exact * 1.02
    again = low_rank(error, 4, metric, randomized=True)
    assert all(torch.equal(p, q) for p, q in zip(again, low_rank(error, 4, metric, randomized=True), strict=True))


def test_lqer_metric() -> None:
    a = torch.tensor([0.5, 1.0, 2.0, 8.0])
    torch.testing.assert_close(lqer_metric(a), (a / math.sqrt(0.5 * 8.0)).square())
    assert bool(lqer_metric(torch.tensor([0.0, 1.0])).isfinite().all())


def test_shared_factor_of_one_is_the_best_correction() -> None:
    _, x, error = problem(24, 32)
    (b,), a = shared_low_rank([error], 5, moment(x))
    alone = low_rank(error, 5, moment(x))
    assert torch.equal(b, alone[0]) and torch.equal(a, alone[1])


def test_shared_factor_of_three() -> None:
    g = torch.Generator().manual_seed(3)
    _, x, _ = problem(8, 32)
    h, errors = moment(x), [torch.randn((n, 32), generator=g) for n in (16, 8, 24)]
    bs, a = shared_low_rank(errors, 6, h)
    assert [b.shape for b in bs] == [(16, 6), (8, 6), (24, 6)] and a.shape == (6, 32)
    together = sum(loss(e - b @ a, h) for e, b in zip(errors, bs, strict=True))
    assert together == pytest.approx(left(torch.cat(errors), 6, h, h), rel=1e-5)
    assert together >= sum(left(e, 6, h, h) for e in errors)  # what sharing costs at equal rank
    assert together < sum(left(e, 2, h, h) for e in errors)  # and what it saves at equal bits of A


def test_alternation_never_does_harm() -> None:
    w, x, _ = problem(48, 64)
    h, fmt = moment(x), format("int2-g32")

    def quantize(v: Tensor) -> tuple[Tensor, tuple[Tensor, Params]]:
        params = fit(fmt, v)
        codes = encode(fmt, v, params)
        return decode(fmt, codes, params), (codes, params)

    scores = []
    for rounds in (1, 2, 4):
        (codes, params), b, a = alternate(w, 8, quantize, h, rounds)
        scores.append(loss(w - decode(fmt, codes, params) - b @ a, h))
        assert torch.equal(b, b.half().float())
    assert scores[0] >= scores[1] >= scores[2] and scores[2] < scores[0]


@pytest.mark.parametrize("name", ["int3-g16+rank4", "lm3-row+rot+rank4", "lm3-row+rot+rank4+sparse50"])
def test_stored_corrections_are_what_was_computed(name: str) -> None:
    """Weights and second moment in rotated coordinates, terms packed, the file's weight judged in the original ones."""
    w, x, _ = problem(32, 48)
    h, fmt = moment(x), format(name)
    turned, turned_h = w, h
    if fmt.side.rotation is not None:
        turned = rotate(w, fmt.side.rotation)
        turned_h = rotate(rotate(h, fmt.side.rotation).T, fmt.side.rotation)
    params = fit(fmt.base, turned)
    codes = encode(fmt.base, turned, params)
    error = turned - decode(fmt.base, codes, params)
    terms: dict[str, Tensor] = {}
    b, a = low_rank(error, fmt.side.rank, turned_h)
    terms |= {"lowrank_b": b, "lowrank_a": a}
    remains = error - b @ a
    if fmt.side.sparse:
        index, value = outliers(remains, fmt.side.outliers(48), turned_h)
        terms |= {"sparse_index": index, "sparse_value": value}
        remains = remains.scatter_add(1, index, -value)
    q = pack(fmt, (32, 48), codes, params, terms)
    assert loss(w - q.dequantize(), h) == pytest.approx(loss(remains, turned_h), rel=1e-3)
    assert loss(w - q.dequantize(), h) < 0.8 * loss(error, turned_h)
    assert 8 * q.nbytes / w.numel() == fmt.bits_per_weight((32, 48)) > fmt.base.bits_per_weight((32, 48))
    assert isinstance(QuantizedTensor.from_planes(fmt, (32, 48), q.planes), QuantizedTensor)


# -- sparse ----------------------------------------------------------------------------------------------------------------


def test_diagonal_choice_is_the_best() -> None:
    """Against all choices of two out of six."""
    _, _, error = problem(5, 6)
    for metric in (None, torch.tensor([1.0, 5.0, 0.1, 2.0, 0.0, 1.0])):
        weight = torch.ones(6) if metric is None else metric
        index, value = outliers(error, 2, metric)
        have = ((error.scatter_add(1, index, -value)).square() * weight).sum(1)
        cost = error.square() * weight
        every = torch.stack([cost.sum(1) - cost[:, i] - cost[:, j] for i in range(6) for j in range(i)])
        torch.testing.assert_close(have, every.min(0).values, atol=1e-6, rtol=1e-5)


def test_full_metric_is_never_worse_than_its_diagonal() -> None:
    _, x, error = problem(64, 48)
    h = moment(x)
    previous = torch.full((64,), torch.inf)
    for count in (1, 3, 9, 48):
        errors = []
        for metric in (h, h.diagonal()):
            index, value = outliers(error, count, metric)
            assert bool((index.diff(dim=1) > 0).all()) and index.shape == (64, count)
            d = error.scatter_add(1, index, -value)
            errors.append(((d @ h) * d).sum(1))
        scale = ((error @ h) * error).sum(1)
        assert bool((errors[0] <= errors[1] + 1e-4 * scale).all())
        assert bool((errors[0] <= previous + 1e-4 * scale).all())
        previous = errors[0]
    assert float(previous.max()) < 1e-5 * float(scale.max())  # all weights corrected: nothing is left


def test_full_metric_pays() -> None:
    _, x, error = problem(64, 48)
    h = moment(x)
    d = [error.scatter_add(1, i, -v) for i, v in (outliers(error, 4, h), outliers(error, 4, h.diagonal()))]
    assert loss(d[0], h) < 0.9 * loss(d[1], h)


def test_corrections_stay_small_where_the_text_shows_little() -> None:
    """An input that is hardly ever on looks like another one: no reason to write any number into its weights."""
    _, x, error = problem(64, 48)
    x[:, 7] = 1e-5 * x[:, 8] + 1e-7 * x[:, 7]
    h = moment(x)
    index, value = outliers(error, 4, h)
    d = error.scatter_add(1, index, -value)
    assert float(value.abs().max()) < 5 * float(error.abs().max())
    assert loss(d, h) < 0.9 * loss(error, h) and float(d.square().sum()) < float(error.square().sum())


# -- means -----------------------------------------------------------------------------------------------------------------


def test_bias_shift_restores_the_mean_output() -> None:
    w, x, error = problem(16, 24)
    x = x + torch.linspace(-1, 3, 24)
    shift = bias_shift(error, x.mean(0))
    torch.testing.assert_close((x @ (w - error).T + shift).mean(0), (x @ w.T).mean(0), atol=1e-4, rtol=1e-4)
    before, after = ((x @ error.T - s).square().mean() for s in (0, shift))
    assert after < before


def test_gated_shift_never_raises_the_error() -> None:
    g = torch.Generator().manual_seed(0)
    d = torch.randn((500, 64), generator=g) + torch.linspace(-2, 2, 64)
    mean, square = d.mean(0), d.square().mean(0)
    for gate in (0.0, 0.3, 0.5, 1.0):
        shift = mean_shift(mean, square, gate)
        after = (d - shift).square().mean(0)
        assert bool((after <= square * (1 + 1e-5)).all())
        share = mean.square() / square
        assert torch.equal(shift != 0, share.double() >= gate) or gate in (0.0, 1.0)
        assert bool((after[shift != 0] <= (1 - gate) * square[shift != 0] * (1 + 1e-4) + 1e-6).all())
    assert float(mean_shift(torch.zeros(3), torch.zeros(3)).abs().max()) == 0


def test_folded_shift() -> None:
    w, x, _ = problem(16, 24)
    shift = torch.linspace(-1, 1, 24)
    torch.testing.assert_close(x @ w.T + fold_shift(w, shift), (x + shift) @ w.T, atol=1e-4, rtol=1e-4)


# -- columns ---------------------------------------------------------------------------------------------------------------


def column_loss(w: Tensor, name: str, c: Tensor, h: Tensor | None) -> float:
    fmt = format(name)
    h = torch.ones(w.shape[1]) if h is None else h
    params = fit(fmt, w / c, h * c.square())
    return float((h * (w - c * decode(fmt, encode(fmt, w / c, params), params)).square().sum(0)).double().sum())


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    error = torch.ones(4, 8)
    with pytest.raises(OptionError, match=r"described by a vector \[8\] or a matrix \[8, 8\], not by one of shape \(7,\)"):
        low_rank(error, 2, torch.ones(7))
    with pytest.raises(OptionError, match="rank of at least 1"):
        low_rank(error, 0)
    with pytest.raises(OptionError, match="what is known of the inputs holds NaN"):
        low_rank(error, 2, torch.full((8,), torch.nan))
    with pytest.raises(OptionError, match="the error holds NaN"):
        outliers(error * torch.inf, 2)
    with pytest.raises(OptionError, match="error \\[N, K\\] of floats"):
        low_rank(torch.ones(8), 2)
    with pytest.raises(OptionError, match="1 to 8 corrections, not 9"):
        outliers(error, 9)
    with pytest.raises(OptionError, match="weights of the same inputs"):
        shared_low_rank([error, torch.ones(4, 9)], 2)
    with pytest.raises(OptionError, match="weights of the same inputs"):
        shared_low_rank([], 2)
    with pytest.raises(OptionError, match="one mean per input channel"):
        bias_shift(error, torch.ones(4))
    with pytest.raises(OptionError, match="different channels"):
        mean_shift(torch.ones(3), torch.ones(4))
    with pytest.raises(OptionError, match="share from 0 to 1"):
        mean_shift(torch.ones(3), torch.ones(3), 1.5)
    with pytest.raises(OptionError, match="at least one round"):
        alternate(error, 1, lambda w: (w, None), rounds=0)
