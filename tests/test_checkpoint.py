"""Files in and out: what is written is what the safetensors library reads, and what the manifest says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_checkpoints import files_of, llama_directory, llama_weights, save_directory
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from numfit.checkpoint import open_checkpoint, open_source, read_manifest, read_quantized, verify
from numfit.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    DTYPES,
    Slot,
    layout_shards,
    make_group,
    read_header,
    read_tensor,
    same_bytes,
    tensor_bytes,
)
from numfit.checkpoint.source import natural_key
from numfit.checkpoint.unpack import convert_packed
from numfit.errors import CheckpointError, OptionError
from numfit.formats import quantize_tensor
from numfit.pipeline import quantize


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of arbitrary bits, so that NaN payloads and the like must survive too."""
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", [name for name in DTYPES if name not in ("U64", "U32", "U16")])
def test_reads_every_dtype_as_the_library_does(tmp_path: Path, name: str) -> None:
    tensors = {
        "matrix": random_bits(DTYPES[name], (3, 5)),
        "single": random_bits(DTYPES[name], ()),
        "none": random_bits(DTYPES[name], (0, 4)),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (header[key].dtype, header[key].shape) == (name, tuple(tensor.shape))
        again = read_tensor(tmp_path, header[key])
        assert again.dtype == tensor.dtype and again.shape == tensor.shape
        assert bytes(tensor_bytes(again)) == bytes(tensor_bytes(tensor))


SLOTS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["F32", "F16", "U8", "I64"]), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1, max_size=3,
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SLOTS, st.integers(1, 2000))
def test_written_shards_are_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, groups, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    built = [
        make_group(f"g{i}", [Slot(f"g{i}.s{j}", dtype, tuple(shape)) for j, (dtype, shape) in enumerate(slots)])
        for i, slots in enumerate(groups)
    ]
    shards = layout_shards(built, limit)
    values = {slot.name: random_bits(DTYPES[slot.dtype], slot.shape) for shard in shards for slot in shard.slots}
    assert len(values) == sum(map(len, groups))  # every slot has its place, in one file
    for shard in shards:
        data = shard.header + b"".join(bytes(tensor_bytes(values[slot.name])) for slot in shard.slots)
        assert len(shard.header) % 8 == 0 and len(data) == shard.nbytes
        assert len(shard.groups) == 1 or len(data) <= limit
        (folder / shard.file).write_bytes(data)
        assert read_header(folder / shard.file) == shard.infos
        for name, tensor in load_file(folder / shard.file).items():
            assert bytes(tensor_bytes(tensor)) == bytes(tensor_bytes(values[name]))
        with safe_open(folder / shard.file, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_planes_are_aligned_and_stay_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(llama_directory(tmp_path / "in"), "mant4-g32", out, shard_size=30_000, scale_rule="absmax", progress=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(out)
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((out / file).stat().st_size <= 30_000 for file in files)
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.infos.values())
    assert index["weight_map"] == {name: info.file for name, info in checkpoint.infos.items()}
    for name in checkpoint.quantized:
        assert len({file for key, file in index["weight_map"].items() if key.startswith(f"{name}_")}) == 1
    for info in checkpoint.infos.values():
        assert info.start % DTYPES[info.dtype].itemsize == 0


def test_a_tensor_larger_than_the_limit_has_a_file_alone() -> None:
    groups = [make_group(name, [Slot(name, "U8", (size,))]) for name, size in (("a", 10), ("b", 5000), ("c", 10))]
    shards = layout_shards(groups, 1000)
    assert [[group.name for group in shard.groups] for shard in shards] == [["a"], ["b"], ["c"]]
    assert [shard.file for shard in shards] == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]


@pytest.mark.parametrize("shards", [1, 3])
def test_source_reads_what_was_saved_in_the_order_of_the_model(tmp_path: Path, shards: int) -> None:
    weights = llama_weights(torch.bfloat16, layers=11)
    source = open_source(save_directory(tmp_path / "m", weights, shards=shards))
    assert set(source.names()) == set(weights)
    layers = [int(name.split(".")[2]) for name in source.names() if ".layers." in name]
    assert layers == sorted(layers)
    for name in source.names():
        info = source.info(name)
        assert (info.dtype, info.shape, info.nbytes) == ("BF16", tuple(weights[name].shape), weights[name].nbytes)
        assert torch.equal(source.read(name), weights[name])
    assert [file.name for file in source.aux_files()] == [
        "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_read_tensors_outlive_the_file(tmp_path: Path) -> None:
    weights = llama_weights()
    source = open_source(save_directory(tmp_path / "m", weights))
    tensor = source.read("lm_head.weight")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")  # a view of a mapped file would crash or read zeros now
    assert torch.equal(tensor, weights["lm_head.weight"])


def test_fingerprint_depends_on_content_not_on_place(tmp_path: Path) -> None:
    first = open_source(llama_directory(tmp_path / "a")).fingerprint()
    assert first == open_source(llama_directory(tmp_path / "b")).fingerprint()
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    changed = open_source(tmp_path / "b").fingerprint()
    assert [name for name in first["files"] if first["files"][name] != changed["files"][name]] == ["tokenizer.json"]


def test_same_bytes(tmp_path: Path) -> None:
    a = torch.randn(7, 9)
    b = a.clone()
    b[6, 8] += 1
    save_file({"a": a, "b": b, "c": a.clone(), "d": a.reshape(9, 7).clone()}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert same_bytes(tmp_path, header["a"], header["c"])
    assert not same_bytes(tmp_path, header["a"], header["b"])
    assert not same_bytes(tmp_path, header["a"], header["d"])


def test_natural_order() -> None:
    names = ["layers.10.a", "layers.2.a", "layers.2.b", "embed", "layers.2"]
    assert sorted(names, key=natural_key) == ["embed", "layers.2", "layers.2.a", "layers.2.b", "layers.10.a"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of two formats in several shards. Read only."""
    folder = tmp_path_factory.mktemp("packed")
    source = llama_directory(folder / "in")
    quantize(
        source,
        "mant4-g32@e3m3",
        folder / "out",
        rules=["down_proj=int3-g32"],
        shard_size=30_000,
        scale_rule="absmax",
        progress=False,
    )
    return folder / "out"


def test_checkpoint_gives_back_what_was_quantized(packed: Path) -> None:
    weights = llama_weights()
    checkpoint = open_checkpoint(packed)
    assert set(checkpoint.quantized) | set(checkpoint.kept) == set(weights)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        expected = quantize_tensor(weights[name], checkpoint.formats[name], scale_rule="absmax")
        got = read_quantized(packed, name)
        assert got.shape == expected.shape and got.format == expected.format
        for plane, value in expected.planes.items():
            assert torch.equal(got.planes[plane], value)
        error = float(((weights[name] - got.dequantize()).double() ** 2).sum() / (weights[name].double() ** 2).sum())
        assert checkpoint.manifest["tensors"][name]["error"] == pytest.approx(error, rel=1e-5)
    assert torch.equal(checkpoint.kept["model.norm.weight"], weights["model.norm.weight"])
    with pytest.raises(CheckpointError, match=r"no quantized tensor 'model\.norm\.weight'.*kept"):
        read_quantized(packed, "model.norm.weight")
    with pytest.raises(KeyError):
        checkpoint.quantized["model.norm.weight"]


def test_config_alone_describes_the_formats(packed: Path) -> None:
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["format_version"]) == ("numfit", 1)
    assert (
        set(quantization["formats"])
        == {"mant4-g32@e3m3", "int3-g32", "int8-g32"}
        == set(quantization["tensors"].values())
    )


def test_manifest_is_canonical_and_knows_no_place(packed: Path) -> None:
    text = (packed / "numfit.json").read_text()
    assert json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n" == text
    assert str(packed.parent) not in "".join(map(str, files_of(packed).values()))


def test_verify_reads_every_byte(packed: Path, tmp_path: Path) -> None:
    found = verify(packed)
    manifest = read_manifest(packed)
    assert found["tensors"] == len(manifest["tensors"]) and found["files"] == len(list(packed.iterdir())) - 1
    assert found["bytes"] == sum(len(data) for name, data in files_of(packed).items() if name != "numfit.json")


@pytest.mark.parametrize("where", ["first byte of the data", "last byte", "tokenizer"])
def test_verify_notices_one_flipped_bit(packed: Path, tmp_path: Path, where: str) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    file = copy / ("tokenizer.json" if where == "tokenizer" else sorted(copy.glob("*.safetensors"))[1].name)
    data = bytearray(file.read_bytes())
    place = (
        -1 if where == "last byte" else 2 if where == "tokenizer" else min(i.start for i in read_header(file).values())
    )
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        verify(copy)


def test_verify_notices_a_manifest_that_lies_about_a_plane(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    manifest = json.loads((copy / "numfit.json").read_text())
    manifest["tensors"]["lm_head.weight"]["planes"]["scale"] = "0" * 64
    (copy / "numfit.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scale"):
        verify(copy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert_writes_the_plain_model(packed: Path, tmp_path: Path, dtype: str) -> None:
    convert_packed(packed, tmp_path / "plain", dtype, progress=False)
    checkpoint, plain = open_checkpoint(packed), open_source(tmp_path / "plain")
    config = plain.config()
    assert "quantization_config" not in config and config["dtype"] == dtype
    assert set(plain.names()) == set(llama_weights())
    target = getattr(torch, dtype)
    for name in plain.names():
        expected = (
            checkpoint.quantized[name].dequantize(target)
            if name in checkpoint.quantized
            else checkpoint.kept[name].to(target)
        )
        assert plain.info(name).dtype == DTYPE_NAMES[target] and torch.equal(plain.read(name), expected)
    extras = {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert extras <= files_of(tmp_path / "plain").keys() and "numfit.json" not in files_of(tmp_path / "plain")


def test_convert_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    weights = llama_weights()
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    quantize(
        save_directory(tmp_path / "in", weights), "e4m3-row@bf16", tmp_path / "out", scale_rule="absmax", progress=False
    )
    with pytest.raises(OptionError, match=r"layers\.0\.mlp\.up_proj\.weight.*float16"):
        convert_packed(tmp_path / "out", tmp_path / "plain", "float16", progress=False)
    assert not (tmp_path / "plain").exists()
    with pytest.raises(OptionError, match="int4"):
        convert_packed(tmp_path / "out", tmp_path / "plain", "int4", progress=False)
