"""`numfit run`: the text that greedy generation gives, streamed; and refusals in a sentence."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
import torch
from tiny_models import build, edit_config, pack, save_tokenizer

from numfit.cli import run as verb
from numfit.errors import CheckpointError, OptionError
from numfit.runtime import generate, load

TEMPLATE = "{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    build("llama-tied", root / "source")
    pack(root / "source", root / "packed")
    edit_config(root / "packed", lambda config: config.update(eos_token_id=None))  # always as long as asked for
    save_tokenizer(root / "packed")
    return root / "packed"


@pytest.fixture(scope="module")
def chat_model(model: Path) -> Path:
    path = model.with_name("chat")
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        (path / file).write_bytes((model / file).read_bytes())
    save_tokenizer(path, TEMPLATE)
    return path


def numfit_run(*words: object) -> int:
    parser = argparse.ArgumentParser(epilog=verb.EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(word) for word in words]))


def greedy(path: Path, text: str, count: int) -> str:
    """The obvious loop, without transformers' generate."""
    loaded, tokenizer = load(path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_streams_greedy_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert numfit_run(model, "--prompt", "w7 w8", "--max-tokens", 6) == 0
    out, err = capsys.readouterr()
    assert out.split() == greedy(model, "w7 w8", 6).split() and out.endswith("\n")
    assert "loading" in err and "MB of weights" in err and "6 tokens in" in err and "tokens/s" in err


def test_pieces_come_one_by_one_and_make_up_the_text(model: Path) -> None:
    pieces: list[str] = []
    result = generate(*load(model), "w7 w8", max_tokens=6, on_text=pieces.append)
    assert len(pieces) > 2 and "".join(pieces).split() == result.text.split()
    assert result.prompt_tokens == 3 and result.new_tokens == 6 and result.tokens_per_second > 0


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert numfit_run(model, "--prompt", "w7 w8", "--max-tokens", 6, "--json", "--threads", torch.get_num_threads()) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["text"] == greedy(model, "w7 w8", 6) and out["prompt"] == "w7 w8"
    assert (out["prompt_tokens"], out["new_tokens"]) == (3, 6) and out["weights_bytes"] > 0


def test_decoding_once_changes_nothing_but_the_memory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numfit_run(model, "--prompt", "w7", "--max-tokens", 5, "--decode-once", "--dtype", "float32")
    out, err = capsys.readouterr()
    assert out.split() == greedy(model, "w7", 5).split() and "decoded to" in err


def test_prompt_from_standard_input(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w7 w8"))
    numfit_run(model, "--prompt", "-", "--max-tokens", 4)
    assert capsys.readouterr().out.split() == greedy(model, "w7 w8", 4).split()


def test_chat_template(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numfit_run(chat_model, "--prompt", "w9", "--max-tokens", 1, "--json")
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(["w5", "w9", "w6"]), "a BOS is the template's affair"
    numfit_run(chat_model, "--prompt", "w9", "--max-tokens", 1, "--json", "--raw")
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(["<s>", "w9"])


def test_sampling_is_repeatable(model: Path) -> None:
    loaded = load(model)
    one, two, other = (generate(*loaded, "w7", max_tokens=12, temperature=1.5, seed=s).text for s in (1, 1, 2))
    assert one == two != other
    assert generate(*loaded, "w7", max_tokens=3, temperature=1.5, top_p=1e-6, seed=3).text == greedy(model, "w7", 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "  "], "prompt is empty"),
        (["--prompt", "w7", "--max-tokens", "0"], "at least 1"),
        (["--prompt", "w7", "--temperature", "-1"], "temperature"),
        (["--prompt", "w7", "--top-p", "2", "--temperature", "1"], "top_p"),
        (["--prompt", "w7", "--top-p", "0.5"], "no effect"),
        (["--prompt", "w7", "--dtype", "int7"], "int7"),
        (["--prompt", "w7", "--threads", "0"], "--threads"),
    ],
)
def test_bad_options(words: list[str], sentence: str, model: Path) -> None:
    with pytest.raises(OptionError, match=sentence):
        numfit_run(model, *words)


def test_bad_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="there is no file or directory"):
        numfit_run(tmp_path / "none", "--prompt", "w7")
    assert capsys.readouterr().err.endswith("\n"), "the error must begin on a line of its own"


def test_help_teaches_by_example() -> None:
    assert verb.NAME == "run" and verb.HELP and "examples:" in verb.EPILOG
