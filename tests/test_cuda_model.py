"""Models on a CUDA device: calibrated runs that use one, and packed checkpoints that are run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibrated import QUICK, TEXT, decoded, model_at
from tiny_models import IDS, logits, words

import numfit
from numfit.checkpoint import verify
from numfit.kvcache import QuantizedCache
from numfit.pipeline import layers, quantize
from numfit.solvers import SolverOptions, solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

FORMATS = ("int4-g32", "uint4-g32", "nf4-g32", "mant4-g32@e3m3", "fp4.25", "fp5.33", "pot3-g32", "razer4-g32", "km3-row",
           "any4-g32", "lm3-row+rot", "trellis2+rot", "trellis3-t8+rot", "int4-g32+rank4", "int4-g32+sparse10")  # fmt: skip


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative difference of all weights."""
    lost = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (lost / sum(float(w.double().square().sum()) for w in one.values())) ** 0.5


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gemma3", "phi3", "mixtral", "gpt-neox"])
def test_statistics_from_the_device_give_the_same_weights(kind: str, tmp_path: Path) -> None:
    source = model_at(tmp_path / "model", kind)
    options = {**QUICK, "context": 100, "calibration": words(4000), "solver": "gptq"}
    quantize(source, "int4-g32", tmp_path / "here", **options)
    result = quantize(source, "int4-g32", tmp_path / "there", device="cuda", **options)
    verify(tmp_path / "there")
    assert result["status"] == "written" and not any("without statistics" in note for note in result["warnings"])
    # sums in another order move a statistic by 1e-6, and a rare weight that lies on a threshold to its next level
    assert apart(decoded(tmp_path / "here"), decoded(tmp_path / "there")) < 0.03


@pytest.mark.parametrize(
    ("how", "fmt"),
    [("signround", "int3-g32"), ("adaround", "mant4-g32"), ("tune", "lm3-row+rot"), ("progressive", "trellis2+rot")],
)
def test_learning_on_the_device(how: str, fmt: str, tmp_path: Path) -> None:
    source = model_at(tmp_path / "model")
    solver = "nearest" if how in ("signround", "adaround") else "gptq"  # what error compensation found is hard to better
    options = {**QUICK, "windows": 16, "context": 32, "calibration": words(2000), "solver": solver, "propagate": "quantized"}
    result = quantize(source, fmt, tmp_path / "out", device="cuda", reconstruct=how, iterations=60, **options)
    verify(tmp_path / "out")
    assert result["spent"]["learning"] > 0
    plain = quantize(source, fmt, tmp_path / "plain", device="cuda", **options)
    assert plain["totals"] == result["totals"]
    assert 0 < apart(decoded(tmp_path / "plain"), decoded(tmp_path / "out")) < 1


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_at(tmp_path / "model")
    options: dict[str, Any] = {**QUICK, "calibration": TEXT, "device": "cuda", "recipe": "extreme", "iterations": 5}
    quantize(source, "int3-g32", tmp_path / "whole", **options)
    done: list[int] = []
    original = layers.Results.write

    def save_once(self: Any, k: int, *rest: Any) -> None:
        original(self, k, *rest)
        done.append(k)
        raise KeyboardInterrupt

    monkeypatch.setattr(layers.Results, "write", save_once)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, "int3-g32", tmp_path / "out", **options)
    monkeypatch.setattr(layers.Results, "write", original)
    quantize(source, "int3-g32", tmp_path / "out", **options)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert done == [0]


def test_a_plan_for_the_device(tmp_path: Path) -> None:
    source = model_at(tmp_path / "model")
    options: dict[str, Any] = {"calibration": TEXT, "recipe": "extreme", "windows": 4, "context": 24, "embedding": "keep"}
    found = numfit.plan(source, "int4-g32", device="cuda", **options).estimate
    assert found is not None and all(found.parts[part] > 0 for part in ("statistics", "solving", "learning"))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_packed_models_run_on_the_device(kind: str, fmt: str, tmp_path: Path) -> None:
    if kind == "gpt-oss" and "rank" in fmt + "sparse" in fmt:
        pytest.skip("side terms are for linears")
    source = model_at(tmp_path / "model", kind)
    quantize(source, fmt, tmp_path / "out", progress=False)
    here, _ = numfit.load(tmp_path / "out", dtype="float32", activations="reference")
    there, _ = numfit.load(tmp_path / "out", dtype="float32", device="cuda")
    with torch.no_grad():
        found = there(IDS.cuda()).logits.cpu()
    wanted = logits(here)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("solver", ["nearest", "gptq", "gptq+alternate+refit", "gptq+blocks+descent+refit"])
@pytest.mark.parametrize("fmt", ["int4-g32", "mant4-g32@e3m3", "fp4.25", "nf4-g64"])
def test_solvers_take_tensors_of_the_device(solver: str, fmt: str) -> None:
    form = numfit.format(fmt)
    if "blocks" in solver and not isinstance(form.block, int):
        solver = "gptq+alternate+descent"
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(48, 192, generator=g), torch.randn(512, 192, generator=g) * torch.linspace(3, 0.1, 192)
    h = 2 / 512 * x.T @ x
    options = SolverOptions.parse(solver)
    here, there = solve(w, h, form, options), solve(w.cuda(), h.cuda(), form, options)
    assert there.codes.device.type == "cuda"
    assert there.loss == pytest.approx(here.loss, rel=0.02)


@pytest.mark.parametrize("kv", ["kv4", "kv3", "kv8", "mant4"])
def test_quantized_caches_on_the_device(kv: str, tmp_path: Path) -> None:
    source = model_at(tmp_path / "model")
    model, _ = numfit.load(source, dtype="float32")
    ids = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(2))

    def after(ids: torch.Tensor) -> torch.Tensor:
        cache = QuantizedCache(model.config, kv, residual=16)
        with torch.no_grad():
            model(ids[:, :100], past_key_values=cache, use_cache=True)
            return model(ids[:, 100:], past_key_values=cache, use_cache=True).logits.cpu()

    here, _ = after(ids), model.cuda()
    assert float((after(ids.cuda()) - here).norm() / here.norm()) < 0.02  # a bf16 store on either side
