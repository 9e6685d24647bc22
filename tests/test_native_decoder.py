"""The native decoder against transformers on the same packed weights: all kinds that it serves, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from numfit import native
from numfit.cli.main import main
from numfit.errors import NumfitError, OptionError
from numfit.runtime import generate, load, native_decoder
from numfit.runtime.description import RotationSpec, TermsSpec, Unsupported, _Builder, describe
from numfit.runtime.generate import why_not_native
from numfit.runtime.modules import use_kernels

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels are not installed")

LENGTH = 90  # tokens; more than two blocks of keys, and much more than any window here
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "max_position_embeddings": 64}),  # and beyond
    "llama-tied-biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-scaled-rope": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "llama-one-kv-head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 37}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.5,
                                "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {
        "sliding_window": 5, "num_hidden_layers": 3, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip
ODD = {"hidden_size": 96, "intermediate_size": 160, "pad_token_id": 0}  # 3 · 32 and 5 · 32; attention's output has 64
MIXED = {  # linears of a layer that share an input and differ in what they do to it
    "q_proj": "lm4-row+rot", "k_proj": "int4-g32", "v_proj": "mant4-g32+rot7", "o_proj": "trellis3+rot",
    "gate_proj": "int4-g32+rank3+sparse30", "up_proj": "trellis4+rot+rank5", "down_proj": "lm4-row+rot3+rank2+sparse20",
    "embed_tokens": "int8-g32+rot", "lm_head": "int8-g32+rot+sparse10",
}  # fmt: skip
SIDES: dict[str, tuple[str, str]] = {  # name → kind of model, format; "mixed": MIXED
    f"{kind}/{fmt}": (kind, fmt)
    for kind, fmt in [
        ("llama", "lm4-row+rot"), ("qwen2", "lm4-row+rot"), ("gemma3", "lm4-row+rot"), ("phi3", "lm4-row+rot"),
        ("llama", "trellis3+rot"), ("qwen2", "trellis3+rot"), ("gemma3", "trellis3+rot"), ("llama", "trellis4"),
        ("llama", "int4-g32+rank3+sparse30"), ("llama", "mixed"), ("qwen2", "mixed"), ("gemma3", "mixed"),
    ]
}  # fmt: skip


def mixed(name: str, chosen: str | None) -> str | None:
    return next((fmt for part, fmt in MIXED.items() if f"{part}.weight" in name), chosen)


def tokens(count: int = LENGTH, seed: int = 7) -> Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind → the packed model, loaded; made once."""
    made: dict[str, Any] = {}

    def one(kind: str, **options: Any) -> Any:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind.replace("/", "-"))
            if kind in SIDES:
                base, fmt = SIDES[kind]
                tiny_models.KINDS["native"] = KINDS[base][0], KINDS[base][1] | ODD
                options |= {"rule": mixed} if fmt == "mixed" else {"fmt": fmt}
            elif kind in KINDS:
                tiny_models.KINDS["native"] = KINDS[kind]
            tiny_models.build("native" if kind in KINDS or kind in SIDES else kind, directory / "plain")
            tiny_models.pack(directory / "plain", directory / "packed", **options)
            tiny_models.save_tokenizer(directory / "packed")
            made[kind] = load(directory / "packed", activations="exact")
        return made[kind]

    return one


def decoder_of(model: Any, exact: bool = True) -> native_decoder.NativeDecoder:
    decoder, reason = native_decoder.build(model)
    assert decoder is not None, reason
    assert decoder.exact
    decoder.exact = exact
    return decoder


def reference(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


def difference(have: Tensor, want: Tensor) -> float:
    """Root mean square, relative to the spread."""
    return float((have - want).square().mean().sqrt() / want.std())


@pytest.mark.parametrize("kind", [*KINDS, *SIDES])
def test_logits_are_those_of_transformers(make: Any, kind: str) -> None:
    model, _ = make(kind)
    want = reference(model, tokens())
    have = decoder_of(model).logits(tokens())
    assert difference(have, want) < 2e-3
    assert difference(have[60:], want[60:]) < 2e-3  # far beyond the windows


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_int8_activations_are_close(make: Any, kind: str) -> None:
    model, _ = make(kind)
    exact, rough = decoder_of(model).logits(tokens()), decoder_of(model, exact=False).logits(tokens())
    assert 0 < difference(rough, exact) < 0.1


@pytest.mark.parametrize("kind", ["llama", *SIDES])
def test_int8_activations_are_those_of_the_layers(make: Any, kind: str) -> None:
    """Against transformers with int8 activations: what the fp16 cache rounds moves codes by one step here and there, so results
    differ, but by less than two independent roundings of the activations would."""
    model, _ = make(kind)
    decoder = decoder_of(model, exact=False)
    exact, have = reference(model, tokens()), decoder.logits(tokens())
    use_kernels(model, "int8")
    try:
        want = reference(model, tokens())
    finally:
        use_kernels(model, "exact")
    assert difference(have, want) < min(1.2 * difference(want, exact), 0.1)  # that would be √2


def test_matrices_that_share_an_input_share_its_rotation(make: Any) -> None:
    model, _ = make("llama/trellis3+rot")
    description = describe(model)
    layers = [description.spec.layer[i] for i in range(2)]
    turns = [[layer.linears[i].rotation for i in range(7)] for layer in layers]  # q k v, o, gate up, down
    for q, k, v, o, gate, up, down in turns:
        assert q and q == k == v == gate == up  # all read `hidden` numbers
        assert o and down and len({q, o, down}) == 3
    assert turns[0] == turns[1]
    layer = describe(make("llama/mixed")[0]).spec.layer[0]
    q, k, v, _, gate, up, _ = (layer.linears[i].rotation for i in range(7))
    assert k is None and gate is None and q == up and v not in (None, q)


@pytest.mark.parametrize("part", ["m", "signs", "index", "a", "sparse"])
def test_side_terms_that_do_not_fit_are_refused(make: Any, part: str) -> None:
    model, _ = make("llama/mixed")
    description = describe(model)
    down = description.spec.layer[0].linears[6]
    rotation, terms = RotationSpec.from_address(down.rotation), TermsSpec.from_address(down.terms)
    wrong = torch.full((96, 3), 160, dtype=torch.int32)
    if part == "m":
        rotation.m = 10
    elif part == "signs":
        rotation.signs = None
    elif part == "index":
        terms.index = wrong.data_ptr()
    elif part == "a":
        terms.a = None
    else:
        terms.sparse = -1
    with pytest.raises(Unsupported, match="side terms of a matrix do not fit"):
        native_decoder.NativeDecoder(description, exact=True)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3", "qwen2/trellis3+rot", "gemma3/mixed"])
def test_however_the_tokens_are_cut(make: Any, kind: str, exact: bool) -> None:
    """All at once, one by one, in odd pieces: the same bits. So with any number of threads, and after going back."""
    model, _ = make(kind)
    ids, decoder = tokens(), decoder_of(model, exact)
    whole = decoder.logits(ids)
    for pieces in ([1] * LENGTH, [3, 1, 40, 17, 29]):
        at = 0
        for count in pieces:
            assert torch.equal(decoder.forward(ids[at : at + count], at), whole[at + count - 1])
            at += count
    for threads in (1, 2, 3):
        decoder.threads = threads
        assert torch.equal(decoder.logits(ids), whole)
    other = tokens(seed=8)
    decoder.forward(other[:20], 50)  # something else from position 50 on
    assert decoder.length == 70
    assert torch.equal(decoder.forward(ids[50:], 50, every=True), whole[50:])


@pytest.mark.parametrize("kind", ["gemma3", "gemma3/mixed"])
def test_every_instruction_set_computes_the_same(make: Any, kind: str) -> None:
    model, _ = make(kind)
    decoder, best = decoder_of(model), native.isa()
    assert best is not None
    want = decoder.logits(tokens())
    try:
        for name in native.isa_names():
            native.set_isa(name)
            assert torch.equal(decoder.logits(tokens()), want), name
    finally:
        native.set_isa(best)


def test_longer_than_a_chunk_and_than_the_first_room(make: Any) -> None:
    """More tokens than the loop takes at a time, then a cache that has to grow; the last logits follow from all."""
    model, _ = make("llama-tied-biased")
    ids, decoder = tokens(1500), decoder_of(model)
    want = reference(model, ids)[-1]
    decoder.forward(ids[:1000], 0)
    before = decoder.nbytes
    have = decoder.forward(ids[1000:], 1000)
    assert decoder.nbytes > before
    assert difference(have, want) < 2e-3


def test_positions_and_counts_are_checked(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library itself: what is not reserved, negative or absurd is refused, and nothing is written."""
    model, _ = make("llama")
    decoder = decoder_of(model)
    whole = decoder.logits(tokens())
    fresh = native_decoder.NativeDecoder(describe(model), exact=True)
    library, error = fresh._library, fresh._error
    (module, kind), ids = fresh._description.ropes[0], tokens()
    cosine, sine = native_decoder.rotary_table(module, kind, 70)
    out = torch.full((70, fresh.vocabulary), 7.0)

    def reserve(handle: int | None, positions: int, *tables: Tensor | None) -> int:
        return int(library.nf_decoder_reserve(handle, positions, *(None if t is None else t.data_ptr() for t in tables), error))

    def forward(handle: int | None, count: int, start: int, where: Tensor | None = out) -> int:
        read, place = ids[max(start, 0) :].data_ptr() if start < LENGTH else 0, None if where is None else where.data_ptr()
        return int(library.nf_decoder_forward(handle, read, count, start, 1, 1, place, error))

    assert forward(fresh._handle, 1, 0) and b"reserve more" in error.value
    for positions in (0, -1, -(1 << 62), (1 << 24) + 1, 1 << 62):
        assert reserve(fresh._handle, positions, cosine, sine) and b"absurd" in error.value
    assert reserve(fresh._handle, 40, cosine, None) and b"tables" in error.value
    assert reserve(None, 40, cosine, sine) and forward(None, 1, 0) and library.nf_decoder_length(None) == 0
    assert reserve(fresh._handle, 40, cosine, sine) == 0
    for count, start in ((41, 0), (1 << 62, 0), (0, 0), (-1, 0), (1, -1), (1, 1), (1 << 62, 1 << 62)):  # blocks hold 64
        assert forward(fresh._handle, count, start), (count, start)
    assert forward(fresh._handle, 1, 0, None) and fresh.length == 0 and bool((out == 7).all())
    assert forward(fresh._handle, 40, 0) == 0 and torch.equal(out[:40], whole[:40])
    assert forward(fresh._handle, 1, 40) and b"reserve more" in error.value
    assert reserve(fresh._handle, 50, cosine, sine) == 0  # within the blocks there are: the tables grow
    assert forward(fresh._handle, 10, 40) == 0
    assert torch.equal(out[:10], whole[40:50]) and fresh.length == 50
    assert reserve(fresh._handle, 3, None, None) == 0 and fresh.length == 50  # there is more already
    with pytest.raises(OptionError, match="at most"):
        decoder._reserve((1 << 24) + 1)
    monkeypatch.setattr(native_decoder, "rotary_table", lambda *args: (cosine, sine))
    with pytest.raises(NumfitError, match="rotary tables are not of 2048 positions"):
        decoder._reserve(1100)
    assert torch.equal(decoder.logits(tokens()), whole)


@pytest.mark.parametrize("kept", ["embedding", "head"])
def test_tables_that_are_not_packed(make: Any, tmp_path: Path, kept: str) -> None:
    name = "embed_tokens" if kept == "embedding" else "lm_head"

    def rule(tensor: str, chosen: str | None) -> str | None:
        return "keep" if name in tensor else chosen

    tiny_models.build("llama", tmp_path / "plain")
    tiny_models.pack(tmp_path / "plain", tmp_path / "packed", rule=rule)
    for dtype, bound in ((torch.float32, 2e-3), (torch.bfloat16, 0.15), (torch.float16, 2e-2)):  # of transformers' own rounding
        model, _ = load(tmp_path / "packed", dtype=dtype, tokenizer=False, activations="exact")
        want = reference(model, tokens())
        assert difference(decoder_of(model).logits(tokens()), want) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_models_of_16_bits_are_proven_in_fp32(make: Any, kind: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    directory = make(kind)[0].config._name_or_path
    model, _ = load(directory, dtype=dtype, tokenizer=False, activations="exact")
    before = reference(model, tokens())
    monkeypatch.setattr(native_decoder, "TOLERANCE", 1e-3)
    decoder_of(model)
    assert model.dtype == dtype and torch.equal(reference(model, tokens()), before)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "mistral", "qwen2"])
def test_a_window_that_is_not_kept_is_found_out(make: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the proof has fewer tokens than most windows."""
    model, _ = make(kind)
    window = model.config.sliding_window
    position = _Builder._position
    monkeypatch.setattr(_Builder, "_position", lambda *args: (position(*args)[0], 0))
    with pytest.warns(UserWarning, match="disagrees with transformers"):
        assert native_decoder.build(model)[0] is None
    assert model.config.sliding_window == window


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 1.0}, {"temperature": 2.0}])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_generates_what_transformers_generates(make: Any, kind: str, options: dict[str, float]) -> None:
    model, tokenizer = make(kind)
    texts: list[str] = []
    prompt = "w5 w17 w80 w33 w9"
    want = generate(model, tokenizer, prompt, max_tokens=20, seed=3, **options)
    have = generate(model, tokenizer, prompt, max_tokens=20, seed=3, decoder=decoder_of(model), on_text=texts.append, **options)
    assert (have.text, have.new_tokens, have.prompt_tokens) == (want.text, want.new_tokens, want.prompt_tokens)
    assert "".join(texts).strip() == have.text.strip()
    assert 0 < have.prompt_seconds <= have.seconds
    assert 0 < want.prompt_seconds <= want.seconds
    assert torch.get_num_threads() >= 1


def test_stops_at_the_end_token_and_penalises_repetition(make: Any) -> None:
    model, tokenizer = make("llama")
    decoder, config = decoder_of(model), model.generation_config
    first = generate(model, tokenizer, "w5 w6", max_tokens=30, decoder=decoder)
    before = config.eos_token_id, config.repetition_penalty
    try:
        config.repetition_penalty = 1.3
        have = generate(model, tokenizer, "w5 w6", max_tokens=30, decoder=decoder)
        assert have.text == generate(model, tokenizer, "w5 w6", max_tokens=30).text != first.text
        config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(have.text.split()[4])]
        short = generate(model, tokenizer, "w5 w6", max_tokens=30, decoder=decoder)
        assert short.new_tokens == generate(model, tokenizer, "w5 w6", max_tokens=30).new_tokens <= 5
    finally:
        config.eos_token_id, config.repetition_penalty = before


def test_what_only_transformers_does_is_named(make: Any) -> None:
    model, _ = make("llama")
    assert why_not_native(model.generation_config) is None
    model.generation_config.no_repeat_ngram_size = 3
    try:
        assert "no_repeat_ngram_size=3" in str(why_not_native(model.generation_config))
    finally:
        model.generation_config.no_repeat_ngram_size = None


@pytest.mark.parametrize(("kind", "word"), [("mixtral", "mlp"), ("gpt2", "structure"), ("olmo", "norm"), ("gpt-oss", "part")])
def test_other_architectures_are_left_to_transformers(make: Any, kind: str, word: str) -> None:
    model, _ = make(kind)
    decoder, reason = native_decoder.build(model)
    assert decoder is None and word in reason


def test_plain_models_are_left_to_transformers(tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "plain")
    assert native_decoder.build(model) == (None, "the model's weights are not packed")


def test_norms_over_all_heads_are_refused(make: Any) -> None:
    model, _ = make("qwen3")
    attention = model.model.layers[1].self_attn
    before = attention.k_norm
    attention.k_norm = type(before)(2 * attention.head_dim)
    try:
        decoder, reason = native_decoder.build(model)
    finally:
        attention.k_norm = before
    assert decoder is None and f"k_norm' is a norm over {2 * attention.head_dim} numbers" in reason


@pytest.mark.parametrize("change", ["rope_type", "layer_types", "scaling", "activation", "norm", "wrapped"])
def test_what_is_not_understood_is_refused(tmp_path: Path, change: str) -> None:
    """A model whose code does something else than its structure promises: found out by its parts or by its logits."""
    tiny_models.build("qwen2", tmp_path / "plain")
    tiny_models.pack(tmp_path / "plain", tmp_path / "packed")
    model, _ = load(tmp_path / "packed", tokenizer=False)
    layer = model.model.layers[1]
    if change == "rope_type":
        model.config.rope_parameters["llama_4_scaling_beta"] = 0.1
    elif change == "layer_types":
        model.config.layer_types[1] = "chunked_attention"
    elif change == "scaling":
        layer.self_attn.scaling = 0.7
    elif change == "activation":
        layer.mlp.act_fn = torch.nn.ReLU()
    elif change == "norm":
        layer.input_layernorm = torch.nn.LayerNorm(64)
    else:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x: 2 * forward(x)
    if change == "wrapped":
        with pytest.warns(UserWarning, match="disagrees with transformers"):
            decoder, reason = native_decoder.build(model)
    else:
        decoder, reason = native_decoder.build(model)
    assert decoder is None and reason


def test_bad_input(make: Any) -> None:
    model, _ = make("llama")
    decoder = decoder_of(model)
    for ids, start in (([], 0), ([96], 0), ([-1], 0), ([3], decoder.length + 1), ([3], -1)):
        with pytest.raises(OptionError, match="one token or more"):
            decoder.forward(ids, start)
    with pytest.raises(OptionError, match="writes fp32 logits"):
        decoder.forward([3], 0, out=torch.empty(5))
    with pytest.raises(OptionError, match="writes fp32 logits"):
        decoder.forward(torch.zeros(2, 2), 0)
    with pytest.raises(OptionError, match="on the CPU, not"):
        decoder.forward([3], 0, out=torch.empty(96, device="meta"))


def test_torchs_defaults_do_not_matter(make: Any) -> None:
    """What the library gets is CPU memory of the right size, whatever new tensors are made of by default."""
    model, _ = make("llama/mixed")
    want = decoder_of(model).logits(tokens())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(decoder_of(model).logits(tokens()), want)
    finally:
        torch.set_default_dtype(torch.float32)
    decoder = decoder_of(model)
    ids = tokens().tolist()
    with torch.device("meta"):
        assert torch.equal(decoder.logits(ids), want)


def test_the_command_line_says_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("llama", "mixtral"):
        tiny_models.build(kind, tmp_path / kind)
        tiny_models.pack(tmp_path / kind, tmp_path / f"{kind}-packed")
        tiny_models.save_tokenizer(tmp_path / f"{kind}-packed")
        assert main(["run", str(tmp_path / f"{kind}-packed"), "--prompt", "w5 w6", "--max-tokens", "5", "--json"]) == 0
        shown = capsys.readouterr()
        out = json.loads(shown.out)
        native_ran = kind == "llama"
        assert out["decoder"] == ("native" if native_ran else "transformers")
        assert (out["decoder_reason"] == "") == native_ran
        assert ("transformers' own code runs, because its layers" in shown.err) != native_ran
        assert out["prompt_tokens_per_second"] > 0
