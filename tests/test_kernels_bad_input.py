"""Bad input to the kernels: one sentence, no crash, and the next call works."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_abi import Linear, Planes, Refused
from kernel_oracle import dense, sample

from numfit.errors import OptionError
from numfit.formats import format, onepass
from numfit.kvcache import native as kvcache
from numfit.native import ERROR_BYTES, isa, isa_names, library, set_isa, set_threads, threads

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")


def one_sentence(message: str) -> None:
    assert 10 < len(message) < ERROR_BYTES - 1 and "\n" not in message, message


# -- the C interface ------------------------------------------------------------------------------------------------------


def planes(name: str = "mant4-g32") -> Planes:
    return Planes(sample(format(name), 18, 96, seed=0))


MATRICES: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "no codes": ("mant4-g32", lambda m: setattr(m, "codes", None), "null"),
    "no scales": ("mant4-g32", lambda m: setattr(m, "scale", None), "null"),
    "no levels": ("mant4-g32", lambda m: setattr(m, "levels", None), "null"),
    "no members": ("mant4-g32", lambda m: setattr(m, "member", None), "member"),
    "no rows": ("int4-g32", lambda m: setattr(m, "rows", 0), "row"),
    "negative rows": ("int4-g32", lambda m: setattr(m, "rows", -3), "row"),
    "no columns": ("int4-g32", lambda m: setattr(m, "cols", 0), "column"),
    "too many rows": ("int4-g32", lambda m: setattr(m, "rows", 1 << 40), "large"),
    "no bits": ("int4-g32", lambda m: setattr(m, "bits", 0), "bits"),
    "nine bits": ("int4-g32", lambda m: setattr(m, "bits", 9), "bits"),
    "no grids": ("int4-g32", lambda m: setattr(m, "members", 0), "least one"),
    "blocks of nothing": ("int4-g32", lambda m: setattr(m, "block", 0), "least one"),
    "units of nothing": ("mant4-g32", lambda m: setattr(m, "unit", -1), "least one"),
    "an unknown scale": ("int4-g32", lambda m: setattr(m, "scale_kind", 7), "scale"),
    "a negative scale kind": ("int4-g32", lambda m: setattr(m, "scale_kind", -1), "scale"),
    "a row scale with blocks": ("int4-g32", lambda m: setattr(m, "scale_kind", 0), "blocks"),
    "a zero point with members": ("mant4-g32", lambda m: setattr(m, "zero", m.member), "exclude"),
}


@pytest.mark.parametrize("case", MATRICES)
def test_impossible_matrices_are_refused(case: str) -> None:
    name, change, word = MATRICES[case]
    p = planes(name)
    change(p.matrix)
    with pytest.raises(Refused, match=word) as caught:
        Linear(p)
    one_sentence(str(caught.value))


@pytest.mark.parametrize("change", ["member", "e4m3", "e8m0", "e3m3", "code"])
def test_damaged_planes_are_refused(change: str) -> None:
    """Words that stand for no number, and members that there are not."""
    if change == "code":
        fmt = format("e4m3-g32")
        bad = Planes(sample(fmt, 18, 96, seed=0, mute_codes=True))
        assert (bad.parts["codes"] == 127).any()
    else:
        name = {"member": "ams-e2m2k5-g16", "e4m3": "int4-g32@e4m3", "e8m0": "int4-g32@e8m0", "e3m3": "int4-g32@e3m3"}[change]
        bad = planes(name)
        bad.parts["member" if change == "member" else "scale"][17, 1] = {"member": 2, "e4m3": 127, "e8m0": 255, "e3m3": 64}[
            change
        ]
    with pytest.raises(Refused, match="damaged") as caught:
        Linear(bad)
    one_sentence(str(caught.value))


@pytest.mark.parametrize(("bits", "members", "unit"), [(8, 3, 16), (4, 33, 16), (7, 3, 16), (8, 2, 4), (5, 9, 4), (6, 5, 8)])
def test_families_without_a_kernel_are_refused(bits: int, members: int, unit: int) -> None:
    p = planes("mant4-g32")
    levels = np.ones((members, 1 << bits), dtype=np.float32)
    codes = np.zeros((18, 96 * bits // 8 + 1), dtype=np.uint8)
    member = np.zeros((18, 96), dtype=np.uint8)
    p.matrix.bits, p.matrix.members, p.matrix.unit = bits, members, unit
    p.matrix.levels, p.matrix.codes, p.matrix.member = levels.ctypes.data, codes.ctypes.data, member.ctypes.data
    with pytest.raises(Refused, match=f"{members} members of {bits}-bit codes have no kernel"):
        Linear(p)


def test_impossible_calls_are_refused() -> None:
    q = sample(format("mant4-g32"), 18, 96, seed=0)
    w = Linear(Planes(q))
    x, y = np.ones((3, 96), dtype=np.float32), np.full((3, 18), 7, dtype=np.float32)
    a, b = x.ctypes.data, y.ctypes.data
    for bf16 in (False, True):
        for m, ldx, ldy, mode in ((3, 95, 18, 0), (3, 96, 17, 0), (-1, 96, 18, 0), (3, 96, 18, 2), (3, 96, 18, -1)):
            arguments = (a, m, ldx, b, ldy, None, mode)
            with pytest.raises(Refused) as caught:
                w.call(*arguments, bf16=bf16)
            one_sentence(str(caught.value))
    assert (y == 7).all()
    for row in (-1, 18, 1 << 62, -(1 << 62)):
        with pytest.raises(Refused, match=f"no row {row} in a matrix of 18"):
            w.gather(np.array([0, row]))
    error = ctypes.create_string_buffer(ERROR_BYTES)
    lib = library()
    assert lib is not None
    assert lib.nf_apply(None, a, 3, 96, b, 18, None, 0, error) != 0 and error.value
    assert lib.nf_gather(None, a, 0, b, error) != 0 and lib.nf_repack(None, error) is None
    lib.nf_free(None)
    np.testing.assert_allclose(w.apply(x, exact=True), x @ dense(q).T, rtol=1e-4, atol=1e-4)


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def refused(name: str, *arguments: Any) -> None:
    """A function of the library says in one sentence what it does not take."""
    lib, error = library(), ctypes.create_string_buffer(ERROR_BYTES)
    assert lib is not None and getattr(lib, name)(*arguments, error) != 0, arguments
    one_sentence(error.value.decode())


SIZES = (0, -1, -16, -(1 << 62), 1 << 62, (1 << 63) - 1)


def test_impossible_attention_is_refused() -> None:
    heads, queries, dim, tokens, block = 6, 2, 32, 48, 128
    codes, scale = torch.full((heads, block, dim), 3, dtype=torch.uint8), torch.ones(heads, block, 1).half()
    planes = [(ctypes.c_void_p * 1)(t.data_ptr()) for t in (codes, scale)]
    q, mask = torch.zeros(heads, queries, dim), torch.zeros(2, tokens)
    results = [torch.full((heads, queries, n), 7.0) for n in (1, 1, dim)]

    def arguments(changed: dict[str, Any] | None = None, **sizes: Any) -> list[Any]:
        stream = kvcache._Stream(bits=8, row=dim, group=dim, members=1, codes=ctypes.cast(planes[0], ctypes.c_void_p),
                                 scale=ctypes.cast(planes[1], ctypes.c_void_p))  # fmt: skip
        for name, value in (changed or {}).items():
            setattr(stream, name, value)
        given = {"keys": ctypes.byref(stream), "values": ctypes.byref(stream), "heads": heads, "queries": queries, "dim": dim,
                 "width": dim, "tokens": tokens, "block": block, "q": q.data_ptr(), "bias": None, "mask": mask.data_ptr(),
                 "mask_heads": 3, "most": results[0].data_ptr(), "sum": results[1].data_ptr(),
                 "out": results[2].data_ptr()}  # fmt: skip
        return list((given | sizes).values())

    for size in ("heads", "queries", "dim", "width", "tokens", "block"):
        for value in SIZES:
            refused("nf_attend", *arguments(**{size: value}))
            refused("nf_attend", *arguments({"channel": 1}, **{size: value}))
    for mask_heads in (0, -1, 4, 7, -3):  # does not divide the heads
        refused("nf_attend", *arguments(mask_heads=mask_heads))
    for null in ("keys", "values", "q", "most", "sum", "out"):
        refused("nf_attend", *arguments(**{null: None}))
    empty = ctypes.cast((ctypes.c_void_p * 1)(), ctypes.c_void_p)
    for change in ({"codes": None}, {"scale": None}, {"codes": empty}, {"scale": empty}, {"low": empty},
                   {"row": 0}, {"row": 64}, {"group": 0}, {"group": 64}, {"bits": 5}, {"unit": -1},
                   {"unit": 64}, {"members": 2}):  # fmt: skip
        refused("nf_attend", *arguments(change))
    assert all(bool((r == 7).all()) for r in results)
    lib, error = library(), ctypes.create_string_buffer(ERROR_BYTES)
    assert lib is not None and lib.nf_attend(*arguments(), error) == 0
    assert torch.equal(results[2] / results[1], torch.full_like(results[2], 3.0))
    assert lib.nf_attend(*arguments(mask=None, mask_heads=0), error) == 0


def test_impossible_searches_are_refused() -> None:
    rows, cols = 3, 64
    levels, cuts, tops = torch.arange(8.0), torch.arange(7) + 0.5, torch.tensor([7.0])
    factors, w = torch.tensor([1.0, 0.9]), torch.ones(rows, cols)
    scale, member = torch.full((rows, 2), 7.0), torch.zeros(rows, 2, dtype=torch.uint8)
    scales, errors = torch.ones(1, 2), torch.full((rows, 1, 2), 7.0)
    lib, error = library(), ctypes.create_string_buffer(ERROR_BYTES)
    assert lib is not None

    def request(**changed: Any) -> Any:
        parts = {"members": 1, "ranks": 8, "levels": levels.data_ptr(), "thresholds": cuts.data_ptr(), "tops": tops.data_ptr(),
                 "mirrored": 1, "block": 32, "factors": factors.data_ptr(), "candidates": 2}  # fmt: skip
        return ctypes.byref(onepass._Search(**(parts | changed)))

    def arrays(**changed: Any) -> list[int | None]:
        given = {"h": None, "parent": None, "scale": scale, "error": None, "member": None, "zero": None}
        return [pointer(t) for t in (given | changed).values()]

    impossible = ({"members": 0}, {"members": 300}, {"members": -1}, {"ranks": 0}, {"ranks": -1}, {"ranks": 257},
                  {"levels": None}, {"thresholds": None}, {"tops": None}, {"factors": None}, {"candidates": 0},
                  {"candidates": -1}, {"block": 0}, {"block": -1}, {"block": 1 << 62}, {"unit": -1},
                  {"unit": 1 << 62}, {"promising": 2}, {"rounding": 9}, {"affine": 1, "members": 2})  # fmt: skip
    for how in [None, *(request(**change) for change in impossible)]:
        refused("nf_fit", how, w.data_ptr(), rows, cols, *arrays())
        refused("nf_row_errors", how, w.data_ptr(), rows, cols, None, scales.data_ptr(), None, errors.data_ptr())
    for n, k in ((-1, cols), (rows, 0), (rows, -1), (1 << 62, cols), (rows, 1 << 62), (1 << 40, 1 << 40), (0, 0)):
        refused("nf_fit", request(), w.data_ptr(), n, k, *arrays())
        refused("nf_row_errors", request(), w.data_ptr(), n, k, None, scales.data_ptr(), None, errors.data_ptr())
    refused("nf_fit", request(), None, rows, cols, *arrays())
    refused("nf_fit", request(), w.data_ptr(), rows, cols, *arrays(scale=None))
    refused("nf_fit", request(each=1), w.data_ptr(), rows, cols, *arrays())
    refused("nf_fit", request(affine=1), w.data_ptr(), rows, cols, *arrays())
    refused("nf_fit", request(unit=4), w.data_ptr(), rows, cols, *arrays())
    for arguments in ((None, 1, 1), (1, None, 1), (1, 1, None)):
        a, b, c = (t.data_ptr() if given else None for t, given in zip((w, scales, errors), arguments))
        refused("nf_row_errors", request(), a, rows, cols, None, b, None, c)
    assert lib.nf_fit(request(), None, 0, cols, *arrays(scale=None), error) == 0  # no rows: nothing to do
    assert lib.nf_row_errors(request(), None, 0, cols, None, None, None, None, error) == 0
    assert bool((scale == 7).all()) and bool((errors == 7).all())
    assert lib.nf_fit(request(), w.data_ptr(), rows, cols, *arrays(member=member), error) == 0
    assert lib.nf_row_errors(request(), w.data_ptr(), rows, cols, None, scales.data_ptr(), None, errors.data_ptr(), error) == 0
    assert bool((scale != 7).all()) and bool((errors == 0).all())


def test_impossible_encodings_are_refused() -> None:
    rows, cols = 3, 64
    cuts, table = torch.arange(7) + 0.5, torch.arange(8, dtype=torch.uint8)
    w, scale = torch.full((rows, cols), 5.0), torch.ones(rows, 2)
    out = torch.full((rows, cols), 77, dtype=torch.uint8)
    lib, error = library(), ctypes.create_string_buffer(ERROR_BYTES)
    assert lib is not None

    def request(**changed: Any) -> Any:
        parts = {"members": 1, "ranks": 8, "thresholds": cuts.data_ptr(), "codes": table.data_ptr(), "block": 32, "unit": 32,
                 "scale": scale.data_ptr()}  # fmt: skip
        return ctypes.byref(onepass._Codes(**(parts | changed)))

    whole = (w.data_ptr(), rows, cols, out.data_ptr())
    for change in ({"members": 0}, {"members": 257}, {"ranks": 0}, {"ranks": 257}, {"thresholds": None}, {"codes": None},
                   {"block": 0}, {"block": 1 << 62, "unit": 1 << 62}, {"unit": 0}, {"unit": 33}, {"scale": None}):  # fmt: skip
        refused("nf_encode", request(**change), *whole)
    refused("nf_encode", None, *whole)
    refused("nf_encode", request(), None, rows, cols, out.data_ptr())
    refused("nf_encode", request(), w.data_ptr(), rows, cols, None)
    for n, k in ((-1, cols), (rows, -1), (1 << 62, cols), (rows, 1 << 62), (1 << 40, 1 << 40)):
        refused("nf_encode", request(), w.data_ptr(), n, k, out.data_ptr())
    for n, k in ((0, cols), (rows, 0), (0, 0)):  # nothing to do
        assert lib.nf_encode(request(), None, n, k, None, error) == 0
        assert lib.nf_encode(request(), w.data_ptr(), n, k, out.data_ptr(), error) == 0
    assert bool((out == 77).all())
    assert lib.nf_encode(request(), *whole, error) == 0 and bool((out == 5).all())


def test_unknown_instruction_sets_are_refused() -> None:
    before = isa()
    for name in ("mmx", "", "AVX2 ", "x" * 1000):
        with pytest.raises(OptionError) as caught:
            set_isa(name)
        assert "portable" in str(caught.value)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        lib = library()
        assert lib is not None and lib.nf_set_isa(name.encode(), error) != 0
        one_sentence(error.value.decode())
    assert isa() == before and before in isa_names()


def test_numbers_of_threads() -> None:
    w = Linear(planes())
    x = np.ones((40, 96), dtype=np.float32)
    y = w.apply(x)
    before = threads()
    try:
        for bad in (0, -1):
            with pytest.raises(OptionError, match="at least 1"):
                set_threads(bad)
        for many in (64, 100_000):  # more than there are cores
            set_threads(many)
            assert 1 <= threads() <= many
            for _ in range(20):
                np.testing.assert_array_equal(w.apply(x), y)
    finally:
        set_threads(before)


LIMITED = """
import resource, sys
import numpy as np
from kernel_abi import Linear, Planes
from kernel_oracle import sample
from numfit.formats import format
from numfit.native import load, set_threads

load(sys.argv[1])
w = Linear(Planes(sample(format("mant4-g32"), 500, 96, seed=0)))
x = np.ones((40, 96), dtype=np.float32)
y = w.apply(x)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (30 << 20),) * 2)
set_threads(200)
assert np.array_equal(w.apply(x), y)
print("as before")
"""


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def alone(script: str, **environment: str) -> None:
    """Run a script with the library under test in a process of its own, where it prints "as before"."""
    lib = library()
    assert lib is not None
    run = subprocess.run(
        [sys.executable, "-c", script, os.path.abspath(lib._name)],
        cwd=Path(__file__).parent, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout == "as before\n", run.stdout + run.stderr


def limits_memory() -> None:
    if "asan" in Path("/proc/self/maps").read_text():
        pytest.skip("a sanitizer's own memory leaves no room for a limit")


@linux
def test_threads_that_cannot_be_had() -> None:
    """Where the system grants no more threads (here: no memory for their stacks), fewer do the work."""
    limits_memory()
    alone(LIMITED)


# Each thread needs 8 MB to rotate a row of `turned`, and the caller 50 MB for so many tokens, where there are 4 MB.
WITHOUT_MEMORY = """
import resource, sys
import numpy as np, torch
from kernel_abi import Linear, Planes, Refused
from kernel_oracle import sample
import numfit.formats.rotation
from numfit.errors import NumfitError
from numfit.formats import format
from numfit.native import call, load

load(sys.argv[1])
torch.set_num_threads(2)

def rotate(x):
    signs, mixing = np.ones(x.shape[1], dtype=np.float32), np.ones(1, dtype=np.float32)
    call("nf_rotate", x.ctypes.data, 0, *x.shape, signs.ctypes.data, mixing.ctypes.data, 1, 0, x.ctypes.data)
    return x

wide, narrow = np.zeros((8, 1 << 21), dtype=np.float32), np.ones((64, 4096), dtype=np.float32)
signs, mixing = np.ones(wide.shape[1], dtype=np.float32), np.ones(1, dtype=np.float32)
turned = rotate(narrow.copy())
w = Linear(Planes(sample(format("mant4-g32"), 18, 96, seed=0)))
x = np.ones((100_000, 96), dtype=np.float32)
half, y = x.astype(np.uint16), np.empty((len(x), 18), dtype=np.float32)
few = w.apply(x[:40], exact=True)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20), resource.RLIM_INFINITY))
for _ in range(20):
    try:
        call("nf_rotate", wide.ctypes.data, 0, *wide.shape, signs.ctypes.data, mixing.ctypes.data, 1, 0, wide.ctypes.data)
    except MemoryError as error:
        assert isinstance(error, NumfitError) and str(error) == "there is not enough memory to rotate this tensor", error
    else:
        raise AssertionError("8 MB were there")
    assert np.array_equal(rotate(narrow.copy()), turned)
for values, bf16 in ((x, False), (half, True)):
    try:
        w.call(values.ctypes.data, len(x), 96, y.ctypes.data, 18, None, 1, bf16)
    except Refused as refused:
        assert "not enough memory" in str(refused), refused
    else:
        raise AssertionError("50 MB were there")
    assert np.array_equal(w.apply(x[:40], exact=True), few)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert (rotate(wide) == 0).all()
print("as before")
"""


@linux
def test_memory_that_cannot_be_had() -> None:
    """A thread of the pool or the caller finds no memory: an error that says so, and the next call works."""
    limits_memory()
    alone(WITHOUT_MEMORY, MALLOC_MMAP_THRESHOLD_=str(1 << 20))  # else heaps may have 8 MB to spare


FORKING = """
import os, sys, time
import numpy as np
from kernel_abi import Linear, Planes
from kernel_oracle import sample
from numfit.formats import format
from numfit.native import load, set_threads, threads

load(sys.argv[1])
set_threads(2)
w = Linear(Planes(sample(format("mant4-g32"), 500, 960, seed=0)))
x = np.ones((40, 960), dtype=np.float32)
y = w.apply(x)
for pause in (0.0, 0.1):  # its other thread looks for work, or sleeps
    w.apply(x)
    time.sleep(pause)
    child = os.fork()
    if child == 0:
        before, same = len(os.listdir("/proc/self/task")), True
        for _ in range(100):
            same = same and np.array_equal(w.apply(x), y)
        after = len(os.listdir("/proc/self/task"))
        os._exit(0 if same and threads() == 2 and after == before + 1 else 1)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        raise AssertionError("the child hangs")
    assert status == 0, status
    assert np.array_equal(w.apply(x), y)
print("as before")
"""


@linux
def test_a_forked_process_has_threads_of_its_own() -> None:
    alone(FORKING)


SPARE = """
import os, sys, time
import numpy as np
from kernel_abi import Linear, Planes
from kernel_oracle import sample
from numfit.formats import format
from numfit.native import load, set_threads

def ticks():  # of processor time, of each thread
    stats = {t: open(f"/proc/self/task/{t}/stat").read().rsplit(")", 1)[1].split() for t in os.listdir("/proc/self/task")}
    return {thread: int(s[11]) + int(s[12]) for thread, s in stats.items()}

load(sys.argv[1])
w = Linear(Planes(sample(format("mant4-g32"), 500, 960, seed=0)))
x = np.ones((40, 960), dtype=np.float32)
y = w.apply(x)

def run(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert np.array_equal(w.apply(x), y)

for wanted in (2, 1):
    set_threads(6)
    run(0.05)
    set_threads(wanted)
    run(0.05)
    before = ticks()
    run(1.0)
    busy = [thread for thread, count in ticks().items() if count - before.get(thread, 0) > 1]
    assert len(busy) <= wanted, (wanted, busy)
print("as before")
"""


@linux
def test_threads_above_the_wanted_number_rest() -> None:
    alone(SPARE)
