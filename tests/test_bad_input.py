"""Bad sources, bad options, bad places: one sentence that names the thing and says what to do, and nothing damaged."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_checkpoints import files_of, llama_directory, llama_weights, save_directory
from safetensors.torch import load_file, save_file

from numfit.checkpoint import open_checkpoint, open_source, verify
from numfit.cli.main import main
from numfit.errors import CheckpointError, FormatError, NumfitError, OptionError
from numfit.pipeline import partial, plan, quantize

FAST: dict[str, Any] = {"scale_rule": "absmax", "threads": 1, "progress": False}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A sound directory with one weight file."""
    return llama_directory(tmp_path / "in")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound directory with three shards."""
    return llama_directory(tmp_path / "in", shards=3)


def refused(
    source: Path, tmp_path: Path, *words: str, error: type[NumfitError] = CheckpointError, **options: Any
) -> str:
    """Quantizing must fail with one line that holds all `words`, leave the source alone and make no output."""
    before = files_of(source)
    with pytest.raises(error) as caught:
        quantize(source, options.pop("format", "int4-g32"), tmp_path / "out", **FAST | options)
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out").exists() and files_of(source) == before
    return message


# -- weight files ------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header and the same data."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def absurd_shape(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"] = [2**40, 2**40]


def absurd_offsets(header: dict[str, Any]) -> None:
    start = header["lm_head.weight"]["data_offsets"][0]
    header["lm_head.weight"]["data_offsets"] = [start, 2**62]


def overlapping(header: dict[str, Any]) -> None:
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1000], ["truncated", "promises"]),
        (lambda data: data[:300], ["truncated", "header"]),
        (lambda data: data[:5], ["5 bytes"]),
        (lambda data: b"", ["0 bytes"]),
        (lambda data: data + b"more", ["4 bytes more"]),
        (lambda data: struct.pack("<Q", 2**60) + data[8:], ["absurd", str(2**60)]),
        (lambda data: struct.pack("<Q", 90_000_000) + data[8:], ["truncated"]),
        (lambda data: data[:8] + b"[" + data[9:], ["JSON"]),
        (lambda data: bytes(len(data)), ["not a sound safetensors file"]),
        (lambda data: with_header(data, absurd_shape), ["not a sound safetensors file"]),
        (lambda data: with_header(data, absurd_offsets), [str(2**62)[:6]]),
        (lambda data: with_header(data, overlapping), ["not a sound safetensors file"]),
    ],
)
def test_damaged_safetensors(single: Path, tmp_path: Path, change: Callable[[bytes], bytes], words: list[str]) -> None:
    rewrite(single / "model.safetensors", change)
    refused(single, tmp_path, "model.safetensors", "copy or download it again", *words)
    assert not (tmp_path / "out.partial").exists()


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, tmp_path, "lacks 1 of the 3 shards", "model-00002-of-00003.safetensors", "copy or download")


def change_index(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index)
    (source / INDEX).write_text(json.dumps(index))


def test_index_promises_what_no_file_holds(sharded: Path, tmp_path: Path) -> None:
    change_index(
        sharded, lambda index: index["weight_map"].update({"a.ghost.weight": "model-00001-of-00003.safetensors"})
    )
    refused(sharded, tmp_path, INDEX, "'a.ghost.weight'", "does not hold it", "copy them again")


def test_index_does_not_know_what_a_file_holds(sharded: Path, tmp_path: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(sharded, tmp_path, INDEX, "'model.norm.weight'", "nowhere", "copy them again")


def test_index_places_a_tensor_in_another_file(sharded: Path, tmp_path: Path) -> None:
    def swap(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = next(
            file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"]
        )

    change_index(sharded, swap)
    refused(sharded, tmp_path, INDEX, "'model.norm.weight'", "copy them again")


@pytest.mark.parametrize("text", ["", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_damaged_index(sharded: Path, tmp_path: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, tmp_path, INDEX, "copy")


def test_index_lost(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, tmp_path, "3 safetensors files", INDEX, "copy the index too")


def test_two_sets_of_weights(sharded: Path, tmp_path: Path) -> None:
    save_file(llama_weights(), sharded / "model.safetensors")
    refused(sharded, tmp_path, "both model.safetensors and an index", "remove one")


def test_no_weights(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, tmp_path, "only pickled weights", "save_pretrained")
    (single / "pytorch_model.bin").unlink()
    refused(single, tmp_path, "has no weights", "model.safetensors")


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_missing_or_damaged_config(single: Path, tmp_path: Path, text: str | None) -> None:
    (single / "config.json").unlink()
    if text is not None:
        (single / "config.json").write_text(text)
    refused(single, tmp_path, "config.json", "copy")


def test_missing_tokenizer_is_said_but_allowed(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "in", tokenizer=False)
    assert any(
        "no tokenizer" in warning and "eval" in warning for warning in plan(source, "int4-g32", estimate=False).warnings
    )
    assert quantize(source, "int4-g32", tmp_path / "out", **FAST)["warnings"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_and_inf_are_named_and_earlier_work_stays(tmp_path: Path, name: str, value: float) -> None:
    weights = llama_weights()
    place = (3, 17) if weights[name].dim() == 2 else (17,)
    sound = float(weights[name][place])
    weights[name][place] = value
    source = save_directory(tmp_path / "in", weights)
    refused(source, tmp_path, "model.safetensors", f"'{name}'", str(value), str(list(place)), "sound copy")
    assert (tmp_path / "out.partial" / "journal.jsonl").stat().st_size > 0
    # The unfinished work is sound: with the source repaired in place it is another source, and refused as such ...
    broken = (source / "model.safetensors").read_bytes()
    weights[name][place] = sound
    save_directory(source, weights)
    refused(source, tmp_path, "'model.safetensors' has changed", error=OptionError)
    # ... but with the damaged tensor as it was the run gets as far as before, and not a tensor further.
    (source / "model.safetensors").write_bytes(broken)
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_bytes()
    refused(source, tmp_path, f"'{name}'")
    assert (tmp_path / "out.partial" / "journal.jsonl").read_bytes() == journal


def test_inf_in_a_buffer_is_copied(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, -float("inf")])
    source = save_directory(tmp_path / "in", llama_weights() | {"model.mask": mask})
    quantize(source, "int4-g32", tmp_path / "out", **FAST)
    assert torch.equal(open_checkpoint(tmp_path / "out").kept["model.mask"], mask)


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"no file or directory .*nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no-such-org/no-such-model.*hub could not give.*local directory"):
        open_source("no-such-org/no-such-model")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt.*neither a directory nor a GGUF"):
        open_source(tmp_path / "notes.txt")


# -- sources that are quantized already --------------------------------------------------------------------------------


def test_a_numfit_checkpoint_is_not_quantized_again(single: Path, tmp_path: Path) -> None:
    quantize(single, "int4-g32", tmp_path / "first", **FAST)
    refused(tmp_path / "first", tmp_path, "quantized by numfit already", "numfit convert", error=OptionError)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("gptq", {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}),
        ("fp8", {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 2)}),
        ("compressed-tensors", {"model.layers.0.mlp.other.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}),
        ("bitsandbytes", {"model.layers.0.mlp.other.weight": torch.zeros(40, 1, dtype=torch.uint8)}),
        (None, {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 4, 4, dtype=torch.uint8)}),
    ],
)
def test_other_quantized_checkpoints_are_refused(
    tmp_path: Path, method: str | None, extra: dict[str, torch.Tensor]
) -> None:
    config = {"quantization_config": {"quant_method": method}} if method else {}
    source = save_directory(tmp_path / "in", llama_weights() | extra, config)
    refused(source, tmp_path, "quantized already", method or "", next(iter(extra)), "dequantize it", error=OptionError)


# -- options -----------------------------------------------------------------------------------------------------------


def test_unknown_format_names(single: Path, tmp_path: Path) -> None:
    refused(single, tmp_path, "'mant5'", "mant4", error=FormatError, format="mant5")
    refused(single, tmp_path, "'intt8'", "int", error=FormatError, embedding="intt8")
    refused(single, tmp_path, "--rule 'down=nf5'", "nf", error=FormatError, rules=["down=nf5"])


def test_block_larger_than_the_row(tmp_path: Path) -> None:
    weights = llama_weights() | {"model.layers.0.mixer.dt_proj.weight": torch.randn(64, 4)}
    source = save_directory(tmp_path / "in", weights)
    words = ("'model.layers.0.mixer.dt_proj.weight'", "blocks of 32", "only 4", "--rule", "--skip")
    refused(source, tmp_path, *words, error=OptionError)
    assert not (tmp_path / "out.partial").exists()
    quantize(source, "int4-g32", tmp_path / "out", skip=["dt_proj"], **FAST)
    single = save_directory(
        tmp_path / "narrow", {"model.embed_tokens.weight": torch.randn(9, 16), "a.up_proj.weight": torch.randn(9, 16)}
    )
    with pytest.raises(OptionError, match=r"'model\.embed_tokens\.weight'.*--embedding FORMAT"):
        plan(single, "int4-g16", estimate=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rules": ["down_prj=int8-g32"]}, ["--rule 'down_prj'", "matches no tensor", "down_proj"]),
        ({"skip": [r"layers\.99\."]}, [r"--skip 'layers\.99\.'", "matches no tensor", "model.layers."]),
        ({"rules": ["layernorm=int8-g32"]}, ["--rule 'layernorm'", "no rows", "input_layernorm"]),
        ({"rules": ["int8-g32"]}, ["--rule 'int8-g32'", "regex=format"]),
        ({"rules": ["=int8-g32"]}, ["regex=format"]),
        ({"rules": ["(=int8-g32"]}, ["--rule '('", "not a regular expression"]),
        ({"skip": ["*"]}, ["--skip '*'", "not a regular expression"]),
        ({"skip": ["weight"]}, ["nothing is left to quantize"]),
        ({"shard_size": "much"}, ["'much'", "5GB"]),
        ({"shard_size": 0}, ["'0'", "5GB"]),
        ({"threads": 0}, ["--threads", "at least 1"]),
        ({"scale_rule": "best"}, ["'best'", "mse, absmax"]),
        ({"format": "keep"}, ["'keep'", "--skip"]),
    ],
)
def test_options_that_cannot_be_meant(single: Path, tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
    refused(single, tmp_path, *words, error=OptionError, **options)
    assert not (tmp_path / "out.partial").exists()


# -- places to write to ------------------------------------------------------------------------------------------------


def test_output_directories_of_something_else(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "busy"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match=r"busy' is not empty.*choose another output"):
        quantize(single, "int4-g32", out, **FAST)
    with pytest.raises(OptionError, match=r"is a file.*choose a directory"):
        quantize(single, "int4-g32", out / "thesis.tex", **FAST)
    with pytest.raises(OptionError, match=r"is not empty"):
        quantize(single, "int4-g32", single, **FAST)  # over its own source
    assert files_of(out) == {"thesis.tex": b"years of work"} and not (tmp_path / "busy.partial").exists()
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "diary.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"new\.partial.*'diary\.txt', which is not numfit's"):
        quantize(single, "int4-g32", tmp_path / "new", **FAST)
    assert files_of(tmp_path / "new.partial") == {"diary.txt": b"mine"}
    (tmp_path / "other.partial").write_text("a file")
    with pytest.raises(OptionError, match=r"other\.partial.*is a file"):
        quantize(single, "int4-g32", tmp_path / "other", **FAST)


def test_a_finished_checkpoint_that_lost_a_file(single: Path, tmp_path: Path) -> None:
    quantize(single, "int4-g32", tmp_path / "out", **FAST)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(OptionError, match=r"'tokenizer\.json' is missing or cut off"):
        quantize(single, "int4-g32", tmp_path / "out", **FAST)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_work(single: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(single, "int4-g32", tmp_path / "whole", **FAST)
    real, calls = partial.write_all, iter(range(30))

    def full(file: Any, data: Any) -> None:
        if next(calls, None) is None:
            real(file, bytes(data)[:7])
            raise OSError(code, os.strerror(code))
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "write_all", full)
        refused(
            single,
            tmp_path,
            "no space left",
            os.strerror(code),
            "out.partial",
            "make room",
            "goes on",
            error=CheckpointError,
        )
    assert quantize(single, "int4-g32", tmp_path / "out", **FAST)["resumed"] > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_limit_on_file_sizes_keeps_the_work(single: Path, tmp_path: Path) -> None:
    """The same with the kernel's own refusal instead of a simulated one."""
    quantize(single, "int4-g32", tmp_path / "whole", **FAST)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        refused(single, tmp_path, "no space left", "File too large", "goes on")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert quantize(single, "int4-g32", tmp_path / "out", **FAST)["resumed"] > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_said_at_once(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(single, tmp_path, "no space left", "MB are needed", "make room")
    assert not any((tmp_path / "out.partial" / "checkpoint").iterdir())


def test_no_permission_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own directory is closed to everyone but its owner
    try:
        folder.chmod(0o755)
        source = llama_directory(folder / "in")
        (source / "model.safetensors").chmod(0o644)  # the library makes it readable by its owner only
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # permissions do not bind root
        try:
            refused(source, folder / "closed", "no permission to write", "closed/out.partial", "nothing was written")
        finally:
            if root:
                os.seteuid(0)
    finally:
        (folder / "closed").chmod(0o755)
        shutil.rmtree(folder)


# -- finished checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def packed(single: Path, tmp_path: Path) -> Path:
    quantize(single, "int4-g32", tmp_path / "packed", **FAST)
    return tmp_path / "packed"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("numfit.json", lambda m: m.update(format_version=2), ["format_version 2", "newer numfit"]),
        (
            "config.json",
            lambda c: c["quantization_config"].update(format_version=7),
            ["format_version 7", "newer numfit"],
        ),
        ("config.json", lambda c: c.pop("quantization_config"), ["no quantization_config of numfit"]),
        ("config.json", lambda c: c["quantization_config"].pop("formats"), ["quantization_config", "damaged"]),
        (
            "config.json",
            lambda c: c["quantization_config"]["formats"]["int4-g32"].update(version=9),
            ["int4-g32", "version 9"],
        ),
        (
            "config.json",
            lambda c: c["quantization_config"]["tensors"].pop("lm_head.weight"),
            ["lm_head.weight", "disagree"],
        ),
        ("numfit.json", lambda m: m.pop("tensors"), ["no section 'tensors'"]),
        ("numfit.json", lambda m: m["tensors"].pop("lm_head.weight"), ["lm_head.weight", "disagree"]),
        (
            "numfit.json",
            lambda m: m["tensors"]["lm_head.weight"].update(shape=[96, 32]),
            ["lm_head.weight_codes", "belongs"],
        ),
        ("numfit.json", lambda m: m["tensors"]["lm_head.weight"].update(shape=[0, 0]), ["numfit.json", "damaged"]),
        (
            "numfit.json",
            lambda m: m["tensors"]["lm_head.weight"].update(format="int4-g32"),
            ["lm_head.weight", "disagree"],
        ),
        ("numfit.json", lambda m: m["kept"].pop("model.norm.weight"), ["model.norm.weight", "unexpected"]),
        ("numfit.json", lambda m: m["kept"]["model.norm.weight"].pop("shape"), ["numfit.json", "damaged"]),
    ],
)
def test_checkpoints_that_contradict_themselves(
    packed: Path, file: str, change: Callable[[dict[str, Any]], Any], words: list[str]
) -> None:
    edit(packed / file, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(packed)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    with pytest.raises(CheckpointError):
        verify(packed)


@pytest.mark.parametrize(
    "change", ["missing plane", "extra tensor", "narrower plane", "truncated", "missing file", "stray file"]
)
def test_verify_refuses(packed: Path, change: str) -> None:
    weights = packed / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    if change == "missing plane":
        del tensors[name]
    elif change == "extra tensor":
        tensors[name := "model.layers.0.mlp.ghost.weight"] = torch.zeros(3)
    elif change == "narrower plane":
        tensors[name] = tensors[name][:, :1].clone()
    if change == "truncated":
        rewrite(weights, lambda data: data[:-10])
    elif change == "missing file":
        weights.unlink()
    elif change == "stray file":
        save_file(tensors, packed / "more.safetensors")
    else:
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"more\.safetensors" if change == "stray file" else r"model\.safetensors"
    ):
        verify(packed)
    if change not in ("truncated", "missing file", "stray file"):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            open_checkpoint(packed)


def test_inspect_and_convert_of_something_else(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(single)]) == 2
    assert "is not a numfit checkpoint" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere"), "--verify"]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert main(["convert", str(single), "-o", str(tmp_path / "out")]) == 2
    assert "needs no conversion" in capsys.readouterr().err
    assert main(["plan", str(single), "-f", "int4-g32", "--rule", "nonsense=int8"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("numfit: error: --rule 'nonsense'") and not said.out and said.err.count("\n") == 1
