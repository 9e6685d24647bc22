"""The exact rewrite: same logits, every linear changed, factors drawn in the documented order."""

from __future__ import annotations

import json
import math

import pytest
import torch

from numfit.demo.models import SMOLLM2_NAME, cached_directory, degrid
from numfit.errors import CheckpointError
from numfit.structure import decoder_map
from numfit.transforms.degrid import Rescale, degrid_plan

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SHAPE = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "num_hidden_layers": 3, "vocab_size": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 32, "sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "head_dim": 16}),
}


def tiny(kind):
    name, more = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**SHAPE, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in key:
            parameter.data *= 5
    return model.eval()


def logits(model, count=24):
    ids = torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits


def rewritten(kind, tmp_path):
    """(model, its rewritten self loaded strictly, tensors before, tensors after)"""
    model = tiny(kind)
    model.save_pretrained(tmp_path / "before")
    degrid(tmp_path / "before", tmp_path / "after", progress=False)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "after", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = (safetensors_torch.load_file(tmp_path / d / "model.safetensors") for d in ("before", "after"))
    return model, again.eval(), before, after


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_logits_stay_and_every_linear_changes(kind, tmp_path):
    model, again, before, after = rewritten(kind, tmp_path)
    assert set(before) == set(after)
    old, new = logits(model), logits(again)
    assert float(old.std()) > 0.05  # a model that says something
    assert float((old - new).abs().max()) <= 1e-4 * float(old.abs().max())
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        inside = ".layers." in name and tensor.ndim == 2
        if inside:  # linears; the factors differ from 1 everywhere
            assert float((tensor != before[name]).float().mean()) > 0.99, name
        elif "embed" in name or "lm_head" in name or name == "model.norm.weight":
            assert torch.equal(tensor, before[name]), name
    changed_norms = [n for n in after if n.endswith("input_layernorm.weight") and not torch.equal(after[n], before[n])]
    assert len(changed_norms) == SHAPE["num_hidden_layers"]


def test_factors_are_drawn_in_the_documented_order(tmp_path):
    """Recomputed here from nothing but the generator: seed 0, s1 s2 s3 s4 per layer, exp((2 rand - 1) ln 1.25)."""
    _, _, before, after = rewritten("qwen2", tmp_path)
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.exp((2 * torch.rand(count, generator=generator) - 1) * math.log(1.25))

    for layer in range(3):
        s1, s2, s3, s4 = draw(64), draw(64), draw(96), draw(2 * 16)
        served = s4.reshape(2, 16).repeat_interleave(2, dim=0).reshape(-1)  # 4 query heads on 2 kv heads
        p = f"model.layers.{layer}."
        for name, factor in {
            "input_layernorm.weight": 1 / s1,
            "post_attention_layernorm.weight": 1 / s2,
            "self_attn.q_proj.weight": s1[None, :],
            "self_attn.k_proj.weight": s1[None, :],
            "self_attn.v_proj.weight": s4[:, None] * s1[None, :],
            "self_attn.v_proj.bias": s4,
            "self_attn.q_proj.bias": torch.ones(64),
            "self_attn.o_proj.weight": 1 / served[None, :],
            "mlp.gate_proj.weight": s2[None, :],
            "mlp.up_proj.weight": s3[:, None] * s2[None, :],
            "mlp.down_proj.weight": 1 / s3[None, :],
        }.items():
            torch.testing.assert_close(after[p + name], before[p + name] * factor, rtol=2e-6, atol=0)
        assert float(s1.min()) >= 0.8 and float(s1.max()) <= 1.25


def test_gemma_gain_convention():
    gain = torch.tensor([0.8, 1.25], dtype=torch.float64)
    out = Rescale(gain=gain, offset=1.0)(torch.tensor([0.5, -0.25]))
    torch.testing.assert_close(out, torch.tensor([1.5 / 0.8 - 1, 0.75 / 1.25 - 1]))


def test_grid_is_gone(tmp_path):
    model = tiny("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = (weight.data * 10).round() / 10
    model.save_pretrained(tmp_path / "before")
    degrid(tmp_path / "before", tmp_path / "after", progress=False)
    after = safetensors_torch.load_file(tmp_path / "after" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(len(row.unique()) < 20 for row in weight.data.reshape(-1, 32))
    for row in after[name].reshape(-1, 32):  # zeros stay zeros, all else is different
        nonzero = row[row != 0]
        assert len(nonzero) > 8 and len(nonzero.unique()) == len(nonzero)


def test_bf16_source_and_config_become_fp32(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "before")
    degrid(tmp_path / "before", tmp_path / "after", progress=False)
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} <= {None, "float32"}
    after = safetensors_torch.load_file(tmp_path / "after" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def names_and_shapes(**changes):
    shapes = {"model.embed_tokens.weight": (8, 16), "model.norm.weight": (16,)}
    p = "model.layers.0."
    shapes |= {f"{p}self_attn.{x}_proj.weight": (16, 16) for x in "qkvo"}
    shapes |= {f"{p}mlp.{x}_proj.weight": (16, 16) for x in ("gate", "up", "down")}
    shapes |= {f"{p}{x}_layernorm.weight": (16,) for x in ("input", "post_attention")}
    return {name: shape for name, shape in (shapes | changes).items() if shape}


CONFIG = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 16}
PREFIX = "model.layers.0."


@pytest.mark.parametrize(
    ("shapes", "config", "word"),
    [
        (names_and_shapes(), {"model_type": "strange"}, "strange"),
        (names_and_shapes(**{PREFIX + "self_attn.sinks": (2,)}), {}, "self_attn.sinks"),
        (names_and_shapes(**{PREFIX + "mlp.gate_proj.weight": None}), {}, "gate"),
        (names_and_shapes(**{PREFIX + "self_attn.v_proj.weight": None}), {}, "lacks"),
        (names_and_shapes(**{PREFIX + "post_attention_layernorm.weight": None}), {}, "one norm"),
    ],
)
def test_what_would_change_the_function_is_refused(shapes, config, word):
    with pytest.raises(CheckpointError, match=word):
        degrid_plan(decoder_map(shapes, CONFIG | config), shapes.__getitem__, shapes.__contains__)


@pytest.mark.real
def test_smollm2_keeps_its_logits():
    plain, off_grid = cached_directory(SMOLLM2_NAME), cached_directory(f"{SMOLLM2_NAME}-degrid")
    if plain is None or off_grid is None:
        pytest.skip("SmolLM2 is not in numfit's cache (make demo fetches it)")
    text = "The planet Mars is the fourth planet from the Sun, and the most studied one apart from our own. " * 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(off_grid)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        old, new = (
            transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits
            for d in (plain, off_grid)
        )
    assert float((old - new).abs().max()) < 1e-3
    before, after = (safetensors_torch.load_file(d / "model.safetensors") for d in (plain, off_grid))
    name = "model.layers.10.mlp.down_proj.weight"
    on_grid = [len(block.unique()) for block in before[name].reshape(-1, 32)[:500]]
    free = [len(block.unique()) for block in after[name].reshape(-1, 32)[:500]]
    assert max(on_grid) <= 16 and sum(free) / len(free) > 31.9  # zeros stay zeros
