"""The main job on the real SmolLM2-135M, end to end: quantize, save, load both ways, measure, talk.

Needs the model in numfit's cache (`numfit demo --fetch-only`); nothing is fetched here.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import numfit
from numfit.demo.models import SMOLLM2_NAME, cached_directory
from numfit.demo.packages import cache_directory

pytestmark = pytest.mark.real
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model() -> Path:
    directory = cached_directory(f"{SMOLLM2_NAME}-degrid")
    if directory is None:
        pytest.skip("the real model is not in the cache; fetch it with: numfit demo --fetch-only")
    return directory


@pytest.fixture(scope="module")
def text() -> Path:
    path = cache_directory() / "wikipedia" / "enwiki.valid.txt"
    if not path.is_file():
        pytest.skip("the Wikipedia sample is not in the cache; fetch it with: numfit demo --fetch-only")
    return path


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "mant4"
    summary = numfit.quantize(model, "mant4-g64", out, scale_rule="absmax", progress=False)
    assert summary["tensors"] == 211  # 210 linears of the blocks and the tied embedding
    return out


def test_quality_of_the_saved_file(model: Path, packed: Path, text: Path) -> None:
    """KL of a few hundred positions; quality-anchors.md has 0.2665 for mant4-g64 on eight windows of its own text."""
    result = numfit.evaluate(packed, text, reference=model, windows=2, context=256, progress=False, noise_floor=False)
    assert 0.1 < result["kl_mean"] < 0.6
    assert 0.6 < result["top1"] < 0.95
    assert result["ppl"] < 1.6 * result["reference_ppl"]
    assert result["bits_per_weight"] == pytest.approx(4.3177, abs=1e-3)  # member nibbles of K = 576 end in half a byte
    assert result["model_bytes"] < 90e6
    assert math.isfinite(result["bits_per_byte"])


def test_both_ways_of_loading_agree_and_talk(packed: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours, tokenizer = numfit.load(packed)
    theirs = AutoModelForCausalLM.from_pretrained(packed)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        continued = tokenizer.decode(ours.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in continued
    stored = sum(t.nbytes for t in [*ours.parameters(), *ours.buffers()])
    assert stored < 1.02 * sum(f.stat().st_size for f in packed.glob("*.safetensors"))


def test_verify_notices_one_changed_byte(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from numfit.cli.main import main

    assert main(["inspect", str(packed), "--verify"]) == 0
    shard = packed / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    assert main(["inspect", str(packed), "--verify"]) != 0
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
