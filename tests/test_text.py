"""Text files and token windows: protocol, BOS rule, and a sentence for every bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from numfit.errors import NumfitError, OptionError
from numfit.text import bos_token, read_text, token_windows


def word_tokenizer(words: int = 200, adds_bos: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """`w0 w1 w2 …`, one token a word: token ids are 3 + the word's number."""
    vocabulary = {"<unk>": 0, "<s>": 1, "A": 2, **{f"w{i}": 3 + i for i in range(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in range(n))


def test_text_is_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf  one\r\ntwo \xc3\xa9\n")
    assert read_text(file) == "  one\r\ntwo é\n"
    assert read_text(str(file)) == read_text(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty: 0 tokens"),
        (b" \n\t\n", "only white space (4 bytes): 0 tokens"),
        (b"GGUF\x03\x00\x00\x00", "binary file (a zero byte at position 5)"),
        (b"caf\xe9 au lait", "is not UTF-8 text (byte 0xe9 at position 3)"),
    ],
)
def test_bad_text_files(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(NumfitError) as caught:
        read_text(file)
    assert says in str(caught.value) and "bad.txt" in str(caught.value)


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(NumfitError, match="is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("total", "n", "context"), [(100, 4, 10), (97, 5, 19), (40, 4, 10), (41, 4, 10), (20, 1, 7), (10, 1, 10)]
)
def test_windows_are_evenly_spaced_and_inside(total: int, n: int, context: int) -> None:
    windows = token_windows(word_tokenizer(), words(total), n, context)
    assert windows.shape == (n, context)
    starts = [int(w[0]) - 3 for w in windows]
    step = (total - context) // (n - 1) if n > 1 else 0
    assert starts == [i * step for i in range(n)]
    assert n == 1 or step >= context  # no overlap
    assert starts[-1] + context <= total
    assert n == 1 or total - (starts[-1] + context) < n - 1  # the last one reaches the end but for the rounding
    for start, window in zip(starts, windows.tolist()):
        assert window == list(range(start + 3, start + 3 + context))


def test_bos_takes_a_place_in_every_window() -> None:
    windows = token_windows(word_tokenizer(), words(36), 4, 10, bos=1)
    assert windows.shape == (4, 10)
    assert windows[:, 0].tolist() == [1] * 4
    assert windows[:, 1:].flatten().tolist() == list(range(3, 39))  # 36 tokens fill 4·9 exactly


def test_bos_rule() -> None:
    assert bos_token(word_tokenizer()) is None
    assert bos_token(word_tokenizer(bos_token="<s>")) is None  # has one, does not use it
    assert bos_token(word_tokenizer(bos_token="<s>", adds_bos=True)) == 1  # the tokenizer puts it there by itself
    assert bos_token(word_tokenizer(bos_token="<s>"), "gemma3_text") == 1
    assert bos_token(word_tokenizer(bos_token="<s>"), "llama") is None
    told = word_tokenizer(bos_token="<s>")
    told.add_bos_token = True
    assert bos_token(told, "llama") == 1
    with pytest.raises(NumfitError, match="needs a BOS token"):
        bos_token(word_tokenizer(), "gemma")


def test_auto_and_none() -> None:
    tokenizer = word_tokenizer(bos_token="<s>", adds_bos=True)
    assert token_windows(tokenizer, words(20), 2, 5)[:, 0].tolist() == [1, 1]
    assert token_windows(tokenizer, words(20), 2, 5, bos=None)[0].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("total", "n", "context", "says"),
    [
        (39, 4, 10, "has 39 tokens, but 4 windows of 10 need 40: pass --windows 3 or --context 9, or a longer text"),
        (1, 8, 1024, "the text has 1 token, but 8 windows of 1024 need 8192: pass a longer text"),
        (9, 1, 10, "the text has 9 tokens, but 1 window of 10 need 10: pass --context 9, or a longer text"),
        (9, 0, 10, "--windows 0"),
        (9, 1, 1, "--context 1"),
    ],
)
def test_too_short_or_too_few(total: int, n: int, context: int, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        token_windows(word_tokenizer(), words(total), n, context)
    assert says in str(caught.value)


def test_the_advice_works() -> None:
    """What the message proposes is accepted, BOS or not."""
    for bos in (None, 1):
        token_windows(word_tokenizer(), words(39), 3, 10, bos=bos)
        token_windows(word_tokenizer(), words(39), 4, 9, bos=bos)
