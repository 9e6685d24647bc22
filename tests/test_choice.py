"""Which type is taken where none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_checkpoints import llama_directory

import numfit
from numfit import native
from numfit.checkpoint.manifest import read_manifest
from numfit.checkpoint.source import open_source
from numfit.errors import OptionError
from numfit.pipeline import choice
from numfit.pipeline.planning import Plan


def chosen(model: Path, bits: float | None, recipe: str | None, with_text: bool, **options: Any) -> Plan:
    return choice.plan_for(open_source(model), None, bits, recipe, with_text, **options)


@pytest.fixture
def fast_trellis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda: "avx512")


@pytest.mark.usefixtures("fast_trellis")
def test_recipes_choose_by_text_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_directory(tmp_path / "model")
    assert chosen(model, 4.8, None, False).recipe["format"] == "mant4-g32@e3m3"
    assert chosen(model, 20, "balanced", True).recipe["format"] == "int8-g64"
    wide = choice.ladder("quality", True)
    assert wide[0] is choice.TRELLIS and "full speed" in wide[1]
    assert choice.ladder("balanced", True)[0] is choice.ladder(None, True)[0] is choice.SCALAR
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    narrow = choice.ladder("extreme", True)
    assert narrow[0] is choice.SCALAR and "no fast kernels" in narrow[1]


@pytest.mark.usefixtures("fast_trellis")
def test_more_bits_never_choose_less(tmp_path: Path) -> None:
    """Every budget is kept, used as far as the ladder allows, and told; rules of the user's own come first."""
    model = llama_directory(tmp_path / "model")
    source = open_source(model)
    before = 0.0
    sizes = [choice.make_plan(source, name, rules=more).totals()["linears"]["bits_per_weight"] for name, more in choice.TRELLIS]
    assert sizes == sorted(sizes)
    for budget in (*sizes, *(size + 0.01 for size in sizes)):
        plan = chosen(model, budget, "quality", True)
        taken = plan.totals()["linears"]["bits_per_weight"]
        assert taken == max(size for size in sizes if size <= budget)
        assert plan.warnings[0].startswith(f"chosen: {plan.recipe['format']}")
        before = max(before, taken)
    ruled = chosen(model, 30, "quality", True, rules=["q_proj=int4-g32"])
    assert {t.format.name for t in ruled.quantized if "q_proj" in t.name and t.format} == {"int4-g32"}


def test_what_cannot_be(tmp_path: Path) -> None:
    model = llama_directory(tmp_path / "model")
    with pytest.raises(OptionError, match=r"--bits 1\.5 cannot be met: the smallest choice here takes [2-9]"):
        chosen(model, 1.5, "quality", True)
    with pytest.raises(OptionError, match="with a calibration text there are smaller ones"):
        chosen(model, 2, None, False)
    with pytest.raises(OptionError, match="not both"):
        choice.plan_for(open_source(model), "int4-g32", 4, None, False)
    with pytest.raises(OptionError, match="matches no"):
        chosen(model, None, None, False, rules=["no_such_name=int4-g32"])


def test_the_choice_is_recorded(tmp_path: Path) -> None:
    model = llama_directory(tmp_path / "model")
    result = numfit.quantize(model, None, tmp_path / "out", bits=9, progress=False)
    assert result["warnings"][0].startswith("chosen: int8-g64")
    assert read_manifest(tmp_path / "out")["recipe"]["format"] == "int8-g64"
