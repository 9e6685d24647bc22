"""The rotation of input channels: against its definition in fp64, its inverse, its exactness, its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from numfit.errors import FormatError
from numfit.formats.rotation import (
    Rotation,
    factors,
    rotate,
    rotate_importance,
    turn_native,
    turn_reference,
    unrotate,
)
from numfit.native import isa, isa_names, library, set_isa
from numfit.orthogonal import signs, splitmix64

SIZES = (1, 2, 3, 8, 9, 12, 64, 96, 136, 257, 576, 896, 1000, 1536, 4096)


def matrix(k: int, seed: int) -> np.ndarray:
    """R by its definition: Sylvester's recursion, the DCT-II formula, the signs."""
    n = k & -k
    m = k // n
    hadamard = np.ones((1, 1))
    while len(hadamard) < n:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    c, a = np.mgrid[:m, :m]
    dct = np.sqrt(np.where(c == 0, 1, 2) / m) * np.cos(np.pi * (2 * a + 1) * c / (2 * m))
    s = [-1 if splitmix64(seed, i) >> 63 else 1 for i in range(k)]
    return np.kron(dct, hadamard / math.sqrt(n)) * np.array(s)


def test_splitmix64() -> None:
    """The published sequence of seed 1234567 (the generator's reference implementation)."""
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    assert [splitmix64(1234567, i) for i in range(5)] == list(known)


def test_signs() -> None:
    s = signs(4096, 0)
    assert set(s.tolist()) == {-1.0, 1.0} and abs(float(s.mean())) < 0.05
    assert torch.equal(s[:100], signs(100, 0)) and not torch.equal(s, signs(4096, 1))


@pytest.mark.parametrize("k", SIZES)
def test_definition_and_inverse(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    x, rotation = torch.randn((3, 2, k), generator=g), Rotation(5)
    r = matrix(k, 5)
    np.testing.assert_allclose(r @ r.T, np.eye(k), atol=1e-12)
    want = x.double().numpy() @ r.T
    np.testing.assert_allclose(rotate(x, rotation).numpy(), want, atol=3e-6 * math.sqrt(math.log2(k) + 1))
    np.testing.assert_allclose(rotate(x.double(), rotation).numpy(), want, atol=1e-6)
    np.testing.assert_allclose(unrotate(rotate(x, rotation), rotation).numpy(), x.numpy(), atol=5e-6)
    np.testing.assert_allclose(rotate(unrotate(x, rotation), rotation).numpy(), x.numpy(), atol=5e-6)


@pytest.mark.parametrize("k", [64, 96, 136])
def test_fixed_order(k: int) -> None:
    """The very bits of the order that docs/format.md prescribes, step by step on single fp32 numbers."""
    m, n = factors(k)
    d = [[np.float32(math.sqrt((1 if c == 0 else 2) / m) * math.cos(math.pi * (2 * a + 1) * c / (2 * m)) / math.sqrt(n))
          for a in range(m)] for c in range(m)]  # fmt: skip
    x = torch.randn(k, generator=torch.Generator().manual_seed(1))

    def butterflies(v: list[np.float32]) -> list[np.float32]:
        h = 1
        while h < n:
            out = list(v)
            for i in range(k):
                if not i & h:
                    out[i], out[i + h] = v[i] + v[i + h], v[i] - v[i + h]
            v, h = out, 2 * h
        return v

    def mixed(v: list[np.float32], back: bool) -> list[np.float32]:
        out = []
        for c in range(m):
            for j in range(n):
                total = None
                for a in range(m):
                    term = (d[a][c] if back else d[c][a]) * v[a * n + j]
                    total = term if total is None else total + term
                assert total is not None
                out.append(total)
        return out

    s = [np.float32(v) for v in signs(k, 9).tolist()]
    forward = mixed(butterflies([a * b for a, b in zip(x.numpy(), s, strict=True)]), False)
    np.testing.assert_array_equal(rotate(x, Rotation(9)).numpy(), np.array(forward, np.float32))
    backward = [a * b for a, b in zip(butterflies(mixed(list(x.numpy()), True)), s, strict=True)]
    np.testing.assert_array_equal(unrotate(x, Rotation(9)).numpy(), np.array(backward, np.float32))


def test_rows_do_not_depend_on_their_company() -> None:
    x = torch.randn((700, 576), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, Rotation())[123], rotate(x[123], Rotation()))
    assert rotate(x[:0], Rotation()).shape == (0, 576)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn((4, 96), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = rotate(x, Rotation())
    assert out.dtype == dtype and torch.equal(out, rotate(x.float(), Rotation()).to(dtype))


def test_gradient_turns_back() -> None:
    x = torch.randn((3, 24), generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: rotate(v, Rotation(2)), x, atol=1e-6)
    assert torch.autograd.gradcheck(lambda v: unrotate(v, Rotation(2)), x, atol=1e-6)


def test_rotated_weights_meet_rotated_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    w, x, rotation = torch.randn((5, 576), generator=g), torch.randn((7, 576), generator=g), Rotation(1)
    torch.testing.assert_close(rotate(x, rotation) @ rotate(w, rotation).T, x @ w.T, atol=1e-4, rtol=1e-5)
    h = x.T @ x
    turned = rotate(rotate(h, rotation).T, rotation)
    torch.testing.assert_close(turned, rotate(x, rotation).T @ rotate(x, rotation), atol=1e-3, rtol=1e-5)


def test_importance() -> None:
    h = torch.rand(96, generator=torch.Generator().manual_seed(0))
    want = rotate(rotate(torch.diag(h), Rotation()).T, Rotation()).diagonal()
    torch.testing.assert_close(rotate_importance(h, Rotation()), want, atol=1e-5, rtol=1e-5)


def test_bad_sizes_and_seeds() -> None:
    with pytest.raises(FormatError, match="odd factor may be at most 512"):
        rotate(torch.zeros(2, 1031), Rotation())
    with pytest.raises(FormatError, match="cannot be rotated"):
        rotate(torch.zeros(2, 0), Rotation())
    with pytest.raises(FormatError, match="seed"):
        Rotation(-1)
    with pytest.raises(FormatError, match="of the kind hadamard"):
        Rotation(0, "dct")


# -- the compiled function -------------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")


@needs_kernels
@pytest.mark.parametrize("k", [*SIZES, 16, 24, 32, 48, 128, 144, 256, 512, 1024, 2048, 4864, 8192, 11008, 14336])
@pytest.mark.parametrize("back", [False, True])
def test_native_bits(k: int, back: bool) -> None:
    """Every instruction set, both directions: the reference's bits; zeros, large and tiny numbers among them."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn((5, k), generator=g)
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3, ::2] = 0
    x[4] = 0
    want = turn_reference(x, Rotation(4), back)
    best = isa()
    try:
        for name in isa_names():
            set_isa(name)
            assert torch.equal(turn_native(x, Rotation(4), back), want), name
    finally:
        set_isa(best or "portable")
    short = x.bfloat16()
    assert torch.equal(turn_native(short, Rotation(4), back), turn_reference(short.float(), Rotation(4), back))


@needs_kernels
def test_native_threads_and_many_rows() -> None:
    x = torch.randn((333, 576), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(turn_native(x, Rotation(), False), turn_reference(x, Rotation(), False))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_not_a_number_stays_in_its_row() -> None:
    x = torch.ones(3, 64)
    x[1, 5] = torch.nan
    y = rotate(x, Rotation())
    assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all()) and torch.equal(y[0], y[2])
