"""GGUF in: tiny files written by the gguf package itself, read back against the model they came from, then damaged."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
import torch

from numfit.checkpoint import open_source
from numfit.checkpoint.gguf import convert_gguf, open_gguf
from numfit.checkpoint.gguf_header import read_header
from numfit.demo import models, packages
from numfit.errors import CheckpointError, NumfitError, OptionError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]


def byte_alphabet() -> list[str]:
    """GPT-2's visible spelling of the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    table |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in kept)}
    return [table[byte] for byte in range(256)]


TOKENS = SPECIAL + byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]


def tiny_model(kind: str, **changes):
    shape = {
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "vocab_size": len(TOKENS), "max_position_embeddings": 128,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(head_dim=HEAD_DIM, rms_norm_eps=1e-5, **shape))
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(rms_norm_eps=1e-6, **shape))
    else:
        config = transformers.Gemma3TextConfig(
            head_dim=HEAD_DIM, sliding_window=8, query_pre_attn_scalar=HEAD_DIM, **shape
        )
        model = transformers.Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases start constant, which would hide mistakes
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data *= 5
    return model.eval()


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = NAMES | {
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def to_gguf_name(name: str, kind: str) -> str:
    module, suffix = name.rsplit(".", 1)
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{suffix}"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{(GEMMA_NAMES if kind == 'gemma3' else NAMES)[inside]}.{suffix}"


def llama_permute(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: halves of a head become neighbours."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path, model, kind="llama", types=None, tokenizer=True, more=None, extra_tensors=None, drop=(), changes=None
):
    """Write `model` as llama.cpp would; returns Hugging Face name -> values as quantized (in Hugging Face's order)."""
    types = types or {}
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    values = {
        "block_count": LAYERS, "embedding_length": HIDDEN, "feed_forward_length": FFN, "context_length": 128,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
    } | (changes or {})  # fmt: skip
    if kind == "gemma3":
        values |= {"attention.key_length": HEAD_DIM, "attention.sliding_window": config.sliding_window}
    for key, value in values.items():
        writer.add_uint32(f"{kind}.{key}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{kind}.rope.freq_base", 10000.0 if kind != "gemma3" else 1e6)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT)
    for add, key, value in more or []:
        getattr(writer, add)(key, value)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        kept = tensor.float().numpy()
        chosen = next((t for pattern, t in types.items() if pattern in name and tensor.ndim == 2), "F32")
        qtype = gguf.GGMLQuantizationType[chosen]
        if kind == "gemma3" and name.endswith("norm.weight"):
            kept = kept + np.float32(1)
            expected[name] = torch.from_numpy(kept - np.float32(1))
        else:
            expected[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(kept, qtype), qtype).copy())
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            kept = llama_permute(kept, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(to_gguf_name(name, kind), gguf.quantize(np.ascontiguousarray(kept), qtype), raw_dtype=qtype)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    """A tiny llama in mixed block types, and what its tensors are worth."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = tiny_model("llama", tie_word_embeddings=True)
    types = {"embed": "Q8_0", "q_proj": "Q4_1", "k_proj": "Q5_0", "v_proj": "F16", "o_proj": "BF16", "mlp": "Q4_0"}
    return path, write_gguf(path, model, types=types)


def test_every_tensor_comes_back_bit_for_bit(llama_file):
    path, expected = llama_file
    source = open_gguf(path)
    assert source.names()[0] == "model.embed_tokens.weight" and source.names()[-1] == "model.norm.weight"
    assert set(source.names()) == set(expected)
    for name in source.names():
        tensor = source.read(name)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
        assert source.info(name).shape == tuple(tensor.shape) and source.info(name).nbytes == 4 * tensor.numel()


def test_llama_biases_are_permuted_with_their_rows(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True, attention_bias=True)
    expected = write_gguf(tmp_path / "m.gguf", model)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config()["attention_bias"] is True
    name = "model.layers.1.self_attn.k_proj.bias"
    assert torch.equal(source.read(name), expected[name])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_converted_directory_computes_what_the_model_did(tmp_path, kind):
    model = tiny_model(kind, tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", model, kind)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", progress=False)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(again) is type(model)
    ids = torch.randint(0, len(TOKENS), (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    if kind == "qwen2":
        assert torch.equal(again.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)


def test_converted_directory_has_tokenizer_chat_template_and_dtype(llama_file, tmp_path):
    convert_gguf(llama_file[0], tmp_path / "out", dtype="bfloat16", progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == (
        "<|im_start|>hello<|im_end|>"
    )
    pieces = tokenizer.tokenize("<|im_start|>hello w12  3")
    # Every digit stands alone, so "12" is not used and the spaces before 3 stay together: the smollm rule, not GPT-2's.
    assert pieces == ["<|im_start|>", "hello", "Ġw", "1", "2", "ĠĠ", "3"]
    text = "  Grüße,\n\n\t12 345 hello — 日本 🎉  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def sentencepiece_file(path, prefix):
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "abc",
        "▁a",
        "bc",
        "▁ab",
    ]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -1.0, -5.0, -2.0, -3.0, -4.0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_follow_from_scores(tmp_path, prefix):
    from tokenizers import Tokenizer

    from numfit.checkpoint.gguf_tokenizer import save_tokenizer

    sentencepiece_file(tmp_path / "t.gguf", prefix=prefix)
    save_tokenizer(read_header(tmp_path / "t.gguf"), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # "ab" (-1) is merged before "▁a" (-2) and "bc" (-3); then "▁ab" (-4) before "abc" (-5).
    expected = ["<s>", "▁ab", "c", "<0xC3>", "<0xA9>"] if prefix else ["<s>", "abc", "<0xC3>", "<0xA9>"]
    encoded = tokenizer.encode("abcé")
    assert encoded.tokens == expected
    assert tokenizer.decode(encoded.ids) == "abcé"


def test_one_matrix_stored_twice_is_tied_to_its_finer_copy(tmp_path):
    model = tiny_model("qwen2", tie_word_embeddings=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    expected = write_gguf(tmp_path / "m.gguf", model, "qwen2", types={"embed": "Q4_0", "lm_head": "Q8_0"})
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config()["tie_word_embeddings"] is True and "lm_head.weight" not in source.names()
    assert torch.equal(source.read("model.embed_tokens.weight"), expected["lm_head.weight"])


def test_two_different_matrices_stay_untied(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", tiny_model("llama", tie_word_embeddings=False))
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config()["tie_word_embeddings"] is False and source.names()[-1] == "lm_head.weight"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(source.read(name), expected[name])


def test_header_agrees_with_the_gguf_package(llama_file):
    header, reader = read_header(llama_file[0]), gguf.GGUFReader(llama_file[0])
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == theirs
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.nbytes, ours.shape) == (
            tensor.data_offset,
            tensor.n_bytes,
            tuple(tensor.shape[::-1].tolist()),
        )
    assert len(header.tensors) == len(reader.tensors)


def llama3_factors() -> np.ndarray:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(head_dim=HEAD_DIM, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled).numpy().astype(np.float32)


def test_llama3_rotary_scaling_is_recovered_and_any_other_refused(tmp_path):
    model, factors = tiny_model("llama", tie_word_embeddings=True), llama3_factors()
    assert factors.max() == 32 and factors.min() == 1
    write_gguf(tmp_path / "a.gguf", model, extra_tensors={"rope_freqs.weight": factors})
    scaling = open_gguf(tmp_path / "a.gguf").config()["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32.0
    write_gguf(tmp_path / "b.gguf", model, extra_tensors={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(CheckpointError, match="rope_freqs"):
        open_gguf(tmp_path / "b.gguf")


# ---------------------------------------------------------------------------------------------- bad input


def refused(path, *words):
    """Opening `path` fails with one sentence that names the file and contains `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert path.name in message
    for word in words:
        assert word in message, message


def test_truncated_anywhere_is_a_sentence(llama_file, tmp_path):
    whole = llama_file[0].read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 3, 4, 7, 8, 15, 23, 24, *(rng.randrange(25, len(whole)) for _ in range(60)), len(whole) - 33]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:length])
        refused(path)


def test_corrupt_headers_never_escape_as_anything_but_our_errors(llama_file, tmp_path):
    whole = llama_file[0].read_bytes()
    data_begin = min(tensor.offset for tensor in read_header(llama_file[0]).tensors.values())
    rng, refusals = random.Random(1), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(4, data_begin)] = rng.randrange(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            source = open_gguf(path)
            source.read(source.names()[1])
            source.save_tokenizer(tmp_path)
        except NumfitError as error:
            refusals += 1
            assert "damaged.gguf" in str(error)
    assert refusals > 50


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 something else entirely", "not a GGUF"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**62, 0), "tensors"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**63), "metadata entries"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 0, 2**50) + bytes(64), "numbers in metadata 'k'"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**50) + bytes(64), "strings in metadata 'k'"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**60) + bytes(64), "needs"),
        (struct.pack("<4sIQQQ1sIQI", b"GGUF", 3, 1, 0, 1, b"t", 1, 2**60, 0) + bytes(64), "truncated"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 4_000_000_000) + bytes(64), "dimensions"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "no tensors"),
    ],
)
def test_absurd_headers(tmp_path, content, word):
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content)
    refused(path, word)


def test_missing_file_and_directory(tmp_path):
    refused(tmp_path / "nothing.gguf")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf")


def test_what_cannot_be_converted_says_so(tmp_path):
    model, path = tiny_model("llama", tie_word_embeddings=True), tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "bloom")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "bloom", "llama", "qwen2", "gemma3")
    write_gguf(path, model, extra_tensors={"blk.0.ffn_gate_inp.weight": np.zeros((2, HIDDEN), np.float32)})
    refused(path, "blk.0.ffn_gate_inp.weight")
    write_gguf(path, model, drop=("model.layers.1.mlp.up_proj.weight",))
    refused(path, "model.layers.1.mlp.up_proj.weight")
    write_gguf(path, model, changes={"attention.head_count": 3})
    refused(path, "blk.0.attn_q.weight")
    write_gguf(path, model, changes={"block_count": 2**31})
    refused(path, "block_count")
    write_gguf(path, model, more=[("add_string", "llama.rope.scaling.type", "yarn")])
    refused(path, "yarn")


def test_missing_or_unknown_tokenizer_is_a_sentence_and_leaves_nothing(tmp_path):
    model, path = tiny_model("llama", tie_word_embeddings=True), tmp_path / "m.gguf"
    write_gguf(path, model, tokenizer=False)
    with pytest.raises(CheckpointError, match=r"m\.gguf.*tokenizer"):
        convert_gguf(path, tmp_path / "out", progress=False)
    write_gguf(path, model)
    path.write_bytes(path.read_bytes().replace(b"smollm", b"smellm"))
    with pytest.raises(CheckpointError, match="smellm"):
        convert_gguf(path, tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_output_directory_in_use_is_left_alone(llama_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        convert_gguf(llama_file[0], out, progress=False)
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_full_disk_leaves_nothing_behind(llama_file, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numfit.checkpoint.gguf.write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        convert_gguf(llama_file[0], tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_models_of_the_demonstration_are_converted_once_each_in_its_precision(llama_file, tmp_path, monkeypatch):
    path, expected = llama_file
    fetched = []
    monkeypatch.setattr(models, "fetch", lambda file, cache: fetched.append((file, cache)) or path)
    made = {torch.float32: models.smollm2(tmp_path), torch.bfloat16: models.qwen_1_5b(tmp_path)}
    assert fetched == [(packages.SMOLLM2, tmp_path), (packages.QWEN_1_5B, tmp_path)]
    assert made[torch.bfloat16] == tmp_path / models.QWEN_1_5B_NAME
    for dtype, directory in made.items():
        source = open_source(directory)
        for name, values in expected.items():
            assert torch.equal(source.read(name), values.to(dtype)), name
    assert models.qwen_1_5b(tmp_path) == made[torch.bfloat16] and len(fetched) == 2  # from the cache


def test_dtype_is_checked_and_float16_overflow_refused(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.norm.weight.data[3] = 1e6
    write_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(OptionError, match="int8"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="int8")
    with pytest.raises(OptionError, match="float16"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the real model


@pytest.mark.real
def test_smollm2_equals_transformers_own_loading():
    pytest.importorskip("accelerate", reason="transformers loads GGUF only with accelerate")
    from numfit.demo.packages import SMOLLM2, cached

    path = cached(SMOLLM2)
    if path is None:
        pytest.skip("SmolLM2 is not in numfit's cache (make demo fetches it)")
    source = open_gguf(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert set(state) - set(source.names()) == {"lm_head.weight"}  # tied
    for name in source.names():
        assert torch.equal(source.read(name), state[name]), name
