"""The decoder map, from lists of tensor names alone."""

from __future__ import annotations

import pytest

from numfit.errors import CheckpointError
from numfit.structure import Norm, decoder_map

CONFIG = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
ATTENTION = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
FFN = [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
LLAMA = [*ATTENTION, *FFN, "input_layernorm.weight", "post_attention_layernorm.weight"]


def model(inside, layers=2, root="model.", outside=("embed_tokens.weight", "norm.weight")):
    return [root + name for name in outside] + [f"{root}layers.{i}.{name}" for i in range(layers) for name in inside]


def test_llama():
    decoder = decoder_map([*model(LLAMA, 12), "lm_head.weight"], CONFIG)
    assert [layer.index for layer in decoder.layers] == list(range(12))  # by number, not by spelling
    layer = decoder.layers[10]
    p = "model.layers.10."
    assert layer.input_norm == Norm(p + "input_layernorm.weight", None, 0.0)
    assert layer.attention_inputs == tuple(f"{p}self_attn.{x}_proj" for x in "qkv")
    assert layer.ffn_norm == Norm(p + "post_attention_layernorm.weight", None, 0.0)
    assert layer.ffn_inputs == (p + "mlp.gate_proj", p + "mlp.up_proj")
    assert layer.feed_forwards[0].down == p + "mlp.down_proj" and layer.feed_forwards[0].expert is None
    assert (layer.v, layer.o) == (p + "self_attn.v_proj", p + "self_attn.o_proj")
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.queries_per_kv) == (8, 2, 8, 4)
    assert decoder.embedding == "model.embed_tokens.weight" and decoder.lm_head == "lm_head.weight"
    assert decoder.final_norm == Norm("model.norm.weight", None, 0.0) and decoder.verified
    assert not layer.unexplained


def test_tied_head_biases_and_explicit_head_dim():
    names = model([*LLAMA, "self_attn.v_proj.bias"])
    decoder = decoder_map([*names, "lm_head.weight"], CONFIG | {"tie_word_embeddings": True, "head_dim": 32})
    assert decoder.lm_head is None and decoder.head_dim == 32 and not decoder.layers[0].unexplained


def test_gemma_norms_sit_on_both_sides_and_gain_is_one_plus_weight():
    inside = [*LLAMA, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight",
              "self_attn.q_norm.weight", "self_attn.k_norm.weight"]  # fmt: skip
    layer = decoder_map(model(inside), CONFIG | {"model_type": "gemma3_text"}).layers[1]
    assert layer.ffn_norm == Norm("model.layers.1.pre_feedforward_layernorm.weight", None, 1.0)
    assert layer.input_norm is not None and layer.input_norm.offset == 1.0 and not layer.unexplained


def test_norms_only_after_the_blocks_feed_nothing():
    inside = [*ATTENTION, *FFN, "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]
    layer = decoder_map(model(inside), CONFIG | {"model_type": "olmo2"}).layers[0]
    assert layer.input_norm is None and layer.ffn_norm is None


def test_parallel_block_shares_its_norm_and_layernorm_has_a_bias():
    inside = [*ATTENTION[:3], "self_attn.dense.weight", "mlp.fc1.weight", "mlp.fc2.weight",
              "input_layernorm.weight", "input_layernorm.bias"]  # fmt: skip
    decoder = decoder_map(model(inside), CONFIG | {"model_type": "phi"})
    layer = decoder.layers[0]
    assert layer.ffn_norm == layer.input_norm and layer.input_norm is not None
    assert layer.input_norm.bias == "model.layers.0.input_layernorm.bias"
    assert layer.feed_forwards[0].gate is None and layer.ffn_inputs == ("model.layers.0.mlp.fc1",)
    assert layer.o == "model.layers.0.self_attn.dense" and not decoder.verified


@pytest.mark.parametrize(
    ("router", "expert", "parts"),
    [
        ("block_sparse_moe.gate", "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
        ("mlp.gate", "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_in_numeric_order_share_the_norm_with_their_router(router, expert, parts):
    inside = [*ATTENTION, *LLAMA[-2:], f"{router}.weight"]
    inside += [f"{expert.format(e)}{part}.weight" for e in range(11) for part in parts]
    inside += [f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")]
    layer = decoder_map(model(inside, 1), CONFIG).layers[0]
    assert [ff.expert for ff in layer.feed_forwards] == [*range(11), None]  # experts, then the shared one
    p = "model.layers.0." + expert.format(10)
    assert (layer.feed_forwards[10].gate, layer.feed_forwards[10].up, layer.feed_forwards[10].down) == tuple(
        p + x for x in parts
    )
    assert layer.routers == (f"model.layers.0.{router}",) and layer.routers[0] in layer.ffn_inputs
    assert len(layer.ffn_inputs) == 2 * 12 + 1 and not layer.unexplained


def test_packed_experts_fused_projections_and_the_unknown_are_named():
    inside = ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.experts.gate_up_proj",
              "mlp.experts.down_proj",
              "mlp.router.weight", "mlp.experts.down_proj_bias", *LLAMA[-2:]]  # fmt: skip
    layer = decoder_map(model(inside, 1), CONFIG).layers[0]
    p = "model.layers.0."
    assert layer.packed_experts == (p + "mlp.experts.down_proj", p + "mlp.experts.gate_up_proj")
    assert layer.attention_inputs == (p + "self_attn.qkv_proj",) and layer.v is None
    assert layer.unexplained == (p + "mlp.experts.down_proj_bias",)


def test_language_model_is_found_beside_a_vision_tower():
    vision = [f"vision_tower.encoder.layers.{i}.self_attn.{p}_proj.weight" for i in range(40) for p in "qkv"]
    names = vision + model(LLAMA, 2, root="model.language_model.") + ["lm_head.weight"]
    decoder = decoder_map(names, {"model_type": "some_vl", "text_config": CONFIG | {"tie_word_embeddings": False}})
    assert len(decoder.layers) == 2 and decoder.embedding == "model.language_model.embed_tokens.weight"
    assert decoder.final_norm is not None and decoder.model_type == "llama"


@pytest.mark.parametrize(
    ("names", "config", "word"),
    [
        (["a.weight"], CONFIG, "layers.N"),
        ([n for n in model(LLAMA, 3) if ".1." not in n], CONFIG, "layer 1"),
        (model(LLAMA, outside=()), CONFIG, "embed_tokens"),
        (model(LLAMA), CONFIG | {"num_key_value_heads": 3}, "3 key/value"),
        (model(LLAMA), {"model_type": "llama", "hidden_size": 64}, "num_attention_heads"),
    ],
)
def test_what_is_no_decoder_says_why(names, config, word):
    with pytest.raises(CheckpointError, match=word):
        decoder_map(names, config)
