"""Options in words → values: rules, skips and sizes, with sentences for what does not parse or matches nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from numfit.checkpoint.source import Source, natural_key
from numfit.errors import FormatError, OptionError
from numfit.formats import Format
from numfit.formats import format as named_format
from numfit.pipeline.roles import rule_can_apply

KEEP = "keep"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Pattern:
    """A regular expression over tensor names, as given and compiled, and the format of a rule (None: keep)."""

    text: str
    regex: re.Pattern[str]
    format: Format | None = None

    def matches(self, name: str) -> bool:
        return self.regex.search(name) is not None


def as_format(value: str | Format) -> Format:
    """A format from itself or its name."""
    return value if isinstance(value, Format) else named_format(value)


def format_or_keep(value: str | Format) -> Format | None:
    """A format, or None for "keep"."""
    return None if value == KEEP else as_format(value)


def parse_rule(rule: str | tuple[str, str]) -> Pattern:
    """A rule from "regex=format" or a pair. A format's name has no '=', a regex may.

    Raises:
        OptionError: not of that form, or no regular expression. FormatError: an unknown format.
    """
    pattern, equals, name = rule.rpartition("=") if isinstance(rule, str) else (rule[0], "=", rule[1])
    if not equals or not pattern:
        raise OptionError(f"--rule '{rule}' should read 'regex=format', for instance '--rule down_proj=mant4-g32'")
    regex = _compile(pattern, "--rule")
    try:
        return Pattern(pattern, regex, format_or_keep(name))
    except FormatError as error:
        raise FormatError(f"--rule '{pattern}={name}': {error}") from None


def parse_skip(pattern: str) -> Pattern:
    """A skip from a regular expression.

    Raises:
        OptionError: it is not one.
    """
    return Pattern(pattern, _compile(pattern, "--skip"))


def _compile(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{option} '{pattern}' is not a regular expression: {error}") from None


def parse_size(size: str | int) -> int:
    """Bytes from "5GB", "500MB", "1GiB" or a number.

    Raises:
        OptionError: not a size, or not a positive one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", str(size).upper())
    if not match or match[2] not in _UNITS or int(float(match[1]) * _UNITS[match[2]]) < 1:
        raise OptionError(f"the shard size '{size}' is not a size; write for instance 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def check_patterns(source: Source, rules: Sequence[Pattern], skips: Sequence[Pattern]) -> None:
    """No pattern may silently match nothing.

    Raises:
        OptionError: names the pattern and the tensor names nearest to it.
    """
    names = source.names()
    for option, patterns in (("--rule", rules), ("--skip", skips)):
        for pattern in patterns:
            matched = [name for name in names if pattern.matches(name)]
            if not matched:
                near = ", ".join(f"'{name}'" for name in nearest_names(pattern.text, names))
                raise OptionError(f"{option} '{pattern.text}' matches no tensor; the nearest names are {near}")
            if option == "--rule" and not any(rule_can_apply(source.info(name)) for name in matched):
                raise OptionError(
                    f"--rule '{pattern.text}' matches only tensors that have no rows of floating-point numbers to "
                    f"quantize (such as '{matched[0]}'); leave it out, they are kept anyway"
                )


def nearest_names(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Names that look most like a pattern, one per kind of tensor (layer numbers do not make a kind)."""
    plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$")
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        match = difflib.SequenceMatcher(None, plain, name, autojunk=False)
        return match.find_longest_match().size + match.ratio()

    return sorted(kinds.values(), key=lambda name: (-likeness(name), natural_key(name)))[:count]
