"""Short names: `base[-gN|-row|-tensor][@store][+rot[SEED]][+rankR][+sparseP]`, parsed once into a `Format`.

`mant4-g32@e3m3` is the base `mant4`, a block of 32, scales stored as e3m3. Whatever is left out comes from the base's defaults.
The suffixes after `+` are side terms (side.py): `lm4-row+rot` rotates the input channels, `+rank16` adds a low-rank term of
rank 16, `+sparse5` corrects 5 thousandths of each row's weights one by one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from functools import lru_cache

from numfit.errors import FormatError
from numfit.formats.catalogue import Base, bases, find
from numfit.formats.format import Format
from numfit.formats.scale import STORES, Scale
from numfit.formats.side import GRAMMAR, parse

_SUFFIX = re.compile(r"(?P<base>.+?)(?:-(?P<block>g\d+|row|tensor))?(?:@(?P<store>[a-z0-9]+))?")
_GRAMMAR = (
    f"names read base[-gN|-row|-tensor][@fp16|bf16|e8m0|e4m3|u8|e3m3]{GRAMMAR}; 'numfit formats' lists the bases"
)


def format(name: str) -> Format:
    """The format of a short name.

    Raises:
        FormatError: the name does not parse, or its parts cannot go together; the message quotes it and suggests a name.
    """
    if not isinstance(name, str):
        raise FormatError(f"a format name is a string, not {type(name).__name__}")
    return _parse(name.strip().lower())


@lru_cache(maxsize=512)
def _parse(name: str) -> Format:
    plain, *suffixes = name.split("+")
    if suffixes:
        fmt = _parse(plain)  # a wrong base is the first thing to hear of
        return fmt.with_side(parse(suffixes, name))
    match = _SUFFIX.fullmatch(name)
    base = find(match["base"]) if match else None
    if match is None or base is None:
        raise FormatError(f"unknown format '{name}'{_suggestion(match['base'] if match else name)}; {_GRAMMAR}")
    block = match["block"]
    store = match["store"] or base.store
    if store not in STORES:
        near = difflib.get_close_matches(store, STORES, 1)
        hint = f" (did you mean '@{near[0]}'?)" if near else ""
        raise FormatError(f"unknown scale storage '@{store}' in '{name}'{hint}; {_GRAMMAR}")
    size: int | str = base.block if block is None else int(block[1:]) if block[0] == "g" else block
    full = base.name
    if block is not None or not base.closed:
        full += f"-g{size}" if isinstance(size, int) else f"-{size}"
    if store != base.store:
        full += f"@{store}"
    try:
        return _assemble(base, full, size, store)
    except FormatError as error:
        raise FormatError(f"'{name}' is not possible: {error}") from None


def _assemble(base: Base, name: str, block: int | str, store: str) -> Format:
    kept = ("pot", "fine") if STORES[store].bits == 16 else ("pot",)  # searches that go with the levels, not with the storage
    own = base.scale if store == base.store else {k: v for k, v in base.scale.items() if k == "search" and v in kept}
    spec = STORES[store]
    scale = Scale(store, spec.parent, spec.cap, search={"e4m3": "nv", "e8m0": "e8m0"}.get(store, "grid"))
    scale = replace(scale, **own)
    parts = dict(base.parts)
    if parts.get("member_home") == "scale":
        choices = (len(parts["members"]) - 1).bit_length()
        if choices > spec.spare:  # no room in this scale word: the index gets a plane, and its bits are counted
            parts["member_home"] = "plane"
    return Format(name, block=block, scale=scale, **parts)


def _suggestion(base: str) -> str:
    known = list(bases())
    near = difflib.get_close_matches(base, known, 1, 0.5) or [n for n in known if base and n.startswith(base[:3])][:1]
    return f" (did you mean '{near[0]}'?)" if near else ""
