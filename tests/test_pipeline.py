"""The walk: what is planned is what is written, twice the same, whatever interrupts it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_checkpoints import (
    HIDDEN,
    INNER,
    VOCAB,
    files_of,
    llama_directory,
    llama_weights,
    quantize_small,
    save_directory,
)

import numfit
from numfit.checkpoint import open_checkpoint, open_source, read_manifest, verify
from numfit.checkpoint.safetensors_file import TensorInfo
from numfit.checkpoint.unpack import convert_packed
from numfit.cli.main import main
from numfit.errors import OptionError
from numfit.pipeline import Plan, partial, quantize
from numfit.pipeline.planning import make_plan
from numfit.pipeline.roles import role

FAST: dict[str, Any] = {"scale_rule": "absmax", "threads": 1, "progress": False}
DOWN = "model.layers.0.mlp.down_proj.weight"


def planned(directory: Path, fmt: str = "int4-g32", **options: Any) -> Plan:
    return make_plan(open_source(directory), fmt, **options)


def formats_of(result: Plan) -> dict[str, str | None]:
    return {tensor.name: tensor.format.name if tensor.format else None for tensor in result.tensors}


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.mlp.gate_proj.weight", (8, 8), "linear"),
        ("transformer.h.0.attn.c_attn.weight", (8, 24), "linear"),
        ("model.layers.0.mlp.experts.7.w1.weight", (8, 8), "linear"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", (8, 8), "linear"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (8, 8), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 8), "experts"),
        ("model.layers.0.mlp.experts.down_proj.weight", (4, 8, 8), "experts"),
        ("model.embed_tokens.weight", (96, 8), "embedding"),
        ("transformer.wte.weight", (96, 8), "embedding"),
        ("model.language_model.embed_tokens.weight", (96, 8), "embedding"),
        ("lm_head.weight", (96, 8), "head"),
        ("output.weight", (96, 8), "head"),
        ("model.layers.0.mlp.gate.weight", (4, 8), "kept"),
        ("model.layers.0.mlp.router.weight", (4, 8), "kept"),
        ("model.layers.0.feed_forward.router.layer.weight", (4, 8), "kept"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), "kept"),
        ("model.layers.0.input_layernorm.weight", (8,), "kept"),
        ("model.layers.0.self_attn.q_norm.weight", (4, 8), "kept"),
        ("transformer.h.0.ln_1.weight", (8,), "kept"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 8), "kept"),
        ("transformer.wpe.weight", (64, 8), "kept"),
        ("backbone.layers.0.mixer.conv1d.weight", (8, 1, 4), "kept"),
        ("backbone.layers.0.mixer.A_log", (8, 4), "kept"),
        ("visual.patch_embed.proj.weight", (8, 3, 2, 2), "kept"),
        ("model.layers.0.self_attn.q_proj.bias", (8,), "kept"),
        ("model.scale", (), "kept"),
        ("model.layers.0.mlp.empty.weight", (0, 8), "kept"),
    ],
)
def test_roles(name: str, shape: tuple[int, ...], kind: str) -> None:
    found = role(TensorInfo(name, "F32", shape, "", 0))
    assert found.kind == kind and (kind != "kept" or found.why)


def test_integers_are_kept() -> None:
    assert role(TensorInfo("a.up_proj.weight", "I64", (8, 8), "", 0)).kind == "kept"


def test_plan_accounts_for_every_byte(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "in")
    result = numfit.plan(source, "mant4-g64", scale_rule="absmax")
    totals = result.totals()
    by_name = {tensor.name: tensor for tensor in result.tensors}
    fmt = numfit.format("mant4-g64")
    assert by_name[DOWN].bytes_after == fmt.nbytes((HIDDEN, INNER)) and by_name[DOWN].bytes_before == 4 * HIDDEN * INNER
    assert by_name[DOWN].bits == pytest.approx(fmt.bits_per_weight((HIDDEN, INNER)))
    assert by_name["model.embed_tokens.weight"].format == numfit.format("int8-g32")
    assert by_name["model.norm.weight"].why == "a vector"
    assert totals["source_bytes"] == sum(tensor.nbytes for tensor in llama_weights().values())
    assert totals["bytes"] == sum(totals[part]["bytes"] for part in ("linears", "embeddings", "kept"))
    assert totals["embeddings"]["weights"] == 2 * VOCAB * HIDDEN
    assert result.estimate is not None and result.estimate.seconds > 0 and result.estimate.peak_bytes > 2**20
    quantize(source, "mant4-g64", tmp_path / "out", **FAST)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == result.file_bytes
    assert read_manifest(tmp_path / "out")["totals"] == totals


def test_rules_and_skips(tmp_path: Path) -> None:
    found = formats_of(
        planned(
            llama_directory(tmp_path / "in"), embedding="keep",
            rules=["down_proj=int8-g64", r"layers\.0\.=nf4-g32", ("lm_head", "int8-g32"), "k_proj=keep"],
            skip=[r"layers\.1\.self_attn"],
        )
    )  # fmt: skip
    assert found[DOWN] == "int8-g64"  # the first match wins
    assert found["model.layers.0.mlp.up_proj.weight"] == found["model.layers.0.self_attn.k_proj.weight"] == "nf4-g32"
    assert found["model.layers.0.input_layernorm.weight"] is None  # no rule makes a matrix of a vector
    assert found["lm_head.weight"] == "int8-g32" and found["model.embed_tokens.weight"] is None
    assert (
        found["model.layers.1.self_attn.q_proj.weight"] is None
        and found["model.layers.2.self_attn.k_proj.weight"] is None
    )
    assert found["model.layers.2.mlp.up_proj.weight"] == "int4-g32"


def test_a_rule_quantizes_what_is_kept_by_default(tmp_path: Path) -> None:
    weights = llama_weights() | {"model.layers.0.mlp.gate.weight": torch.randn(4, HIDDEN)}
    source = save_directory(tmp_path / "in", weights)
    assert formats_of(planned(source))["model.layers.0.mlp.gate.weight"] is None
    assert formats_of(planned(source, rules=[r"mlp\.gate\.=int8-g32"]))["model.layers.0.mlp.gate.weight"] == "int8-g32"


@pytest.mark.parametrize("nested", [False, True])
def test_tied_weights_are_written_once(tmp_path: Path, nested: bool) -> None:
    weights = llama_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    tie = {"text_config": {"tie_word_embeddings": True}} if nested else {"tie_word_embeddings": True}
    result = planned(save_directory(tmp_path / "tied", weights, tie))
    assert [tensor.name for tensor in result.tensors if tensor.dropped] == ["lm_head.weight"]
    quantize(tmp_path / "tied", "int4-g32", tmp_path / "out", **FAST)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert "lm_head.weight" not in checkpoint.quantized and "lm_head.weight" in checkpoint.manifest["dropped"]
    assert verify(tmp_path / "out")["tensors"] == 22

    weights["lm_head.weight"][5, 5] += 1  # tied says the config, but they differ: then both count
    result = planned(save_directory(tmp_path / "differ", weights, tie))
    assert not [tensor for tensor in result.tensors if tensor.dropped]
    assert result.config["tie_word_embeddings"] is False and "differ" in result.warnings[0]
    result = planned(save_directory(tmp_path / "untied", weights))
    assert not [tensor for tensor in result.tensors if tensor.dropped] and not result.warnings


def test_ocp_rules_apply_to_e8m0_scales_and_leave_others_alone(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "in")
    quantize(source, "mxfp4", tmp_path / "floor", **FAST | {"scale_rule": "floor"})
    weights = llama_weights()
    expected = numfit.quantize_tensor(weights[DOWN], "mxfp4", scale_rule="floor")
    got = open_checkpoint(tmp_path / "floor").quantized[DOWN]
    assert all(torch.equal(got.planes[plane], value) for plane, value in expected.planes.items())
    with pytest.raises(OptionError, match=r"'floor' does not apply to int4-g32.*mse"):
        planned(source, scale_rule="floor")


def test_stale_quantization_config_is_dropped_with_a_word(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "in", config={"quantization_config": {"quant_method": "gguf"}})
    result = planned(source)
    assert "quantization_config" not in result.config and "gguf" in result.warnings[0]


# -- the walk ----------------------------------------------------------------------------------------------------------


def test_experts_bf16_shards_and_an_unknown_architecture(tmp_path: Path) -> None:
    weights = llama_weights(torch.bfloat16)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    weights[experts] = torch.randn(4, 32, HIDDEN).bfloat16()
    weights[f"{experts}_bias"] = torch.randn(4, 32).bfloat16()
    weights["model.position_ids"] = torch.arange(7)
    source = save_directory(tmp_path / "in", weights, {"model_type": "martian"}, shards=3)
    result = quantize(source, "nf4-g32", tmp_path / "out", shard_size=60_000, **FAST)
    assert result["status"] == "written" and result["tensors"] == 24
    verify(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    stack = checkpoint.quantized[experts]
    assert stack.shape == (4, 32, HIDDEN)
    expected = numfit.quantize_tensor(weights[experts], "nf4-g32", scale_rule="absmax")
    assert torch.equal(stack.dequantize(), expected.dequantize())
    for name in (f"{experts}_bias", "model.position_ids", "model.norm.weight"):
        assert torch.equal(checkpoint.kept[name], weights[name]) and checkpoint.kept[name].dtype == weights[name].dtype
    assert checkpoint.config["model_type"] == "martian"


def test_every_format_kind_passes_the_walk(tmp_path: Path) -> None:
    """One linear each, so that planes of all shapes are written, read back and measured."""
    kinds = [
        "uint3-g64",
        "mant4s-g32@u8",
        "fp4.25",
        "fp5.33",
        "ant4",
        "bitmod3",
        "if4",
        "dynfp4",
        "nvfp4",
        "int4-tensor",
    ]
    generator = torch.Generator().manual_seed(3)
    weights = {f"m.{i}.up_proj.weight": torch.randn(33, 130, generator=generator) for i in range(len(kinds))}
    source = save_directory(tmp_path / "in", weights)
    rules = [rf"m\.{i}\.={kind}" for i, kind in enumerate(kinds)]
    quantize(source, "int4-g32", tmp_path / "out", rules=rules, **FAST)
    verify(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    for i, kind in enumerate(kinds):
        name = f"m.{i}.up_proj.weight"
        restored = checkpoint.quantized[name].dequantize()
        assert checkpoint.formats[name].name == numfit.format(kind).name
        error = float(((restored - weights[name]).double() ** 2).sum() / (weights[name].double() ** 2).sum())
        assert checkpoint.manifest["tensors"][name]["error"] == pytest.approx(error, rel=1e-5) and 0 < error < 0.2


@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_same_bytes_for_any_number_of_threads(tmp_path: Path, rule: str) -> None:
    weights = {"a.up_proj.weight": torch.randn(700, 130), "model.embed_tokens.weight": torch.randn(3000, 64)}
    source = save_directory(tmp_path / "in", weights)
    for threads in (1, 2):
        quantize(source, "int3-g32", tmp_path / f"{threads}", scale_rule=rule, threads=threads, progress=False)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert torch.get_num_threads() == 1  # as the fixture set it


def test_a_finished_checkpoint_is_recognised(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "in")
    assert quantize(source, "int4-g32", tmp_path / "out", **FAST)["status"] == "written"
    before = files_of(tmp_path / "out")
    again = quantize(source, "int4-g32", tmp_path / "out", **FAST)
    assert again["status"] == "already there" and files_of(tmp_path / "out") == before
    (tmp_path / "empty").mkdir()
    quantize(source, "int4-g32", tmp_path / "empty", **FAST)  # an empty directory is taken
    assert files_of(tmp_path / "empty") == before


# -- interruptions -----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for a kill: nothing catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException | None = None) -> None:
    """Let the `count`-th write of data or journal stop half-way."""
    real, calls = partial.write_all, iter(range(count + 1))

    def half(file: Any, data: Any) -> None:
        if next(calls, None) == count:
            real(file, bytes(data)[: len(data) // 2])
            raise error or Crash
        real(file, data)

    monkeypatch.setattr(partial, "write_all", half)


@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_resumes_from_a_write_torn_anywhere(tmp_path: Path, shard_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama_directory(tmp_path / "in")
    out, options = tmp_path / "out", {**FAST, "shard_size": shard_size}
    quantize(source, "int4-g32", tmp_path / "whole", **options)
    whole = files_of(tmp_path / "whole")
    for count in (0, 1, 2, 3, 4, 11, 12, 13, 14, 40, 60):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_at(patch, count)
            quantize(source, "int4-g32", out, **options)
        assert not out.exists()
        if count % 3:  # and torn again, somewhere later
            with monkeypatch.context() as patch, pytest.raises(Crash):
                crash_at(patch, 5)
                quantize(source, "int4-g32", out, **options)
        result = quantize(source, "int4-g32", out, **options)
        assert files_of(out) == whole and not (tmp_path / "out.partial").exists()
        assert result["resumed"] > 0 or count < 4
        shutil.rmtree(out)


@pytest.mark.parametrize("step", ["the last file", "renaming", "cleaning up"])
def test_resumes_from_a_kill_at_the_end(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama_directory(tmp_path / "in")
    quantize(source, "int4-g32", tmp_path / "whole", **FAST)
    target = {"the last file": (Path, "write_bytes"), "renaming": (os, "rename"), "cleaning up": (partial, "remove")}[
        step
    ]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(*target, lambda *args: (_ for _ in ()).throw(Crash))
        quantize(source, "int4-g32", tmp_path / "out", **FAST)
    result = quantize(source, "int4-g32", tmp_path / "out", **FAST)
    assert result["status"] == ("already there" if step == "cleaning up" else "written")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("where", ["data", "header", "journal", "gone"])
def test_damaged_unfinished_work_is_noticed_and_redone(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a power failure the files may hold less than the journal says."""
    source = llama_directory(tmp_path / "in")
    quantize(source, "int4-g32", tmp_path / "whole", **FAST)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 30)
        quantize(source, "int4-g32", tmp_path / "out", **FAST)
    file = tmp_path / "out.partial" / ("journal.jsonl" if where == "journal" else "checkpoint/model.safetensors")
    data = bytearray(file.read_bytes())
    data[{"data": -20_000, "header": 20}.get(where, 0)] ^= where != "journal"
    file.unlink() if where == "gone" else file.write_bytes(data[: len(data) // 2] if where == "journal" else data)
    result = quantize(source, "int4-g32", tmp_path / "out", **FAST | {"progress": True})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert 0 < result["resumed"] < 10 if where in ("data", "journal") else result["resumed"] == 0
    assert ("damaged at" in capsys.readouterr().err) == (where != "journal")


def test_twelve_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    """Real processes, real SIGKILL, at moments drawn evenly over a run; each goes on with what the last one left."""
    source, out = llama_directory(tmp_path / "in"), tmp_path / "out"
    quantize_small(source, tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")  # imports torch once, forks clean processes from there
    context.set_forkserver_preload(["numfit.pipeline.walk"])

    def start() -> Any:
        process = context.Process(target=quantize_small, args=(source, out))
        process.start()
        return process

    start().join()
    shutil.rmtree(out)
    begin = time.monotonic()
    start().join()  # the server is warm now: how long does a run take?
    duration = time.monotonic() - begin
    assert files_of(out) == whole
    shutil.rmtree(out)
    draw = random.Random(0)
    kills, progressed = 0, 0
    while kills < 12 or progressed < 3:  # kills that all come before any work prove nothing
        assert kills < 100
        process = start()
        process.join(draw.uniform(0, duration))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        journal = tmp_path / "out.partial" / "journal.jsonl"
        progressed += journal.exists() and journal.stat().st_size > 0
        if out.exists():
            assert files_of(out) == whole
            shutil.rmtree(out)
    process = start()
    process.join()
    assert process.exitcode == 0 and files_of(out) == whole and not (tmp_path / "out.partial").exists()


# -- unfinished work and other settings --------------------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(source, out) with a run torn in its middle."""
    source = llama_directory(tmp_path / "in")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 30)
        quantize(source, "int4-g32", tmp_path / "out", **FAST)
    return source, tmp_path / "out"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("format", "int3-g32", "--format was int4-g32 and is now int3-g32"),
        ("embedding", "keep", "--embedding was int8-g32 and is now keep"),
        ("rules", ["down_proj=nf4-g32"], "--rule was not given and is now down_proj=nf4-g32"),
        ("skip", ["lm_head"], "--skip was not given and is now lm_head"),
        ("scale_rule", "mse", "--scale-rule was absmax and is now mse"),
        ("shard_size", "1GB", "--shard-size was 5000000000 and is now 1000000000"),
    ],
)
def test_a_changed_option_is_refused_and_destroys_nothing(
    unfinished: tuple[Path, Path], option: str, value: Any, words: str
) -> None:
    source, out = unfinished
    before = files_of(out.parent / "out.partial")
    options = {"format": "int4-g32", **FAST, option: value}
    with pytest.raises(OptionError, match=words):
        quantize(source, options.pop("format"), out, **options)
    assert files_of(out.parent / "out.partial") == before
    assert quantize(source, "int4-g32", out, **FAST)["resumed"] == 10
    with pytest.raises(OptionError, match=words):  # nor does it replace the finished one
        options = {"format": "int4-g32", **FAST, option: value}
        quantize(source, options.pop("format"), out, **options)
    verify(out)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_source_is_refused(unfinished: tuple[Path, Path], file: str) -> None:
    source, out = unfinished
    if file == "model.safetensors":
        save_directory(source, llama_weights(seed=1))
    else:
        (source / file).write_text((source / file).read_text().replace("{", '{"more": 1,', 1))
    with pytest.raises(OptionError, match=f"source is not the same, its file '{file}' has changed"):
        quantize(source, "int4-g32", out, **FAST)


def test_another_version_of_numfit_is_refused(unfinished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = unfinished
    monkeypatch.setattr("numfit.pipeline.walk.VERSION", "99.0")
    with pytest.raises(OptionError, match=r"made by numfit .*, this is numfit 99\.0"):
        quantize(source, "int4-g32", out, **FAST)


def test_two_runs_do_not_write_the_same_directory(unfinished: tuple[Path, Path]) -> None:
    source, out = unfinished
    with partial.locked(out.parent / "out.partial"), pytest.raises(OptionError, match="another numfit run is writing"):
        quantize(source, "int4-g32", out, **FAST)
    assert quantize(source, "int4-g32", out, **FAST)["status"] == "written"


# -- the commands ------------------------------------------------------------------------------------------------------


def test_commands_from_plan_to_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(llama_directory(tmp_path / "in")), str(tmp_path / "out")
    recipe = [source, "-f", "int4-g32", "--scale-rule", "absmax", "--rule", "down_proj=int8-g32", "--threads", "1"]

    def run(*args: str) -> tuple[str, str]:
        assert main(args) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    said, _ = run("plan", *recipe)
    assert "--rule 'down_proj'" in said and "a vector" in said and "whole model" in said and "peak memory about" in said
    result = json.loads(run("plan", *recipe, "--json", "--no-estimate")[0])
    assert {tensor["format"] for tensor in result["tensors"]} == {"int4-g32", "int8-g32", None}
    said, _ = run("quantize", *recipe, "-o", out)
    assert "bits/weight" in said and "peak memory" in said and "largest relative squared errors" in said
    said, _ = run("quantize", *recipe, "-o", out)
    assert "is this very checkpoint already" in said
    done = json.loads(run("quantize", *recipe, "-o", out, "--json", "--quiet")[0])
    assert done["totals"] == result["totals"] and len(done["worst"]) == 5
    said, _ = run("inspect", out, "--verify", "--tensors")
    assert "verified: 6 files" in said and DOWN in said and "kept: a vector" in said
    shown = json.loads(run("inspect", out, "--json")[0])
    assert shown["formats"]["int8-g32"]["tensors"] == 5 and shown["verified"] is None
    run("convert", out, "-o", str(tmp_path / "plain"), "--dtype", "bfloat16", "--quiet")
    assert open_source(tmp_path / "plain").info(DOWN).dtype == "BF16"


@pytest.mark.parametrize("verb", ["plan", "quantize", "inspect", "convert"])
def test_help_teaches_by_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert capsys.readouterr().out.count(f"  numfit {verb} ") >= 3 - (verb == "convert")


def test_plain_progress_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from numfit.pipeline import progress

    monkeypatch.setattr(progress, "EVERY", 0.0)
    quantize(llama_directory(tmp_path / "in"), "int4-g32", tmp_path / "out", **FAST | {"progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("hashing the source: ") and lines[-1].startswith("quantizing: 100 %")
    assert any(DOWN in line and "MB/s" in line and "s left" in line for line in lines)


# -- what the runtime makes of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gpt2", "phi3", "mixtral", "gpt-oss"])
def test_the_checkpoint_loads_and_equals_its_plain_conversion(tmp_path: Path, kind: str) -> None:
    tiny = pytest.importorskip("tiny_models")
    tiny.build(kind, tmp_path / "in")
    quantize(tmp_path / "in", "int4-g32", tmp_path / "out", **FAST)
    convert_packed(tmp_path / "out", tmp_path / "plain", progress=False)
    packed = _load(tmp_path / "out")
    expected = tiny.logits(tiny.from_reference(tmp_path / "plain"))
    assert torch.allclose(tiny.logits(packed), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, tiny.logits(tiny.from_reference(tmp_path / "in")), rtol=1e-4, atol=1e-5)


def _load(directory: Path) -> Any:
    from numfit.runtime.loading import load

    return load(directory, tokenizer=False, activations="exact")[0]
