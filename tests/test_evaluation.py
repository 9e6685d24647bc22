"""Perplexity, bits a byte, KL against direct computations; references kept and refused; a sentence for each trouble."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from numfit.cli import eval as eval_verb
from numfit.errors import CheckpointError, NumfitError, OptionError
from numfit.evaluation import Reference, evaluate, evaluate_many
from numfit.evaluation import reference as reference_module
from numfit.evaluation.forward import layer_noise, logits_by_position
from numfit.evaluation.metrics import divergence, next_token_losses, summarize_divergence, summarize_losses
from numfit.evaluation.sizes import bits_per_weight, model_bytes
from numfit.structure.modules import decoder_layers
from numfit.text import token_windows

TEXT = "".join(f"The {a} number of {b} is {i * 37 % 101}, naïvely. " for i, (a, b) in enumerate(
    (a, b) for a in ("first", "second", "third", "fourth", "fifth") for b in ("cats", "dogs", "birds", "fish", "bees")
))  # fmt: skip
SMALL: dict[str, Any] = {"windows": 3, "context": 40, "progress": False}


def bpe_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(vocabulary: int, **options: Any) -> LlamaConfig:
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return LlamaConfig(vocab_size=vocabulary, **(shape | options))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(len(tokenizer))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    """The original with 3 % of noise on every matrix."""
    directory = tmp_path_factory.mktemp("disturbed") / "model"
    change(original, directory, lambda name, w: w + 0.03 * w.std() * torch.randn_like(w) if w.dim() == 2 else w)
    return directory


def change(source: Path, directory: Path, rule: Any) -> None:
    shutil.copytree(source, directory)
    torch.manual_seed(1)
    weights = load_file(directory / "model.safetensors")
    save_file(
        {n: rule(n, w).contiguous() for n, w in weights.items()}, directory / "model.safetensors", {"format": "pt"}
    )


def double_logits(directory: Path, windows: torch.Tensor) -> torch.Tensor:
    """The straightforward computation: whole logits in float64."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=windows).logits[:, :-1]  # [n, context - 1, V]


def test_perplexity_and_bits_per_byte(original: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    result = evaluate(original, TEXT, **SMALL)
    windows = token_windows(tokenizer, TEXT, 3, 40)
    logits = double_logits(original, windows)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    assert result["tokens"] == 3 * 39
    assert result["ppl"] == pytest.approx(math.exp(loss / result["tokens"]), rel=1e-5)
    size = sum(len(tokenizer.decode(w[1:]).encode()) for w in windows)
    assert result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-5)
    assert result["bits_per_weight"] is None and not result["bos"] and result["dtype"] == "float32"
    assert result["model_bytes"] == (original / "model.safetensors").stat().st_size
    assert "kl_mean" not in result


def test_a_model_is_no_distance_from_itself(original: Path) -> None:
    result = evaluate(original, TEXT, reference=original, **SMALL)
    assert abs(result["kl_mean"]) <= 1e-6 and result["kl_max"] <= 1e-6 and result["top1"] == 1
    assert result["ppl"] == pytest.approx(result["reference_ppl"], rel=1e-7)
    floor = result["noise_floor"]
    assert 1e-8 < floor["kl_mean"] < 1e-2 and floor["top1"] > 0.9
    assert evaluate(original, TEXT, reference=original, **SMALL)["noise_floor"] == floor  # seeded
    json.dumps(result, allow_nan=False)


def test_divergence_against_float64(original: Path, disturbed: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    result = evaluate(disturbed, TEXT, reference=str(original), noise_floor=False, **SMALL)
    windows = token_windows(tokenizer, TEXT, 3, 40)
    p = double_logits(original, windows).flatten(0, 1).log_softmax(-1)
    q = double_logits(disturbed, windows).flatten(0, 1).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    assert kl.mean() > 1e-4  # there is something to measure
    assert result["kl_mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert result["kl_se"] == pytest.approx(kl.std(ddof=1) / math.sqrt(kl.size), rel=1e-4)
    for key, quantile in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99), ("kl_max", 1.0)):
        assert result[key] == pytest.approx(np.quantile(kl, quantile), rel=1e-3)
    assert result["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result["noise_floor"] is None


def test_batches_change_nothing(original: Path, disturbed: Path) -> None:
    one = evaluate(disturbed, TEXT, reference=original, **SMALL)
    two = evaluate(disturbed, TEXT, reference=original, batch=2, **SMALL)  # a short last batch
    for key in ("ppl", "kl_mean", "kl_p99", "top1", "reference_ppl"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_threads_are_put_back(original: Path) -> None:
    before = torch.get_num_threads()
    evaluate(original, TEXT, threads=1, **SMALL)
    assert torch.get_num_threads() == before


def test_chunked_arithmetic_equals_whole() -> None:
    torch.manual_seed(0)
    logits, other, targets = 5 * torch.randn(23, 50), 5 * torch.randn(23, 50), torch.randint(50, (23,))
    whole_loss, whole = next_token_losses(logits, targets)
    loss, log_probs = next_token_losses(logits, targets, chunk=3 * 50)
    assert torch.equal(loss, whole_loss) and torch.equal(log_probs, whole)
    reference = other.log_softmax(-1)
    for one, all_ in zip(divergence(reference, log_probs, chunk=1), divergence(reference, whole), strict=True):
        assert torch.equal(one, all_) or torch.allclose(one, all_, rtol=1e-6)
    kl = torch.nn.functional.kl_div(whole.double(), reference.double(), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(divergence(reference, whole)[0].double(), kl, rtol=1e-5)


def test_losses_of_half_precision_logits_are_computed_in_fp32() -> None:
    logits = torch.randn(4, 7).to(torch.bfloat16)
    loss, log_probs = next_token_losses(logits, torch.tensor([0, 1, 2, 3]))
    assert loss.dtype == log_probs.dtype == torch.float32
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(4), atol=1e-6)


def test_summaries() -> None:
    summary = summarize_losses(torch.tensor([math.log(2), math.log(8)]), 4)
    assert summary == pytest.approx({"nll": math.log(4), "ppl": 4.0, "bits_per_byte": 1.0})
    kl = summarize_divergence(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([True, True, True, False]))
    assert kl["kl_mean"] == 1.5 and kl["kl_median"] == 1.5 and kl["kl_max"] == 3 and kl["top1"] == 0.75
    assert kl["kl_se"] == pytest.approx(math.sqrt(5 / 3) / 2) and kl["kl_p90"] == pytest.approx(2.7)


def gemma2() -> Gemma2ForCausalLM:
    """A model that does something behind its head (soft-capping) and in its attention."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: LlamaForCausalLM(tiny_config(61)).eval(), gemma2])
@pytest.mark.parametrize("budget", [1, 5 * 61, 2 * 7 * 61, 1 << 25])
def test_logits_in_slices_are_the_models_own(make: Any, budget: int) -> None:
    model = make()
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    calls = []
    model.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[:, :-1]
        calls.clear()
        slices = list(logits_by_position(model, ids, budget))
        assert len(calls) == 1  # the decoder ran once
        assert [(a, b) for a, b, _ in slices] == list(
            zip([a for a, _, _ in slices], [a for a, _, _ in slices][1:] + [19])
        )
        assert slices[0][0] == 0 and torch.allclose(torch.cat([x for _, _, x in slices], 1), whole, atol=1e-5)
        assert torch.equal(model(input_ids=ids.flip(1)).logits, make_again(model, ids.flip(1)))  # nothing remembered


def make_again(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return type(model).forward(model, input_ids=ids).logits


def test_a_model_without_slices(original: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LlamaForCausalLM(tiny_config(61)).eval()

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    model, ids = Plain(), torch.arange(10).unsqueeze(0)
    with torch.inference_mode():
        ((begin, end, logits),) = logits_by_position(model, ids)
        assert (begin, end) == (0, 9) and torch.equal(logits, model(ids).logits[:, :-1])


def test_noise_is_relative_seeded_and_removed() -> None:
    model = gemma2()
    assert len(decoder_layers(model)) == 3
    ids = torch.arange(1, 13).unsqueeze(0)
    with torch.inference_mode():
        clean = model(input_ids=ids).logits
        with layer_noise(model):
            one = model(input_ids=ids).logits
        with layer_noise(model):
            two = model(input_ids=ids).logits
        assert torch.equal(one, two) and not torch.equal(one, clean)
        assert torch.equal(model(input_ids=ids).logits, clean)
        seen = []
        handle = decoder_layers(model)[0][1].register_forward_hook(lambda *a: seen.append(a[2]))
        with layer_noise(model):
            handle_after = decoder_layers(model)[0][1].register_forward_hook(lambda *a: seen.append(a[2]))
            model(input_ids=ids)
        handle.remove(), handle_after.remove()
        before, after = ((x if isinstance(x, torch.Tensor) else x[0]) for x in seen)
        assert ((after - before) / before).std().item() == pytest.approx(2**-9, rel=0.15)


def test_decoder_layers_are_not_guessed() -> None:
    model = LlamaForCausalLM(tiny_config(61))
    model.config.num_hidden_layers = 5
    assert decoder_layers(model) == []


def test_one_reference_run_for_many_models(original: Path, disturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    true_score = reference_module.score

    def counting(*args: Any, **kwargs: Any) -> Any:
        ran.append(kwargs["name"])
        return true_score(*args, **kwargs)

    monkeypatch.setattr(reference_module, "score", counting)
    results = list(evaluate_many([original, disturbed], TEXT, reference=original, **SMALL))
    assert ran == ["reference", "noise floor"]
    assert [r["model"] for r in results] == [str(original), str(disturbed)]
    assert results[0]["kl_mean"] <= 1e-6 < results[1]["kl_mean"]
    assert results[1]["kl_mean"] == evaluate(disturbed, TEXT, reference=original, **SMALL)["kl_mean"]
    assert [r["ppl"] for r in evaluate_many([disturbed], TEXT, **SMALL)] == [results[1]["ppl"]]


def test_the_temporary_file_leaves_nothing(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Reference(original, TEXT, **SMALL) as reference:
        assert reference.read(2, 10, 13).shape == (3, reference.width)
        assert list(tmp_path.iterdir()) == []  # not even while it is in use
    with pytest.raises(NumfitError, match="was closed"):
        reference.read(0, 0, 1)


def test_the_windows_are_the_references(original: Path) -> None:
    with Reference(original, TEXT, **SMALL) as reference:
        assert evaluate(original, TEXT, reference=reference, progress=False)["windows"] == 3
        with pytest.raises(OptionError, match="run on 3 windows of 40, not 4 of 40"):
            evaluate(original, TEXT, reference=reference, windows=4)
        with pytest.raises(NumfitError, match=r"different tokens \(first in window 0"):
            evaluate(original, "x" + TEXT, reference=reference, progress=False)


class TestKeptReference:
    def keep(self, original: Path, directory: Path, text: str = TEXT, **options: Any) -> Reference:
        return Reference(original, text, directory=directory, **(SMALL | options))

    def test_is_used_again(
        self, original: Path, disturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = tmp_path / "kept"
        with self.keep(original, kept) as reference:
            first = evaluate(disturbed, TEXT, reference=reference, progress=False)
        assert sorted(f.name for f in kept.iterdir()) == ["logprobs.f32", "reference.json"]
        with monkeypatch.context() as patch:
            patch.setattr(reference_module, "load_model", lambda *_: pytest.fail("the reference was run again"))
            reference = self.keep(original, kept)
        with reference:
            second = evaluate(disturbed, TEXT, reference=reference, progress=False)
        for result in (first, second):
            del result["seconds"], result["load_seconds"]
        assert first == second

    def test_of_something_else_is_refused(self, original: Path, disturbed: Path, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        self.keep(original, kept).close()
        for difference, arguments in (
            ("text_sha256", {"text": TEXT + "More."}),
            ("windows", {"windows": 2}),
            ("dtype", {"dtype": "bfloat16"}),
        ):
            with pytest.raises(OptionError, match=f"differs in {difference}"):
                self.keep(original, kept, **arguments)
        with pytest.raises(OptionError, match="differs in files"):
            self.keep(disturbed, kept)
        self.keep(original, kept).close()  # and it is still whole

    def test_never_touches_other_files(self, original: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(OptionError, match="holds something else"):
            self.keep(original, tmp_path)
        with pytest.raises(OptionError, match="holds something else"):
            self.keep(original, tmp_path / "mine.txt")
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_damage_is_noticed(self, original: Path, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        self.keep(original, kept).close()
        data = (kept / "logprobs.f32").read_bytes()
        (kept / "logprobs.f32").write_bytes(data[:-4])
        with pytest.raises(CheckpointError, match="wrong size"):
            self.keep(original, kept)
        (kept / "reference.json").write_text('{"key": ')
        with pytest.raises(CheckpointError, match="damaged"):
            self.keep(original, kept)

    def test_a_failed_run_is_not_taken_up(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = tmp_path / "kept"
        with monkeypatch.context() as patch:
            patch.setattr(Reference, "_measure_floor", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.keep(original, kept)
        assert list(kept.iterdir()) == []
        (kept / "logprobs.f32.part").write_bytes(b"of a run that was killed")
        self.keep(original, kept).close()
        assert sorted(f.name for f in kept.iterdir()) == ["logprobs.f32", "reference.json"]


def test_full_disk(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NumfitError, match=r"0.0 GB free: free some space, or pass --keep-reference"):
        Reference(original, TEXT, **SMALL)


def test_another_vocabulary(original: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The same text in the same ids, but two tokens that do not occur in it are swapped."""
    other = tmp_path / "other"
    shutil.copytree(original, other)
    description = json.loads((other / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    used = set(token_windows(tokenizer, TEXT, 1, len(tokenizer(TEXT)["input_ids"])).flatten().tolist())
    one, two = [t for t, i in vocabulary.items() if i not in used and len(t) == 1][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(NumfitError, match="different vocabularies"):
        evaluate(other, TEXT, reference=original, **SMALL)


def test_another_width(original: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config(len(tokenizer) + 8)).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(NumfitError, match=f"has {len(tokenizer) + 8} logits .* {len(tokenizer)}: KL needs"):
        evaluate(tmp_path / "wide", TEXT, reference=original, **SMALL)


def test_another_models_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config(100)).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="knows only 100 tokens: the tokenizer files belong to another model"):
        evaluate(tmp_path / "narrow", TEXT, **SMALL)


def test_not_a_number_is_never_a_result(original: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A token that first comes up in the second window has a broken embedding."""
    windows = token_windows(tokenizer, TEXT, 3, 40).tolist()
    token = next(t for t in windows[1][:-1] if t not in windows[0])
    broken = tmp_path / "broken"

    def damage(name: str, w: torch.Tensor) -> torch.Tensor:
        w = w.clone()
        if name == "model.embed_tokens.weight":
            w[token] = math.nan
        return w

    change(original, broken, damage)
    with pytest.raises(NumfitError, match=r"broken: NaN or infinite logits in window 1"):
        evaluate(broken, TEXT, **SMALL)


def test_bad_models_and_options(original: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="numfit convert"):
        evaluate(tmp_path / "model.gguf", TEXT)
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate(tmp_path / "nowhere", TEXT, reference=original)
    with pytest.raises(NumfitError, match="does not exist"):
        evaluate(original, tmp_path / "nowhere.txt")
    for options, says in (
        ({"context": 65}, "65 tokens is longer than the 64 positions"),
        ({"windows": 400}, "need 16000: pass --windows"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"batch": 0}, "batch 0"),
    ):
        with pytest.raises(OptionError) as caught:
            evaluate(original, TEXT, **(SMALL | options))
        assert says in str(caught.value)


def test_unknown_architecture(original: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    shutil.copytree(original, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(
        json.dumps(config | {"model_type": "neverheardof", "architectures": ["Never"]})
    )
    with pytest.raises(NumfitError, match="neverheardof"):
        evaluate(unknown, TEXT, **SMALL)


def test_gemma_gets_its_bos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = gemma2()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    result = evaluate(tmp_path / "gemma", TEXT, **SMALL)
    windows = token_windows(tokenizer, TEXT, 3, 40, bos=0)
    with torch.no_grad():
        logits = model.double()(input_ids=windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert result["bos"] and result["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_text_as_a_path(original: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    whole = evaluate(original, TEXT, **SMALL)["ppl"]
    assert evaluate(original, tmp_path / "a.txt", **SMALL)["ppl"] == whole
    assert evaluate(str(original), str(tmp_path / "a.txt"), **SMALL)["ppl"] == whole


def test_sizes(tmp_path: Path) -> None:
    assert model_bytes(tmp_path) is None and bits_per_weight(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 7)
    (tmp_path / "training_args.bin").write_bytes(b"x" * 100)
    assert model_bytes(tmp_path) == 7
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 5)
    assert model_bytes(tmp_path) == 15
    empty: dict[str, Any] = {"recipe": {}, "source": {}, "tensors": {}, "kept": {}, "files": {}}
    for totals, bits in (({"bytes": 80, "weights": 128}, 5.0), ({"bytes": 0, "weights": 0}, None)):
        manifest = empty | {"format_version": 1, "totals": {"linears": totals}}
        (tmp_path / "numfit.json").write_text(json.dumps(manifest))
        assert bits_per_weight(tmp_path) == bits
    (tmp_path / "numfit.json").write_text(json.dumps(empty | {"format_version": 1, "totals": {}}))
    with pytest.raises(CheckpointError, match="no totals of the linears"):
        bits_per_weight(tmp_path)


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    eval_verb.add_arguments(parser)
    return eval_verb.run(parser.parse_args(list(arguments)))


def test_command(original: Path, disturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT, encoding="utf-8")
    common = [str(disturbed), "--text", str(text), "--windows", "3", "--context", "40"]
    assert call(*common, "--reference", str(original), "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["kl_mean"] == evaluate(disturbed, TEXT, reference=original, **SMALL)["kl_mean"]
    assert "windows 3/3" in printed.err
    assert (
        call(*common, "--reference", str(original), "--keep-reference", str(tmp_path / "kept"), "--threads", "1") == 0
    )
    table = capsys.readouterr().out
    assert (tmp_path / "kept" / "reference.json").is_file()
    for row in ("perplexity", "bits per byte", "KL mean", "KL p99", "top-1 agreement", "noise floor", "whole model"):
        assert row in table
    assert f"{result['ppl']:.4f} (reference {result['reference_ppl']:.4f})" in table
    assert call(*common) == 0
    assert "KL" not in capsys.readouterr().out
    with pytest.raises(OptionError, match="pass --reference"):
        call(*common, "--keep-reference", str(tmp_path / "kept2"))
    for cache, sentence in ((["--kv", "nonsense"], "unknown cache 'nonsense'"), (["--kv-chunk", "0"], "at least 1 token")):
        with pytest.raises(OptionError, match=sentence):  # before the reference is looked for
            call(*common, "--reference", str(tmp_path / "nowhere"), *cache)


def test_agreement_is_not_rounded_up() -> None:
    assert eval_verb.percent(1.0) == "100 %" and eval_verb.percent(0.99999) == "99.99 %"
