"""The quantized cache in transformers: generation of every kind, attention over packed blocks against decoded ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import COMMON, transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache

from numfit import native as library
from numfit.errors import FormatError, OptionError
from numfit.kvcache import PRESETS, QuantizedCache, View, attend, packed_attention, preset, stream
from numfit.kvcache import native as kernel
from numfit.kvcache.store import Store
from numfit.runtime.generate import generate

LONG = {**COMMON, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 1024}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 32}),  # soft-capped scores; every other layer slides
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "sliding_window": 32}),  # a sink logit for each head
    "phi3": ("Phi3Config", {}),
}
PROMPT = torch.randint(3, 96, (2, 230), generator=torch.Generator().manual_seed(1))


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    library_ = transformers()
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(library_, name)(**{**LONG, **extra})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def logits(model: Any, ids: Tensor, cache: Any, chunk: int, **inputs: Any) -> Tensor:
    """All logits, `chunk` tokens a pass."""
    out = []
    with torch.inference_mode():
        for i in range(0, ids.shape[1], chunk):
            given = {k: v[:, : i + chunk] for k, v in inputs.items()}
            out.append(model(input_ids=ids[:, i : i + chunk], past_key_values=cache, use_cache=True, **given).logits)
    return torch.cat(out, 1)


def close(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- attention --------------------------------------------------------------------------------------------------------

PAIRS = ["asym4-g128/channel,asym4-g64", "asym3-g128/channel,tq3", "asym2-g32/channel,asym2-g32", "sym8-g32,sym8-g32",
         "tq4+centred,tq4", "mant4-search8+centred,mant4-search8/channel", "mant4-paper3,mant4-paper3/channel",
         "nf4-g64,nf4-g64",
         "asym8-g64/channel,asym8-g128/channel", "tq2,tq2", "nf3-g64,int4-g64/channel", "mant4-g64/channel,mant4-g64",
         "asym3-g128/channel+outliers0.01,nf4-g64+permuted",
         "asym4-g32+centred+permuted,asym4-g32+permuted", "oct3,rotvq", "nvfp4,fp8-row"]  # fmt: skip


def view(pair: str, dim: int, tokens: int = 700, new: int = 1, width: int | None = None) -> View:
    generator = torch.Generator().manual_seed(dim)
    parts = []
    for codec, size in zip(preset(pair), (dim, width or dim)):
        store = Store(codec, 4, 64, "layer 0")
        x = torch.randn(2, 2, tokens, size, generator=generator) + 2 * torch.randn(1, 2, 1, size, generator=generator)
        store.append(x.bfloat16())
        parts.append((store.snapshot(), torch.randn(2, 2, new, size, generator=generator)))
    return View(parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def expected(query: Tensor, seen: View, mask: Tensor) -> Tensor:
    keys, values = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in seen.materialize(torch.float32))
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.1)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_blockwise_attention_is_attention(pair: str, dim: int) -> None:
    for new in (1, 5, 300):
        seen = view(pair, dim, new=new)
        query = torch.randn(2, 6, new, dim, generator=torch.Generator().manual_seed(3))
        causal = torch.ones(new, seen.length, dtype=torch.bool).tril(seen.past)
        padded = causal.repeat(2, 1, 1, 1)
        padded[1, :, :, :33] = False
        exact = expected(query, seen, causal)
        assert close(attend(query, seen, 0.1, compiled=False), exact) < 3e-6
        assert close(attend(query, seen, 0.1, padded, compiled=False), expected(query, seen, padded)) < 3e-6
        added = torch.zeros(padded.shape).masked_fill(~padded, torch.finfo(torch.float32).min)
        assert close(attend(query, seen, 0.1, added, compiled=False), expected(query, seen, padded)) < 3e-6


def test_keys_and_values_may_differ_in_width() -> None:
    seen = view("asym4-g128/channel,tq4", 96, width=64)
    query = torch.randn(2, 4, 1, 96, generator=torch.Generator().manual_seed(3))
    assert close(attend(query, seen, 0.1), expected(query, seen, torch.ones(1, seen.length, dtype=torch.bool))) < 3e-6


@pytest.fixture
def isa() -> Iterator[None]:
    before = library.isa()
    yield
    if before is not None:
        library.set_isa(before)
        library.set_threads(1)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_the_kernel_agrees_with_pytorch(pair: str, dim: int, isa: None) -> None:
    """Close to the reference; the same bits for every instruction set and number of threads."""
    if library.library() is None:
        pytest.skip("this installation has no CPU kernels")
    for new in (1, 3):
        seen = view(pair, dim, tokens=1100, new=new)
        query = torch.randn(2, 6, new, dim, generator=torch.Generator().manual_seed(3))
        mask = torch.ones(2, 1, new, seen.length, dtype=torch.bool).tril(seen.past)
        mask[1, :, :, :33] = False
        if kernel.attend(query.reshape(2, 2, 3 * new, dim), seen.keys, seen.values, None) is None:
            kinds = [kernel.kind(s.stream, dim) for s in (seen.keys, seen.values)]
            assert None in kinds
            return
        for how in (None, mask):
            reference = attend(query, seen, 0.1, how, compiled=False)
            results = []
            for name, threads in itertools.product(library.isa_names(), (1, 2)):
                library.set_isa(name)
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    results.append(attend(query, seen, 0.1, how))
                finally:
                    torch.set_num_threads(before)
            assert close(results[0], reference) < 3e-6
            if how is None or new == 1:
                assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("pair", ["asym4-g128/channel,asym4-g64", "tq4,tq4", "sym8-g32,sym8-g32", "mant4-g64,int4-g64/channel"])
def test_nan_is_not_masked(pair: str, isa: None) -> None:
    """A NaN score makes the output of its query NaN, as in PyTorch, and of no other; what is masked out counts for nothing."""
    if library.library() is None:
        pytest.skip("this installation has no CPU kernels")
    seen = view(pair, 64, tokens=5000)  # several pieces of blocks
    clean = torch.randn(2, 4, 1, 64, generator=torch.Generator().manual_seed(3))
    query = clean.clone()
    query[0, 1, 0, 7] = torch.nan
    padded = torch.ones(2, 1, 1, seen.length, dtype=torch.bool)
    padded[:, :, :, :600] = False  # and a whole block
    far = torch.zeros(padded.shape)
    far[1, :, :, 1700] = torch.nan  # a mask that is itself NaN in one place
    for name in library.isa_names():
        library.set_isa(name)
        for mask in (None, padded, torch.zeros(padded.shape).masked_fill(~padded, torch.finfo(torch.float32).min)):
            have, want = attend(query, seen, 0.1, mask), attend(clean, seen, 0.1, mask)
            assert have[0, 1].isnan().all() and have.isnan().sum() == have[0, 1].numel(), (name, mask is None)
            rest = ~have.isnan()
            assert torch.equal(have[rest], want[rest])
            assert torch.equal(attend(query, seen, 0.1, mask, compiled=False).isnan(), have.isnan())
        have = attend(clean, seen, 0.1, far)
        assert have[1].isnan().all() and not have[0].isnan().any()
        masked = kernel.attend(query.view(2, 2, 2, 64), seen.keys, seen.values, torch.zeros(padded.shape, dtype=torch.bool))
        assert masked is not None
        most, total, out = masked
        assert (most == -torch.inf).all() and (total == 0).all() and (out == 0).all()


def test_the_kernel_leaves_what_it_would_misread() -> None:
    if library.library() is None:
        pytest.skip("this installation has no CPU kernels")
    seen = view("tq3,mant4-g64", 64, tokens=300)
    query = torch.randn(2, 2, 3, 64)
    for other in (query.bfloat16(), query.double(), query[:1], query[:, :1], query.repeat(2, 1, 1, 1)):
        assert kernel.attend(other, seen.keys, seen.values, None) is None
    mask = torch.zeros(seen.length, 1, 1, 2).permute(3, 1, 2, 0)  # tokens lie apart
    mask[0, 0, 0, 9] = mask[1, 0, 0, 70] = -torch.inf
    for given in (mask, mask == 0):
        have, want = (kernel.attend(query, seen.keys, seen.values, m) for m in (given, given.contiguous()))
        assert have is not None and want is not None and all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_the_kernel_does_not_mind_torchs_defaults() -> None:
    """What the library gets is CPU memory of the right size, whatever new tensors are made of by default."""
    if library.library() is None:
        pytest.skip("this installation has no CPU kernels")
    seen = view("tq3,mant4-g64", 64, tokens=300)
    query, mask = torch.randn(2, 2, 3, 64), torch.ones(2, 1, 1, seen.length, dtype=torch.bool)
    want = kernel.attend(query, seen.keys, seen.values, mask)
    assert want is not None
    torch.set_default_dtype(torch.bfloat16)
    try:
        have = kernel.attend(query, seen.keys, seen.values, mask)
    finally:
        torch.set_default_dtype(torch.float32)
    kernel.kind.cache_clear()
    with torch.device("meta"):
        also = kernel.attend(query, seen.keys, seen.values, mask)
    assert all(torch.equal(a, b) for a, b in zip((have or ()) + (also or ()), want * 2, strict=True))


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_kernel_does_the_presets(name: str) -> None:
    key, value = preset(name)
    for dim in (64, 128):
        assert kernel.kind(key, dim) is not None and kernel.kind(value, dim) is not None


def test_fully_masked_rows_are_zero_and_finite() -> None:
    seen = view(PAIRS[0], 64)
    query = torch.randn(2, 4, 1, 64)
    mask = torch.ones(2, 1, 1, seen.length, dtype=torch.bool)
    mask[1] = False
    for compiled in (False, True):
        out = attend(query, seen, 0.1, mask, compiled=compiled)
        assert torch.isfinite(out).all() and not out[1].any() and out[0].any()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_and_decoded_attention_agree(kind: str) -> None:
    model = tiny(kind)
    with torch.inference_mode():
        exact = model(input_ids=PROMPT).logits
    plain = logits(model, PROMPT, DynamicCache(config=model.config), 23)
    assert close(plain, exact) < 1e-4
    options = {"sink": 4, "residual": 16, "staging": torch.float32}
    if kind in ("gemma2", "gpt-oss"):  # their own attention functions know soft caps and sinks
        model.set_attn_implementation("eager")
    decoded = logits(model, PROMPT, QuantizedCache(model.config, "kv8", **options), 23)
    cache = QuantizedCache(model.config, "kv8", **options)
    with packed_attention(model):
        packed = logits(model, PROMPT, cache, 23)
    assert close(packed, decoded) < 2e-4
    assert 1e-6 < close(packed, exact) < 0.1  # it did encode, and lost little
    assert cache.get_seq_length() == 230 and cache.memory()["packed"] > 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_residual_as_long_as_the_text_changes_no_bit(packed: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny(dtype=dtype)
        how = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        want = model.generate(PROMPT, **how)
        cache = QuantizedCache(model.config, "kv4", residual=300, staging=dtype)
        with packed_attention(model) if packed else nullcontext():
            got = model.generate(PROMPT, past_key_values=cache, **how)
        assert torch.equal(got.sequences, want.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits))
        assert cache.memory()["packed"] == 0


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True, "temperature": 1.0}, {"num_beams": 3, "do_sample": False}]
)
def test_generation_of_every_kind(kind: str, how: dict[str, Any]) -> None:
    """At eight bits tokens are those of the full cache; the cache has seen all of them but the last."""
    model = tiny(kind)
    torch.manual_seed(5)
    want = model.generate(PROMPT, max_new_tokens=12, **how)
    cache = QuantizedCache(model.config, "kv8", residual=16, staging=torch.float32)
    with packed_attention(model):
        torch.manual_seed(5)
        got = model.generate(PROMPT, max_new_tokens=12, past_key_values=cache, **how)
    assert float((got == want).float().mean()) > 0.98
    assert cache.get_seq_length() == 241


def test_left_padding() -> None:
    """Padded rows see no padding; near what they are alone, not identical (scales of channels see the padding's keys)."""
    model = tiny()
    ids = PROMPT.clone()
    ids[1, :40] = 0
    mask = (torch.arange(230) >= torch.tensor([[0], [40]])).long()
    with torch.inference_mode():
        exact = model(input_ids=ids, attention_mask=mask).logits
    for kv, most in (("kv8", 0.03), ("kv4", 0.4)):
        with packed_attention(model):
            got = logits(model, ids, QuantizedCache(model.config, kv, residual=16), 23, attention_mask=mask)
        assert torch.isfinite(got[0]).all() and torch.isfinite(got[1, 40:]).all()
        assert close(got[0], exact[0]) < most and close(got[1, 40:], exact[1, 40:]) < most


def test_batches_are_repeated_selected_and_reordered() -> None:
    model = tiny()
    with packed_attention(model):
        cache = QuantizedCache(model.config, "kv4", residual=16)
        logits(model, PROMPT, cache, 230)
        token = PROMPT[:, :1]
        with torch.inference_mode():
            cache.batch_repeat_interleave(2)
            four = model(input_ids=token.repeat_interleave(2, 0), past_key_values=cache).logits
            assert torch.allclose(four[0], four[1], atol=1e-4) and torch.allclose(four[2], four[3], atol=1e-4)
            cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
            cache.batch_select_indices(torch.tensor([0, 1]))
            alone = QuantizedCache(model.config, "kv4", residual=16)
            swapped = PROMPT[[1, 0]]
            logits(model, torch.cat([swapped, token[[1, 0]]], 1), alone, 230)
            ours, theirs = (model(input_ids=token, past_key_values=c).logits for c in (cache, alone))
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert cache.get_seq_length() == 232


def test_crop_within_the_residual() -> None:
    model = tiny()
    cache = QuantizedCache(model.config, "kv4", residual=32)
    logits(model, PROMPT, cache, 230)
    same = QuantizedCache(model.config, "kv4", residual=32)
    logits(model, PROMPT, same, 230)
    logits(model, PROMPT[:, :7], cache, 7)
    cache.crop(-7)
    assert cache.get_seq_length() == 230
    token = PROMPT[:, :1]
    assert torch.equal(logits(model, token, cache, 1), logits(model, token, same, 1))
    with pytest.raises(OptionError, match="cannot be taken back"):
        cache.crop(-200)
    cache.reset()
    assert cache.get_seq_length() == 0
    again, fresh = (logits(model, PROMPT, c, 230) for c in (cache, QuantizedCache(model.config, "kv4", residual=32)))
    assert torch.equal(again, fresh)


def test_assisted_generation_crops() -> None:
    model = tiny()
    cache = QuantizedCache(model.config, "kv8", residual=64)
    with packed_attention(model):
        out = model.generate(PROMPT[:1], max_new_tokens=10, do_sample=False, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert out.shape[1] == 240


def test_layers_are_chosen_and_left_alone() -> None:
    model = tiny("llama")
    kinds = lambda cache: [type(layer).__name__ for layer in cache.layers]  # noqa: E731
    assert kinds(QuantizedCache(model.config, skip_first=1)) == ["DynamicLayer", "QuantizedLayer"]
    assert kinds(QuantizedCache(model.config, skip_last=1)) == ["QuantizedLayer", "DynamicLayer"]
    assert kinds(QuantizedCache(model.config, per_layer={0: None})) == ["DynamicLayer", "QuantizedLayer"]
    mixed = QuantizedCache(model.config, per_layer={1: "kv3", 0: (stream("tq4"), stream("tq2"))}, residual=8)
    assert mixed.layers[1].stores[0].stream == stream("asym3-g128/channel")
    logits(model, PROMPT, mixed, 115)
    assert mixed.memory()["bits_per_value"] is not None
    chosen = QuantizedCache(model.config, key="tq4+centred", value=stream("nf4-g64"))
    assert [s.name for s in chosen.streams] == ["tq4+centred", "nf4-g64"]
    assert kinds(QuantizedCache(tiny("gemma3").config)) == ["DynamicSlidingWindowLayer", "QuantizedLayer"]
    with pytest.raises(OptionError, match="layer 9 has no cache"):
        QuantizedCache(model.config, per_layer={9: "kv4"})
    with pytest.raises(OptionError, match="no layer's cache would be encoded"):
        QuantizedCache(model.config, skip_first=2)
    with pytest.raises(OptionError, match="none is negative"):
        QuantizedCache(model.config, sink=-1)
    with pytest.raises(OptionError, match="unknown cache 'kv5'"):
        QuantizedCache(model.config, "kv5")


def test_overflow_is_refused_with_layer_and_position() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[70] = torch.inf
    with pytest.raises(FormatError, match=r"values of layer 1, position 4: .* head 1, 0 tokens on, channel 6"):
        logits(model, PROMPT, QuantizedCache(model.config, "kv4"), 230)


def test_memory_is_what_is_kept() -> None:
    model = tiny()
    cache = QuantizedCache(model.config, "kv4", sink=4, residual=64)
    logits(model, PROMPT, cache, 230)
    memory = cache.memory()
    # 2 layers, 2 sequences, 2 heads of 64; 226 tokens after the sinks: 128 of the keys and 128 of the values are encoded
    encoded = 2 * 2 * 2 * 64 * 128
    assert memory["packed"] == 2 * encoded // 2
    assert memory["metadata"] == encoded // 128 * 4 + encoded // 64 * 4
    assert memory["residual"] == 2 * (2 * 2 * 2 * 64 * 102) * 2  # bfloat16, keys and values
    assert memory["bits_per_value"] == 4.375 and memory["equivalent"] == 2 * 2 * 2 * 2 * 64 * 230 * 2
    assert memory["tokens"] == 230
    stores = [s for layer in cache.layers for s in layer.stores]
    kept = [t for s in stores for t in (s.sinks, s.tail, *(p for b in s.blocks for p in b.values()))]
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(memory[k] for k in ("packed", "metadata", "residual", "idle"))


def test_who_ignores_the_cache_gets_nan_and_not_a_wrong_number() -> None:
    seen = view(PAIRS[0], 64)
    from numfit.kvcache.cache import _stand_in

    fake = _stand_in(seen, seen.new_keys)
    assert fake.shape == (2, 2, seen.length, 64) and fake.untyped_storage().nbytes() == 4 and fake.isnan().all()


class Words:
    """A tokenizer of numbers."""

    chat_template = None
    pad_token_id = 0

    def __call__(self, text: str, return_tensors: str) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([[int(w) for w in text.split()]])})

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


def test_generate_with_a_cache() -> None:
    model = tiny()
    prompt = " ".join(str(int(i)) for i in PROMPT[0])
    plain = generate(model, Words(), prompt, max_tokens=8)
    cached = generate(model, Words(), prompt, max_tokens=8, kv="kv8")
    assert plain.cache is None and cached.cache is not None and cached.cache["packed"] > 0
    with packed_attention(model):
        cache = QuantizedCache(model.config, "kv8")
        ours = model.generate(PROMPT[:1], max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert cached.text == Words().decode(ours[0, 230:]) and cached.new_tokens == 8
    assert model.config._attn_implementation == "sdpa"  # as before
    with pytest.raises(OptionError, match="native decoder"):
        generate(model, Words(), prompt, kv="kv8", decoder=object())  # type: ignore[arg-type]
