"""The compiled library is found, checked and, where it cannot be used, missed in one sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from numfit import native
from numfit.errors import NumfitError, OptionError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had asked for the library yet."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_looked", False)


def test_where_there_is_a_compiler_there_is_a_library() -> None:
    if native.library() is None and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("this machine has no C++ compiler")
    assert native.library() is not None
    assert native.isa() in native.isa_names()
    assert native.isa_names()[0] == "portable"


def test_importing_numfit_loads_neither_the_library_nor_torch() -> None:
    code = "import sys, numfit, numfit.native as n; assert not n._looked and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_library_one_warning(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["numfit"], "__path__", [str(tmp_path)])
    with pytest.warns(UserWarning, match=r"slower PyTorch code.*not built.*C\+\+17 compiler.*pip install") as caught:
        assert native.library() is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library() is None
        assert native.isa() is None
        assert native.isa_names() == ()
    with pytest.raises(NumfitError, match="needs numfit's CPU kernels"):
        native.set_threads(2)
    with pytest.raises(NumfitError, match="needs numfit's CPU kernels"):
        native.threads()
    with pytest.raises(OptionError, match="choose from: none"):
        native.set_isa("portable")


def test_a_damaged_library_is_a_warning(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "libnumfit_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(sys.modules["numfit"], "__path__", [str(tmp_path)])
    with pytest.warns(UserWarning, match=r"libnumfit_cpu\.so cannot be used"):
        assert native.library() is None


@pytest.mark.skipif(native.library() is None, reason="the kernels were not built: no compiler at install")
def test_another_interface_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native._path()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    monkeypatch.setitem(native._SIGNATURES, "nf_no_such_function", (None, ()))  # another version has other functions
    with pytest.raises(NumfitError, match=rf"another version of numfit \(interface {native.ABI - 1}, not {native.ABI}\)"):
        native.load(path)
    with pytest.warns(UserWarning, match="belongs to another version of numfit"):
        assert native.library() is None


@pytest.mark.skipif(native.library() is None, reason="the kernels were not built: no compiler at install")
def test_a_missing_function_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._SIGNATURES, "nf_no_such_function", (None, ()))
    with pytest.raises(NumfitError, match=r"cannot be used.*nf_no_such_function"):
        native.load(native._path())


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="at least 1, not 0"):
        native.set_threads(0)
    with pytest.raises(OptionError, match="instruction set 'sse9' cannot be used here"):
        native.set_isa("sse9")
