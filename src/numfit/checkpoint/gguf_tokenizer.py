"""The tokenizer inside a GGUF file, written as the `tokenizer.json` that every Hugging Face tool reads.

A GGUF stores vocabulary, merges and special ids, but the splitting rule only as a name (`tokenizer.ggml.pre`). This
file writes the JSON itself rather than going through transformers, whose GGUF loading leaves the splitting rule of
`smollm` out (numbers and spaces are then cut differently from how the model was trained), needs the whole library, and
takes a minute for 262 000 Gemma tokens. Two kinds exist: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`),
whose merges are not stored but follow from the vocabulary.

Gives up: Unigram and WordPiece vocabularies, and splitting rules not in SPLITS: both are errors, since a tokenizer
that is nearly right is worse than none. Sources: the pre-tokenizer table of llama.cpp and the published tokenizer.json
of the models; cross-checked on their text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numfit.checkpoint.gguf_header import GGUFHeader, damaged
from numfit.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
SPACE = "\u2581"  # SentencePiece's visible space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}"
_LLAMA3 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}"
_GPT2 = None  # the byte-level step's built-in expression
_DIGITS = {"type": "Digits", "individual_digits": True}

# tokenizer.ggml.pre -> (steps before the byte-level one, its expression or None for GPT-2's, normalizer)
SPLITS: dict[str, tuple[list[dict[str, Any]], str | None, dict[str, Any] | None]] = {
    "gpt-2": ([], _GPT2, None),
    "smollm": ([_DIGITS], _GPT2, None),
    "starcoder": ([_DIGITS], _GPT2, None),
    "qwen2": ([], _QWEN2, {"type": "NFC"}),
    "deepseek-r1-qwen": ([], _QWEN2, {"type": "NFC"}),
    "llama-bpe": ([], _LLAMA3, None),
    "llama3": ([], _LLAMA3, None),
    "llama-v3": ([], _LLAMA3, None),
}
WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}  # a split that is itself in the vocabulary skips the merges


def save_tokenizer(header: GGUFHeader, directory: str | Path) -> list[str]:
    """Write the tokenizer and generation files into `directory`; returns their names.

    Raises:
        CheckpointError: the file has no tokenizer, or one of a kind that is not known here.
    """
    directory = Path(directory)
    tokens = _tokens(header)
    files = {"tokenizer.json": tokenizer_json(header), "tokenizer_config.json": _tokenizer_config(header, tokens)}
    files["generation_config.json"] = _generation_config(header)
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (directory / name).write_text(text + "\n", encoding="utf-8", newline="\n")
    template = header.value("tokenizer.chat_template", str)
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
    return [*files, *(["chat_template.jinja"] if template else [])]


def tokenizer_json(header: GGUFHeader) -> dict[str, Any]:
    """The content of `tokenizer.json` (format version 1.0 of the `tokenizers` library)."""
    tokens = _tokens(header)
    kinds = header.value("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise damaged(header.path, f"there are {len(tokens)} tokens, but {len(kinds)} token types")
    model_kind = header.need("tokenizer.ggml.model", str)
    if model_kind == "gpt2":
        model, normalizer, pre_tokenizer, decoder = _byte_level(header, tokens)
    elif model_kind == "llama":
        tokens = _visible_spaces(tokens)
        model, normalizer, pre_tokenizer, decoder = _sentencepiece(header, tokens, kinds)
    else:
        raise CheckpointError(
            f"{header.path}: tokenizers of the kind '{model_kind}' are not supported (only gpt2 and llama are); "
            "convert the original model's directory, which has a tokenizer.json"
        )
    model["vocab"] = {token: index for index, token in enumerate(tokens)}
    if len(model["vocab"]) != len(tokens):
        raise damaged(header.path, "a token occurs twice in 'tokenizer.ggml.tokens'")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": kind != USER_DEFINED}
            for index, (token, kind) in enumerate(zip(tokens, kinds))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(header, tokens),
        "decoder": decoder,
        "model": model,
    }  # fmt: skip


def _list(header: GGUFHeader, key: str, kind: type) -> list:
    """A metadata list whose items (all of one type in a GGUF) are of the type `kind`."""
    items = header.need(key, list)
    if items and not isinstance(items[0], kind):
        raise damaged(header.path, f"metadata '{key}' holds {type(items[0]).__name__} items instead of {kind.__name__}")
    return items


def _tokens(header: GGUFHeader) -> list[str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError(
            f"{header.path}: the GGUF file carries no tokenizer (no 'tokenizer.ggml.tokens'); convert the original "
            "model's directory, or a GGUF made with its vocabulary"
        )
    return tokens


def _byte_level(header: GGUFHeader, tokens: list[str]) -> tuple[dict, dict | None, dict | None, dict]:
    rule = header.value("tokenizer.ggml.pre", str, "(none)")
    if rule not in SPLITS:
        raise CheckpointError(
            f"{header.path}: the tokenizer's splitting rule '{rule}' is not known (known: {', '.join(SPLITS)}); "
            "convert the original model's directory, which has a tokenizer.json"
        )
    steps, expression, normalizer = SPLITS[rule]
    if expression is not None:
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        steps = [*steps, split]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [*steps, {**byte_level, "use_regex": expression is None}]
    merges = [merge.split(" ") for merge in _list(header, "tokenizer.ggml.merges", str)]
    vocabulary = set(tokens)
    for merge in merges:
        if len(merge) != 2 or not vocabulary.issuperset([*merge, "".join(merge)]):
            raise damaged(header.path, f"the merge {' '.join(merge)!r} is not of the vocabulary")
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": rule in WHOLE_WORDS_FIRST, "vocab": {}, "merges": merges}
    return model, normalizer, {"type": "Sequence", "pretokenizers": steps}, {**byte_level, "use_regex": True}


def _visible_spaces(tokens: list[str]) -> list[str]:
    """Gemma's runs of spaces are stored as real spaces, but met in the text as visible ones."""
    return [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]


def _sentencepiece(
    header: GGUFHeader, tokens: list[str], kinds: list[int]
) -> tuple[dict, dict | None, dict | None, dict]:
    prefix = header.value("tokenizer.ggml.add_space_prefix", bool, True)
    to_visible: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer = {"type": "Sequence", "normalizers": [prepend, to_visible]} if prefix else to_visible
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = tokens[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": {}}
    model["merges"] = _implied_merges(header, tokens)
    return model, normalizer, None, {"type": "Sequence", "decoders": decoders}


def _implied_merges(header: GGUFHeader, tokens: list[str]) -> list[list[str]]:
    """Every way to put a token together from two others, best token first.

    The order is the scores', except for Gemma, whose scores do not follow it while its token order does.
    """
    scores = _list(header, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise damaged(header.path, f"there are {len(tokens)} tokens, but {len(scores)} scores")
    rank = {token: index for index, token in enumerate(tokens)}
    by_position = header.value("general.architecture", str, "").startswith("gemma")
    found: list[tuple[float, int, int, list[str]]] = []
    for index, token in enumerate(tokens):
        order = index if by_position else -scores[index]
        for cut in range(1, len(token)):
            left, right = rank.get(token[:cut]), rank.get(token[cut:])
            if left is not None and right is not None:
                found.append((order, left, right, [token[:cut], token[cut:]]))
    found.sort(key=lambda item: item[:3])
    return [pair for *_, pair in found]


def _adds(header: GGUFHeader, end: str) -> bool:
    """Whether the model wants its `bos` or `eos` token added; llama.cpp's defaults where the file is silent."""
    sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
    default = end == "bos" and (sentencepiece or header.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS_FIRST)
    return header.value(f"tokenizer.ggml.add_{end}_token", bool, default)


def _token_id(header: GGUFHeader, key: str, tokens: list[str]) -> int | None:
    index = header.value(f"tokenizer.ggml.{key}_token_id", int)
    if index is not None and not 0 <= index < len(tokens):
        raise damaged(header.path, f"'tokenizer.ggml.{key}_token_id' is {index}, but there are {len(tokens)} tokens")
    return index


def _post_processor(header: GGUFHeader, tokens: list[str]) -> dict[str, Any] | None:
    before, after = (_token_id(header, end, tokens) if _adds(header, end) else None for end in ("bos", "eos"))
    special = {
        tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (before, after) if i is not None
    }
    if not special:
        return None

    def template(which: str, type_id: int) -> list[dict]:
        pieces: list[dict] = [{"Sequence": {"id": which, "type_id": type_id}}]
        if before is not None:
            pieces.insert(0, {"SpecialToken": {"id": tokens[before], "type_id": type_id}})
        if after is not None:
            pieces.append({"SpecialToken": {"id": tokens[after], "type_id": type_id}})
        return pieces

    pair = template("A", 0) + template("B", 1)
    return {"type": "TemplateProcessing", "single": template("A", 0), "pair": pair, "special_tokens": special}


def _tokenizer_config(header: GGUFHeader, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _token_id(header, key, tokens)
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    length = header.value(f"{header.metadata.get('general.architecture')}.context_length", int)
    if length is not None:
        config["model_max_length"] = length
    return config


def _generation_config(header: GGUFHeader) -> dict[str, Any]:
    tokens = _tokens(header)
    config: dict[str, Any] = {}
    ends = [_token_id(header, key, tokens) for key in ("eos", "eot")]
    ends = list(dict.fromkeys(index for index in ends if index is not None))
    for name, index in (("bos", _token_id(header, "bos", tokens)), ("pad", _token_id(header, "padding", tokens))):
        if index is not None:
            config[f"{name}_token_id"] = index
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config
