"""Text files → token windows, the one way calibration and evaluation both read text.

The protocol is quality-anchors.md 1: the raw file text, the model's own tokenizer without special tokens, `n` evenly
spaced windows that do not overlap. Evenly spaced rather than contiguous, because a few windows then see the whole
file; a 4-window perplexity still differs from a 12-window one by several per cent, so numbers may only be compared
on the same windows. The whole file is tokenized to find them, which costs a second per few megabytes.

BOS rule: some models (Gemma first) produce garbage unless every sequence starts with their BOS token, so a window of
such a model is BOS followed by `context - 1` tokens of text. A model is taken to need it when its type begins with
"gemma", when its tokenizer says `add_bos_token`, or when its tokenizer puts BOS in front of a plain sentence by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from numfit.errors import CheckpointError, NumfitError, OptionError, require


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unchanged (a byte-order mark is dropped, line ends are kept).

    Raises:
        NumfitError: the file is missing, is a directory, cannot be read, is not UTF-8 text, or holds only white space.
    """
    path = Path(path)
    if path.is_dir():
        raise NumfitError(f"{path} is a directory: pass one text file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NumfitError(f"the text file {path} does not exist: pass the path of a UTF-8 text file") from None
    except OSError as error:
        raise NumfitError(f"the text file {path} cannot be read: {error.strerror or error}") from None
    if (nul := data.find(0)) >= 0:
        raise NumfitError(f"{path} is a binary file (a zero byte at position {nul}): pass a UTF-8 text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NumfitError(
            f"{path} is not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start}): "
            "convert it to UTF-8, for instance with iconv"
        ) from None
    if not text or text.isspace():
        size = "is empty" if not text else f"holds only white space ({len(data)} bytes)"
        raise NumfitError(f"the text file {path} {size}: 0 tokens to work on; pass a file with text in it")
    return text


def read_dataset(name: str) -> str:
    """The text of a data set of the hub: "NAME[:CONFIG[:SPLIT]]", its rows' field `text` joined by empty lines.

    Raises:
        MissingExtraError: the package `datasets` is not installed.
        NumfitError: it cannot be had, or has no field `text`.
    """
    datasets = require("datasets", "data")
    path, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
        return "\n\n".join(row["text"] for row in rows if row["text"].strip())
    except KeyError:
        raise NumfitError(f"the data set '{path}' has no field 'text'; save the texts you want to a file, pass that") from None
    except Exception as error:  # what the hub's client raises is not a closed set
        reason = (str(error) or repr(error)).splitlines()[0]
        raise NumfitError(f"the data set '{name}' cannot be had: {reason}") from None


def bos_token(tokenizer: Any, model_type: str = "") -> int | None:
    """The id to put in front of every window, or None where the model needs none (the rule is the module's docstring).

    Args:
        tokenizer: a transformers tokenizer.
        model_type: `model_type` of the model's configuration where it is known; without it the tokenizer's class name
            is looked at instead.

    Raises:
        NumfitError: the model needs BOS and its tokenizer has none.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    kind = (model_type or type(tokenizer).__name__).lower()
    if kind.startswith("gemma") or getattr(tokenizer, "add_bos_token", False) is True:
        if bos is None:
            raise NumfitError(
                f"a model of type '{kind}' needs a BOS token in front of every window, but its tokenizer defines none: "
                "set bos_token in its tokenizer_config.json"
            )
        return int(bos)
    if bos is None:
        return None
    probe = list(tokenizer("A sentence.", add_special_tokens=True)["input_ids"])
    plain = list(tokenizer("A sentence.", add_special_tokens=False)["input_ids"])
    return int(bos) if probe[:1] == [bos] and plain[:1] != [bos] else None


def token_windows(
    tokenizer: Any, text: str, n: int, context: int, bos: int | Literal["auto"] | None = "auto"
) -> Tensor:
    """`n` evenly spaced, non-overlapping windows of `context` tokens.

    With T tokens of text and `span` tokens of text a window (`context`, or `context - 1` behind a BOS token), window i
    starts at i·((T - span) // (n - 1)); a single window starts at 0. The last one ends within n - 1 tokens of the end.

    Args:
        tokenizer: a transformers tokenizer; called with add_special_tokens=False.
        text: the text, as `read_text` gives it.
        n: number of windows, at least 1.
        context: tokens a window, BOS included, at least 2.
        bos: an id to prepend to each window, None for none, "auto" for `bos_token(tokenizer)`.

    Returns:
        int64 [n, context].

    Raises:
        OptionError: n or context too small, or the text has fewer than n·span tokens.
    """
    if n < 1:
        raise OptionError(f"--windows {n}: at least 1 window is needed")
    if context < 2:
        raise OptionError(f"--context {context}: at least 2 tokens are needed, one to read and one to predict")
    first = bos_token(tokenizer) if bos == "auto" else bos
    lead = 0 if first is None else 1
    span = context - lead  # tokens of text a window
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    total = ids.numel()
    if total < n * span:
        raise OptionError(_too_short(total, n, context, lead))
    step = (total - span) // (n - 1) if n > 1 else 0
    windows = torch.stack([ids[i * step : i * step + span] for i in range(n)])  # [n, span]
    if first is None:
        return windows
    return torch.cat([torch.full((n, 1), first, dtype=torch.int64), windows], dim=1)  # [n, 1 + span]


def check_windows(windows: Tensor, config: Any, held_out: int = 0) -> None:
    """Refuse windows that a model cannot read, or all of which would be held out; `config` is its (text) configuration.

    Raises:
        OptionError: the windows are longer than its positions, or too few. CheckpointError: the tokenizer is another model's.
    """
    if held_out >= len(windows):
        raise OptionError(
            f"the text gives {len(windows)} windows: --hold-out {held_out} leaves none; give a longer text, or hold out fewer"
        )
    longest, context = getattr(config, "max_position_embeddings", None), windows.shape[1]
    if longest and context > longest:
        raise OptionError(
            f"a window of {context} tokens is longer than the {longest} positions of the model: pass --context {longest}"
        )
    if (largest := int(windows.max())) >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer gives token id {largest}, but the model knows only {config.vocab_size} tokens: "
            "the tokenizer files belong to another model"
        )


def calibration_windows(
    tokenizer: Any, text: str, n: int, context: int, model_type: str = ""
) -> tuple[Tensor, list[str]]:
    """As `token_windows`, but content with fewer or shorter windows where the text has no more.

    Returns:
        (int64 [windows, context], what should be told).

    Raises:
        OptionError: n or context too small, or a text of less than two tokens.
    """
    bos = bos_token(tokenizer, model_type)
    lead = 0 if bos is None else 1
    total = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    size = max(1, len(text.encode("utf-8", errors="surrogatepass")))
    notes = []
    if n * (context - lead) > total >= 2:
        fewer, shorter = max(1, total // max(1, context - lead)), min(context, total + lead)
        notes.append(
            f"the calibration text has {total} tokens, fewer than the {n * (context - lead)} of {n} windows of {context}: "
            f"{fewer} window{'' if fewer == 1 else 's'} of {shorter} are used"
        )
        n, context = fewer, shorter
    if total > size / 2 and size > 1000:
        notes.append(
            f"the tokenizer needs {total} tokens for {size} bytes of the calibration text: is it in a language, or of a kind, "
            "that the model knows?"
        )
    return token_windows(tokenizer, text, n, context, bos), notes


def _too_short(total: int, n: int, context: int, lead: int) -> str:
    """One sentence: how many tokens there are, how many were asked for, what would fit."""
    need = n * (context - lead)
    fits = []
    if (windows := total // (context - lead)) >= 1:
        fits.append(f"--windows {windows}")
    if (shorter := total // n + lead) >= 2:
        fits.append(f"--context {shorter}")
    advice = "pass " + " or ".join(fits) + ", or a longer text" if fits else "pass a longer text"
    return (
        f"the text has {total} token{'' if total == 1 else 's'}, but {n} window{'' if n == 1 else 's'} of {context} "
        f"need {need}: {advice}"
    )
