"""The README says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from numfit.cli.main import VERBS, main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_table_of_types(capsys: pytest.CaptureFixture[str]) -> None:
    """`numfit formats --markdown` prints the README's table, line for line."""
    assert main(["formats", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in README


def test_every_verb_is_shown_and_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert f"numfit {verb}" in README or f"make {verb}" in README
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        assert f"numfit {verb}" in capsys.readouterr().out.split("example")[1]


def test_a_bad_name_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "mnat4"]) == 2
    error = capsys.readouterr().err
    assert "unknown format 'mnat4'" in error and "did you mean 'mant4'" in error and "Traceback" not in error
