"""The compiled library of CPU kernels: finding it, checking it, declaring its functions to ctypes.

Its C interface is kernels/cpu/numfit.h. It is reached by ctypes, at a microsecond a call, because so one build serves every
Python and every torch. A room that calls functions of its own declares them with `declare`. Where the library is missing,
because there was no compiler when numfit was installed, `library()` is None, a warning says so once, and callers run their
PyTorch code.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from typing import Any

from numfit.errors import NumfitError, OptionError, OutOfMemoryError

ABI = 2  # NF_ABI
ERROR_BYTES = 256  # NF_ERROR
NO_MEMORY = 2  # NF_NO_MEMORY


class Matrix(ctypes.Structure):
    """`nf_matrix`: a quantized matrix as the file has it. Pointers are addresses, None for null."""

    _fields_ = (
        ("rows", c_int64),
        ("cols", c_int64),
        ("bits", c_int32),
        ("members", c_int32),
        ("block", c_int64),
        ("unit", c_int64),
        ("scale_kind", c_int32),
        ("reserved", c_int32),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("parent", c_void_p),
        ("member", c_void_p),
        ("zero", c_void_p),
        ("levels", c_void_p),
    )


# Function: what it returns, what it takes. Arrays and handles are addresses (None is null); the last c_char_p of a function
# that can fail is the buffer for its sentence.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "nf_abi": (c_int, ()),
    "nf_isa_names": (c_char_p, ()),
    "nf_isa": (c_char_p, ()),
    "nf_set_isa": (c_int, (c_char_p, c_char_p)),
    "nf_set_threads": (None, (c_int,)),
    "nf_threads": (c_int, ()),
    "nf_repack": (c_void_p, (POINTER(Matrix), c_char_p)),
    "nf_free": (None, (c_void_p,)),
    "nf_linear_bytes": (c_int64, (c_void_p,)),
    "nf_linear_kernel": (c_char_p, (c_void_p,)),
    "nf_linear_rounding": (c_double, (c_void_p,)),
    "nf_huge_pages": (c_int, (c_void_p,)),
    "nf_apply": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int, c_char_p)),
    "nf_apply_bf16": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int, c_char_p)),
    "nf_gather": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_char_p)),
    "nf_unpack": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_char_p)),
    "nf_arena": (c_void_p, (c_int64,)),
    "nf_arena_free": (None, (c_void_p,)),
    "nf_read_stream": (c_int64, (c_void_p, c_int64)),
}

_library: ctypes.CDLL | None = None
_looked = False


def declare(name: str, restype: Any, *argtypes: Any) -> None:
    """Declare a function of the library, before its first use; for modules that own one (their own header, their own types)."""
    _SIGNATURES[name] = (restype, argtypes)
    if _library is not None:
        _apply_signature(_library, name)


def library() -> ctypes.CDLL | None:
    """The library, or None where it cannot be used: then with one warning a process, at the first call."""
    global _library, _looked
    if not _looked:
        _looked = True
        try:
            _library = _open(_path())
        except NumfitError as error:
            warnings.warn(f"numfit runs slower PyTorch code instead of its CPU kernels: {error}", stacklevel=2)
    return _library


def load(path: str | os.PathLike[str]) -> None:
    """Use the library at `path` instead of the package's own: for builds under test. Before anything else uses the library.

    Raises:
        NumfitError: it cannot be loaded, or is not one for this version.
    """
    global _library, _looked
    _library, _looked = _open(os.fspath(path)), True


def isa() -> str | None:
    """The instruction set in use, e.g. `avx512`; None without the library."""
    lib = library()
    return lib.nf_isa().decode() if lib else None


def isa_names() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best last; empty without the library."""
    lib = library()
    return tuple(lib.nf_isa_names().decode().split(",")) if lib else ()


def set_isa(name: str) -> None:
    """Use another instruction set from now on, for tests and benchmarks.

    Raises:
        OptionError: it is not one of `isa_names()`.
    """
    if name not in isa_names():
        raise OptionError(f"instruction set '{name}' cannot be used here; choose from: {', '.join(isa_names()) or 'none'}")
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if _required().nf_set_isa(name.encode(), error):
        raise OptionError(error.value.decode())


def set_threads(count: int) -> None:
    """Let later calls use so many threads, the caller's among them.

    Raises:
        OptionError: fewer than one.
        NumfitError: there is no library.
    """
    if count < 1:
        raise OptionError(f"the number of threads must be at least 1, not {count}")
    _required().nf_set_threads(count)


def threads() -> int:
    """How many threads a call uses at most.

    Raises:
        NumfitError: there is no library.
    """
    return int(_required().nf_threads())


def _required() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise NumfitError("this needs numfit's CPU kernels, which are not in this installation; " + _REMEDY)
    return lib


_REMEDY = (
    "with a C++17 compiler (g++ or clang++) on the PATH, install it again: pip install --force-reinstall --no-cache-dir numfit"
)


def _path() -> str:
    """Where the library lies: beside the Python files, or in the other half of an editable install."""
    searched = [os.path.join(root, "kernels") for root in sys.modules["numfit"].__path__]
    for directory in searched:
        for suffix in (".so", ".dylib"):
            path = os.path.join(directory, "libnumfit_cpu" + suffix)
            if os.path.exists(path):
                return path
    raise NumfitError("they were not built when it was installed; " + _REMEDY)


def _open(path: str) -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL(path)
        if lib.nf_abi() != ABI:  # before anything that only this version has is looked for
            raise NumfitError(f"{path} belongs to another version of numfit (interface {lib.nf_abi()}, not {ABI}); {_REMEDY}")
        for name in _SIGNATURES:
            _apply_signature(lib, name)
    except (OSError, AttributeError) as error:  # not loadable here; a function is missing
        raise NumfitError(f"{path} cannot be used ({error}); {_REMEDY}") from None
    return lib


def _apply_signature(lib: ctypes.CDLL, name: str) -> None:
    restype, argtypes = _SIGNATURES[name]
    function = getattr(lib, name)
    function.restype, function.argtypes = restype, argtypes


def call(name: str, *args: object) -> None:
    """Call a function of the library, with torch's number of threads, that returns 0 or says why not in its last argument.

    Raises:
        NumfitError: what the library refused.
        OutOfMemoryError: there was not enough memory.
    """
    import torch

    lib = library()
    assert lib is not None
    lib.nf_set_threads(torch.get_num_threads())
    message = ctypes.create_string_buffer(ERROR_BYTES)
    if failed := getattr(lib, name)(*args, message):
        raise refusal(failed, message)


def refusal(failed: int, message: ctypes.Array[ctypes.c_char], kind: type[NumfitError] = NumfitError) -> NumfitError:
    """What to raise where a function of the library returned `failed`, which is not 0, and wrote `message`.

    Args:
        kind: the error, unless memory was what it lacked.
    """
    return (OutOfMemoryError if failed == NO_MEMORY else kind)(message.value.decode())


def require_fit(held: bool, what: str) -> None:
    """Refuse to hand over what the library would misread: no `assert`, which `python -O` leaves out.

    Raises:
        NumfitError: `held` is false; says `what`.
    """
    if not held:
        raise NumfitError(f"the parts of this tensor do not fit together: {what}")
