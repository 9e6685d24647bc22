"""Names of streams, and the presets.

A name is `type[/channel][+part…]`:

    asym4-g64           uniform, minimum and scale per 64           sym8-g32      symmetric
    tq4, tq-k10         rotated Lloyd-Max of 4 bits, of 10 levels    rotvq         rotated words of four values, 2 bits
    oct3                rotated octahedral triplets                  ternary-g32   −α, 0, α
    polar4-g128         length and angle of RoPE's pairs, along time  sign-g32      −α, α
    mant4-paper3, -paper8, -table16, -search8, -search16             M-ANT, groups of 64 or `-gN`
    nf4-g64, mxfp4, fp8-row, fp4.25, …                               any numfit format

    /channel            rows run along time, one channel each; their length is the group (128, 64 for M-ANT)
    +centred  +permuted  +outliers0.01  +haar  +hadamard  +fourier  +plain  +unbiased  +seed7
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from numfit.errors import FormatError, OptionError
from numfit.formats import format as named_format
from numfit.kvcache.coders import Coder, LloydMax, Octahedral, Residual, Sign, Ternary, Uniform, WordBook
from numfit.kvcache.rotation import KINDS
from numfit.kvcache.stream import Stream
from numfit.kvcache.typed import Typed, mant_coder

# key, value, and what they are for
PRESETS: dict[str, tuple[str, str, str]] = {
    "kv8": ("sym8-g32", "sym8-g32", "8.5 bits, per token: as good as none"),
    "kv4": ("asym4-g128/channel", "asym4-g64", "4.25 and 4.5 bits: the default"),
    "kv4-rot": ("tq4+centred", "tq4", "rotated Lloyd-Max, every token alone"),
    "kv3": ("asym3-g128/channel", "tq3", "3.25 bits"),
    "mant4": ("mant4-paper3", "mant4-paper3/channel", "M-ANT as published: types by variance"),
    "mant4+": ("mant4-search8+centred", "mant4-search8/channel", "M-ANT with centred keys and types by search"),
}
_GRAMMAR = "names read type[/channel][+centred|+permuted|+outliers0.01|+haar|+hadamard|+fourier|+plain|+unbiased|+seedN]"


def preset(name: str) -> tuple[Stream, Stream]:
    """(keys, values) of a preset, or of two names joined by a comma.

    Raises:
        OptionError: neither.
    """
    if name in PRESETS:
        key, value, _ = PRESETS[name]
        return stream(key), stream(value)
    if "," in name:
        key, _, value = name.partition(",")
        return stream(key.strip()), stream(value.strip())
    raise OptionError(
        f"unknown cache '{name}'; choose from: {', '.join(PRESETS)}, or give two types as KEYS,VALUES, for instance "
        "asym4-g128/channel,nf4-g64"
    )


def doubt(model: nn.Module, name: str) -> str | None:
    """A sentence where a cache is known to harm a model, else None.

    That is keys with biases behind a rotation, which spreads few large channels over all: it takes the perplexity of
    Qwen2.5-Coder-0.5B from 27 to 71 (docs/kvcache.md).
    """
    biased = any(key.endswith("k_proj.bias") for key, _ in model.named_parameters())
    if not biased or preset(name)[0].rotation is None:
        return None
    return (
        f"this model's keys have biases, which the rotation of '{name}' spreads over all channels: answers may be useless; "
        "kv4 and kv3, whose keys have their scales along time, do not mind"
    )


def stream(name: str) -> Stream:
    """The stream of a name.

    Raises:
        OptionError: the name does not parse; the message quotes it.
    """
    body, *parts = name.strip().lower().split("+")
    kind, _, axis = body.partition("/")
    if re.search(r"-g0*$", kind):
        raise OptionError(f"'{name}': groups hold at least 1 value; {_GRAMMAR}")
    if axis not in ("", "channel"):
        raise OptionError(f"'{name}': rows run along a token, or '/channel', not '/{axis}'; {_GRAMMAR}")
    coder, rotation, group = _coder(kind, name)
    polar = kind.startswith("polar")
    out = Stream(name, coder, rotation=rotation, polar=polar)
    if axis or polar:
        out = replace(out, axis="channel", window=group or 128)
    for part in parts:
        out = _with(out, part, name)
    return out


def _with(out: Stream, part: str, name: str) -> Stream:
    """A stream with one more part of its name."""
    if part in ("centred", "permuted"):
        return replace(out, **{part: True})  # type: ignore[arg-type]
    if part in KINDS:
        return replace(out, rotation=part)
    if part in ("plain", "renorm", "unbiased") and isinstance(out.coder, LloydMax):
        return replace(out, coder=replace(out.coder, norm=part))
    if match := re.fullmatch(r"outliers(0?\.\d+)", part):
        return replace(out, outliers=float(match[1]))
    if match := re.fullmatch(r"seed(\d{1,9})", part):
        return replace(out, seed=int(match[1]))
    raise OptionError(f"'{name}' has a part '+{part}' that is unknown or does not apply; {_GRAMMAR}")


def _coder(kind: str, name: str) -> tuple[Coder, str | None, int | None]:
    """(coder, rotation, group) of a type."""
    if match := re.fullmatch(r"(asym|sym)([1-8])-g(\d{1,4})", kind):
        return Uniform(int(match[2]), int(match[3]), match[1] == "sym"), None, int(match[3])
    if match := re.fullmatch(r"tq(?:([1-8])|-k(\d{1,3}))", kind):
        return LloydMax(1 << int(match[1]) if match[1] else int(match[2])), "haar", None
    if match := re.fullmatch(r"qjl([2-5])", kind):
        return Residual(1 << (int(match[1]) - 1)), "haar", None
    if match := re.fullmatch(r"oct([2-6])", kind):
        return Octahedral(int(match[1])), "haar", None
    if kind == "rotvq":
        return WordBook(), "haar", None
    if match := re.fullmatch(r"ternary(?:-g(\d{1,4}))?", kind):
        return Ternary(int(match[1] or 32)), None, None
    if match := re.fullmatch(r"sign(?:-g(\d{1,4}))?", kind):
        return Sign(int(match[1] or 32)), None, int(match[1] or 32)
    if match := re.fullmatch(r"polar([2-8])-g(\d{1,4})", kind):
        return Uniform(int(match[1]), int(match[2]), bins=True), None, int(match[2])
    if match := re.fullmatch(r"mant4-(paper3|paper8|table16|search8|search16)(?:-g(\d{1,4}))?", kind):
        return mant_coder(match[1], int(match[2] or 64)), None, int(match[2] or 64)
    try:
        fmt = named_format(kind)
    except FormatError as error:
        raise OptionError(f"unknown cache type '{name}': {error}") from None
    return Typed(fmt), None, fmt.block if isinstance(fmt.block, int) else None
