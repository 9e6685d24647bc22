"""What users of the quantized cache count on: the command line, hybrid models, and memory of one block beside the cache."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kvcache_model import LONG, PAIRS, PROMPT, close, logits, tiny, view
from tiny_models import build, save_tokenizer, transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from numfit.cli import eval as eval_verb
from numfit.cli import run as run_verb
from numfit.errors import OptionError
from numfit.kvcache import QuantizedCache, attend, doubt, packed_attention, preset
from numfit.kvcache.stream import Stream
from numfit.runtime import load


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kv") / "model"
    model = tiny()
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{3 + (i * i * 7 + i // 5) % 93}" for i in range(1200)))
    return path


def command(verb: Any, *words: object) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.run(parser.parse_args([str(word) for word in words])) == 0


# -- the command line -------------------------------------------------------------------------------------------------


def test_run_with_a_cache(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = " ".join(f"w{int(i)}" for i in PROMPT[0])
    told = (directory, "--prompt", prompt, "--max-tokens", 6, "--kv", "kv4", "--dtype", "float32", "--threads", 1)
    command(run_verb, *told, "--json")
    out = json.loads(capsys.readouterr().out)
    model, tokenizer = load(directory, dtype="float32")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    cache = QuantizedCache(model.config)  # kv4 is the default
    with packed_attention(model):
        ours = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert out["text"] == tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True)
    assert out["kv"] == "kv4" and out["kv_memory"] == cache.memory() and out["kv_memory"]["packed"] > 0
    assert out["decoder"] == "transformers" and "kv4" in out["decoder_reason"]
    command(run_verb, *told)
    printed = capsys.readouterr()
    assert printed.out.strip() == out["text"].strip() and "kv4" in printed.err and "bits" in printed.err
    with pytest.raises(OptionError, match="unknown cache 'kv5'"):
        command(run_verb, directory, "--prompt", "w7", "--kv", "kv5")


@pytest.mark.parametrize("chunk", [1, 16])
def test_eval_through_a_cache(directory: Path, text: Path, chunk: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Perplexity and KL through the cache, token by token and in chunks, against a loop of our own."""
    told = ("--text", text, "--windows", 1, "--context", 240, "--dtype", "float32", "--threads", 1, "--json")
    command(eval_verb, directory, *told, "--kv", "kv4", "--kv-chunk", chunk, "--reference", directory)
    out = json.loads(capsys.readouterr().out)
    model, tokenizer = load(directory, dtype="float32")
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    begin = 0 if out["bos"] else 1
    ids = ids[:, begin : begin + 240]
    cache = QuantizedCache(model.config, "kv4")
    with packed_attention(model):
        got = logits(model, ids[:, :-1], cache, chunk)
    exact = logits(model, ids[:, :-1], DynamicCache(config=model.config), 239)
    loss = torch.nn.functional.cross_entropy(got[0], ids[0, 1:])
    p, q = exact.log_softmax(-1), got.log_softmax(-1)
    assert out["ppl"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert out["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert out["kl_mean"] > 1e-5 and out["kv_memory"] == cache.memory() and out["kv_chunk"] == chunk


# -- models whose layers are of several kinds -------------------------------------------------------------------------

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(HYBRIDS))
def test_only_full_attention_is_encoded(kind: str) -> None:
    library = transformers()
    name, extra = HYBRIDS[kind]
    torch.manual_seed(0)
    model = library.AutoModelForCausalLM.from_config(getattr(library, name)(**{**LONG, **extra})).eval()
    model.generation_config.eos_token_id = None
    cache = QuantizedCache(model.config, "kv8", residual=16, staging=torch.float32)
    assert type(cache.layers[1]).__name__ == "QuantizedLayer" and type(cache.layers[0]).__name__ != "QuantizedLayer"
    want = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    with packed_attention(model):
        got = model.generate(PROMPT, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert cache.memory()["packed"] > 0 and float((got == want).float().mean()) > 0.98


# -- memory and dtypes ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not any(t.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
                                                 for a in tree_leaves(args) if isinstance(a, Tensor)):  # fmt: skip
                self.bytes = max(self.bytes, t.nbytes)
        return out


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[1], PAIRS[5], PAIRS[-1]])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_decodes_one_block_at_a_time(pair: str, compiled: bool) -> None:
    """No tensor is larger than a block of 256 tokens as int64 codes, however long the cache."""
    biggest = []
    for tokens in (1500, 1500 + 36 * 128):  # as many in the residual
        seen = view(pair, 64, tokens=tokens)
        query = torch.randn(2, 4, 1, 64)
        attend(query, seen, 0.1, compiled=compiled)  # tables and bases are made once
        with Largest() as largest:
            attend(query, seen, 0.1, compiled=compiled)
        biggest.append(largest.bytes)
    assert biggest[0] == biggest[1] <= 8 * 2 * 2 * 256 * 64


def test_what_is_kept_has_sixteen_bits() -> None:
    for dtype, kept in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        model = tiny(dtype=dtype)
        cache = QuantizedCache(model.config)
        assert cache.streams == preset("kv4")
        logits(model, PROMPT, cache, 230)
        assert {t.dtype for layer in cache.layers for s in layer.stores for t in (s.sinks, s.tail)} == {kept}


def test_centring_is_exact_under_softmax() -> None:
    """A constant that is added to all keys changes no weight: the kernel and PyTorch's path may leave it out."""
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query, mean = scores[:, :8], scores[:1, 8:16]
    keys = torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose((query @ keys.T).softmax(-1), (query @ (keys - mean).T).softmax(-1), atol=1e-12)
    for name in ("asym4-g64+centred,tq4", "tq4+centred,tq4"):
        seen = view(name, 64)
        query = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(2))
        outputs = [attend(query, seen, 0.1, compiled=compiled) for compiled in (True, False)]
        assert close(outputs[0], outputs[1]) < 3e-6 and math.isfinite(float(outputs[0].sum()))


def test_generation_is_a_function_of_the_seed() -> None:
    model = tiny()
    made = []
    for seed in (1, 1, 2):
        cache = QuantizedCache(model.config, f"tq2+seed{seed},tq2+seed{seed}", residual=16)
        with packed_attention(model):
            logits_ = logits(model, PROMPT, cache, 23)
        made.append(logits_)
        assert all(isinstance(s, Stream) and s.seed == seed for s in cache.streams)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("kind", "cache", "told"), [("qwen2", "kv4-rot", True), ("qwen2", "kv4", False), ("llama", "kv4-rot", False)]
)
def test_a_rotation_of_keys_with_biases_is_doubted(kind: str, cache: str, told: bool, tmp_path: Path) -> None:
    model = build(kind, tmp_path / kind)
    assert (doubt(model, cache) is not None) == told
