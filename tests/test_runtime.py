"""Loading and running packed models: exactly the logits of the decoded weights, and only from complete checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    IDS,
    KINDS,
    build,
    edit_config,
    from_reference,
    logits,
    pack,
    rewrite,
    save_tokenizer,
    transformers,
)
from torch import Tensor, nn

import numfit
from numfit.checkpoint import open_checkpoint
from numfit.errors import CheckpointError, OptionError
from numfit.kernels import embedding, linear, reference
from numfit.native import library
from numfit.runtime import decode_model, kernels_in_use, load, packed_bytes, use_kernels
from numfit.runtime.modules import QuantEmbedding, QuantExperts, QuantLinear

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels were not built: no compiler at install")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed, tied Llama with a tokenizer. Copy it before changing it."""
    root = tmp_path_factory.mktemp("llama")
    build("llama-tied", root / "source")
    pack(root / "source", root / "packed", rule=lambda name, fmt: "mant4-g32" if "up_proj" in name else fmt)
    save_tokenizer(root / "packed")
    return root / "packed"


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of `llama` to damage."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


# -- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    original = build(kind, tmp_path / "source")
    plain = pack(tmp_path / "source", tmp_path / "packed", "int4-row" if kind in ("gpt2", "minimax") else "int4-g32")
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    got = logits(model)
    torch.testing.assert_close(got, logits(from_reference(plain)), atol=1e-5, rtol=0)
    assert (got - logits(original)).abs().max() > 1e-3, "quantizing must have changed something"


@pytest.mark.parametrize("name", ["mant4-g32", "fp4.25", "nvfp4", "uint4-g32", "int8-tensor", "dynfp4-g16", "int3-g32@u8"])
def test_every_kind_of_plane_loads(name: str, tmp_path: Path) -> None:
    build("llama", tmp_path / "source")
    some = ("0.mlp.up_proj", "1.self_attn.v_proj")
    plain = pack(tmp_path / "source", tmp_path / "packed", rule=lambda n, _: name if any(s in n for s in some) else None)
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


def test_embedding_kept_and_tied(tmp_path: Path) -> None:
    build("llama-tied", tmp_path / "source")
    plain = pack(tmp_path / "source", tmp_path / "packed", embedding="keep")
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


def test_both_tied_tensors_in_the_file_are_both_used(tmp_path: Path) -> None:
    build("llama", tmp_path / "source")
    plain = pack(tmp_path / "source", tmp_path / "packed")
    edit_config(tmp_path / "packed", lambda c: c.update(tie_word_embeddings=True))
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_what_the_pipeline_writes(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "source")
    numfit.quantize(
        tmp_path / "source", "mant4-g32", tmp_path / "packed", scale_rule="absmax", shard_size=60_000, progress=False
    )
    checkpoint = open_checkpoint(tmp_path / "packed")
    decoded = {name: packed.dequantize() for name, packed in checkpoint.quantized.items()}
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "source", plain)
    rewrite(plain, lambda tensors: tensors.update(decoded))
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


def test_one_expert_kept_among_packed_ones(tmp_path: Path) -> None:
    build("mixtral", tmp_path / "source")
    plain = pack(tmp_path / "source", tmp_path / "packed", rule=lambda name, fmt: "keep" if ".1.w1" in name else fmt)
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


def _conversion(which: str) -> tuple[Any, Any]:
    """A rule that transformers could have for Llama, and what a file of that origin looks like."""
    from transformers import core_model_loading as core

    qkv = [f"self_attn.{x}_proj.weight" for x in "qkv"]

    def fuse(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            parts = [tensors.pop(f"model.layers.{layer}.{name}") for name in qkv]
            tensors[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat(parts)

    def transpose(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            tensors[name] = tensors[name].T

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            tensors[name.replace("mlp", "ffn")] = tensors.pop(name)

    return {
        "split": (core.WeightConverter("self_attn.qkv.weight", qkv, [core.Split(0)]), fuse),
        "permuted": (
            core.WeightConverter(qkv[0], qkv[0], [core.PermuteForRope(permute_layer_names=["q_proj"])]),
            lambda tensors: None,
        ),
        "transposed": (
            core.WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [core.Transpose(0, 1)]),
            transpose,
        ),
        "renamed": (core.WeightRenaming("ffn", "mlp"), rename),
    }[which]


@pytest.mark.parametrize("which", ["split", "permuted", "transposed", "renamed"])
def test_what_transformers_rearranges(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping

    rule, change = _conversion(which)
    build("llama", tmp_path / "source")
    rewrite(tmp_path / "source", change)
    moved = ("qkv", "q_proj", "up_proj")
    fine = "mant4-g32@e3m3"  # members, 6-bit scales and a parent per row: rows of all planes must go along
    plain = pack(tmp_path / "source", tmp_path / "packed", rule=lambda n, f: fine if any(m in n for m in moved) else f)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache that is patched
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [rule])
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


def test_fused_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping, core_model_loading

    def unfuse(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            path = f"model.layers.{layer}.mlp."
            gate, up = tensors.pop(path + "gate_up_proj.weight").chunk(2)
            tensors |= {path + "gate_proj.weight": gate, path + "up_proj.weight": up}

    build("phi3", tmp_path / "source")
    rewrite(tmp_path / "source", unfuse)
    plain = pack(tmp_path / "source", tmp_path / "packed", rule=lambda n, fmt: "keep" if "1.mlp.gate_proj" in n else fmt)
    rule = core_model_loading.WeightConverter(
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.gate_up_proj.weight", [core_model_loading.Concatenate(0)]
    )
    conversion_mapping.get_checkpoint_conversion_mapping("phi3")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "phi3", [rule])
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    torch.testing.assert_close(logits(model), logits(from_reference(plain)), atol=1e-5, rtol=0)


def test_sharded_files(broken: Path, llama: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, broken / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load(broken)[0]), logits(load(llama)[0]))

    lost = next(iter(halves[1]))
    weight_map[lost] = files[0]
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=lost):
        load(broken)
    weight_map[lost] = files[1]
    del weight_map[next(iter(halves[0]))]
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="nowhere"):
        load(broken)
    (broken / files[1]).unlink()
    with pytest.raises(CheckpointError, match=files[1]):
        load(broken)


# -- what stays in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral"])
def test_only_packed_tensors_stay_in_memory(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="reference")
    logits(model)
    rotary = {t.data_ptr(): t.nbytes for n, t in model.named_buffers() if "inv_freq" in n}
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    stored = sum(t.nbytes for t in load_file(tmp_path / "packed" / "model.safetensors").values())
    assert sum(held.values()) - sum(rotary.values()) == stored
    assert not any(p.requires_grad for p in model.parameters()), "autograd would keep decoded weights"


def test_tied_planes_are_held_once_and_move_together(llama: Path) -> None:
    model, _ = load(llama)
    assert type(model.lm_head) is QuantLinear and type(model.model.embed_tokens) is QuantEmbedding
    assert not list(model.lm_head.buffers()) and not list(model.lm_head.parameters())
    moved = nn.Module.to(copy.deepcopy(model), "meta")
    assert moved.lm_head.weight.device.type == "meta" and model.lm_head.weight.device.type == "cpu"


def test_planes_keep_their_type(tmp_path: Path) -> None:
    build("llama-tied", tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed", "nvfp4", embedding="int8-g32@bf16")  # float8, fp32 and bf16 planes
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    before = {name: t.clone() for name, t in model.state_dict().items() if "weight_" in name}
    assert len({t.dtype for t in before.values()}) >= 3
    for change in (lambda: nn.Module.half(model), lambda: nn.Module.to(model, torch.bfloat16)):
        change()
        after = model.state_dict()
        for name, plane in before.items():
            assert after[name].dtype == plane.dtype and torch.equal(after[name].view(torch.uint8), plane.view(torch.uint8))
    assert model.model.embed_tokens(IDS).dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_no_parameter_is_left(tmp_path: Path) -> None:
    build("olmo", tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed", embedding="int8-row")
    model, _ = load(tmp_path / "packed", tokenizer=False, dtype="bfloat16", activations="exact")
    assert model.device.type == "cpu" and model.dtype == torch.bfloat16
    assert model.state_dict().keys() == load_file(tmp_path / "packed" / "model.safetensors").keys()
    model.load_state_dict(model.state_dict())
    assert not [n for n, _ in decode_model(model).named_parameters() if not n.endswith("weight")]


def test_deepcopy_stands_alone(llama: Path) -> None:
    model, _ = load(llama)
    twin = copy.deepcopy(model)
    expected = logits(model)
    for buffer in model.buffers():
        buffer.zero_()
    assert torch.equal(logits(twin), expected) and not torch.equal(logits(model), expected)


def test_experts_are_decoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("mixtral", tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    model, _ = load(tmp_path / "packed", tokenizer=False, activations="exact")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    lazy = experts.gate_up_proj
    assert lazy.shape == (3, 256, 64) and lazy.dtype == torch.float32
    assert torch.equal(lazy[1], (lazy * 1)[1]) and torch.equal(lazy[-1], lazy[2])

    def refuse(self: Any, dtype: Any = None) -> Tensor:
        raise AssertionError("decoded all experts at once")

    monkeypatch.setattr(type(experts._packed["down_proj"]), "decode", refuse)
    logits(model)


def test_packed_weights_are_read_only(llama: Path) -> None:
    model, _ = load(llama)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert "mant4-g32" in repr(weight) and "mant4-g32" in repr(model)
    with pytest.raises(OptionError, match="cannot be written to"):
        weight.zero_()


def test_decode_model(llama: Path) -> None:
    model, _ = load(llama, activations="reference")
    expected = logits(model)
    decode_model(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name, _ in model.named_buffers() if "weight" in name]
    assert torch.equal(logits(model), expected)


# -- the native kernels -----------------------------------------------------------------------------------------


@needs_kernels
def test_kernels_take_the_place_of_planes(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    model, _ = load(llama)
    assert not [name for name, _ in model.named_buffers() if "weight" in name], "planes are kept beside the kernels' layout"
    in_use = kernels_in_use(model)
    assert sum(in_use.values()) == sum(name.endswith("_codes") for name in stored) and not any("PyTorch" in k for k in in_use)
    state = model.state_dict()
    for name, plane in stored.items():
        if name.endswith(("_codes", "_scale")):
            assert torch.equal(state[name].view(torch.uint8), plane.view(torch.uint8)), name
    exact, _ = load(llama, activations="exact")
    reference, _ = load(llama, activations="reference")
    assert not any("PyTorch" not in k for k in kernels_in_use(reference))
    want = logits(reference)
    torch.testing.assert_close(logits(exact), want, atol=1e-5, rtol=0)
    error = float((logits(model) - want).norm() / want.norm())
    assert 1e-6 < error < 0.03, "int8 activations are in use, and cost no more than they should"
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@needs_kernels
def test_kernels_come_and_go(llama: Path) -> None:
    model, _ = load(llama)
    fast = logits(model)
    size = packed_bytes(model)
    use_kernels(model, "reference")
    assert [name for name, _ in model.named_buffers() if "weight_codes" in name]
    assert packed_bytes(model) <= size
    plain = logits(model)
    use_kernels(model, "int8")
    assert torch.equal(logits(model), fast) and not torch.equal(fast, plain)
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), fast) and not [name for name, _ in model.named_buffers() if "weight" in name]
    nn.Module.half(model)
    assert logits(model).dtype == torch.float16 and not [name for name, _ in model.named_buffers() if "weight" in name]
    decode_model(model)
    assert type(model.lm_head) is nn.Linear


@needs_kernels
def test_a_gradient_through_packed_layers(llama: Path) -> None:
    model, _ = load(llama)
    x = torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().sum()) > 0


def test_unknown_activations(llama: Path) -> None:
    with pytest.raises(OptionError, match="int8, exact, reference"):
        load(llama, activations="int4")


# -- the reference kernels ----------------------------------------------------------------------------------------


def test_linear_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, bias = torch.randn(37, 48), torch.randn(3, 5, 48), torch.randn(37)
    q = numfit.quantize_tensor(w, "mant4-g16")
    expected = nn.functional.linear(x, q.dequantize(), bias)
    torch.testing.assert_close(linear(x, q, bias), expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(reference, "CHUNK", 10 * 48)
    torch.testing.assert_close(linear(x, q, bias), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(linear(x, q), expected - bias, atol=1e-5, rtol=0)
    assert linear(x.bfloat16(), q).dtype == torch.bfloat16


def test_embedding_decodes_only_rows_that_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    q = numfit.quantize_tensor(torch.randn(50, 32), "int4-g32")
    expected = q.dequantize()
    decoded = []
    whole = numfit.QuantizedTensor.dequantize
    monkeypatch.setattr(numfit.QuantizedTensor, "dequantize", lambda self, *a: decoded.append(self.shape[0]) or whole(self, *a))
    ids = torch.tensor([[3, 49, 3], [0, 3, 49]])
    assert torch.equal(embedding(ids, q), expected[ids]) and decoded == [3]
    assert embedding(ids, q, torch.float16).dtype == torch.float16


# -- bad checkpoints ----------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def _drop(name: str) -> Any:
    return lambda path: rewrite(path, lambda tensors: tensors.pop(name))


def _put(name: str, value: Tensor) -> Any:
    return lambda path: rewrite(path, lambda tensors: tensors.update({name: value}))


def _quantization(**entries: Any) -> Any:
    return lambda path: edit_config(path, lambda config: config["quantization_config"].update(entries))


def _forget(path: Path) -> None:
    edit_config(path, lambda config: config["quantization_config"]["tensors"].pop(UP))


def _cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


DAMAGE = {
    "missing plane": (_drop(f"{UP}_scale"), f"{UP}_scale"),
    "missing codes": (_drop(f"{UP}_codes"), f"{UP}_codes"),
    "missing kept tensor": (_drop("model.norm.weight"), "lacks 'model.norm.weight'"),
    "extra plane": (_put(f"{UP}_zero", torch.zeros(128, 1, dtype=torch.uint8)), f"{UP}_zero"),
    "extra tensor": (_put("model.layers.7.mlp.up_proj.weight", torch.zeros(128, 64)), "layers.7.*has no place"),
    "wrong rows": (_put(f"{UP}_codes", torch.zeros(127, 32, dtype=torch.uint8)), UP),
    "wrong row length": (_put(f"{UP}_codes", torch.zeros(128, 31, dtype=torch.uint8)), f"{UP}_codes"),
    "wrong type": (_put(f"{UP}_codes", torch.zeros(128, 32, dtype=torch.int8)), f"{UP}_codes"),
    "wrong kept shape": (_put("model.norm.weight", torch.zeros(63)), "'model.norm.weight' in .* is F32"),
    "packed and plain": (_put(UP, torch.zeros(128, 64)), f"{UP}' both packed and plain"),
    "tensor without format": (_forget, UP),
    "unknown version": (_quantization(format_version=2), "format_version 2"),
    "no version": (_quantization(format_version=None), "format_version None"),
    "no formats": (_quantization(formats=None), "damaged"),
    "undescribed format": (_quantization(formats={}), "damaged.*int[48]-g32"),
    "unknown part of a format": (_quantization(formats={"mant4-g32": {"version": 9}}), "version 9"),
    "unknown model": (
        lambda path: edit_config(path, lambda c: c.update(model_type="nonesuch")),
        "'nonesuch'.*transformers",
    ),
    "no language model": (
        lambda path: edit_config(path, lambda c: c.update(model_type="vit")),
        "not a causal language",
    ),
    "truncated": (_cut, "truncated"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "broken config": (lambda path: (path / "config.json").write_text("{"), "config.json"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer"),
    "broken tokenizer": (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("which", DAMAGE)
def test_damage_is_refused_in_a_sentence(which: str, broken: Path) -> None:
    damage, sentence = DAMAGE[which]
    damage(broken)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(broken)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_load_without_tokenizer(broken: Path) -> None:
    for file in broken.glob("tokenizer*"):
        file.unlink()
    model, tokenizer = load(broken, tokenizer=False)
    assert tokenizer is None and logits(model).shape == (2, 11, 96)


@pytest.mark.parametrize("where", ["nowhere", "file.gguf"])
def test_not_a_directory(where: str, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=where):
        load(tmp_path / where)


def test_dtype_and_device(llama: Path) -> None:
    model, _ = load(llama, dtype="bf16")
    assert logits(model).dtype == torch.bfloat16
    with pytest.raises(OptionError, match="int7"):
        load(llama, dtype="int7")
    with pytest.raises(OptionError, match="toaster"):
        load(llama, device="toaster")
    assert load(llama, device="cpu")[0].device.type == "cpu"


# -- plain directories --------------------------------------------------------------------------------------------


def test_plain_directory(tmp_path: Path) -> None:
    original = build("qwen2", tmp_path / "source")
    model, _ = load(tmp_path / "source", tokenizer=False)
    assert torch.equal(logits(model), logits(original)) and type(model).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_drop(UP), f"lacks '{UP}'"),
        (_put("spare", torch.zeros(3)), "holds 'spare'"),
        (_put(UP, torch.zeros(3, 3)), f"wrong size of '{UP}'"),
    ],
)
def test_damaged_plain_directory(damage: Any, sentence: str, tmp_path: Path) -> None:
    build("llama", tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "source", tokenizer=False)


def test_transformers_settings_are_left_alone(llama: Path) -> None:
    logging = transformers().utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(llama, progress=True)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
