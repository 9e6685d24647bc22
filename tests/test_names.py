"""Short names, JSON, sizes and planes: what a format says about itself."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numfit.errors import FormatError
from numfit.formats import Format, bases, format, quantize_tensor

BLOCKS = ("", "-g16", "-g32", "-g48", "-g64", "-g100", "-g128", "-g256", "-row", "-tensor")
STORES = ("", "@fp16", "@bf16", "@e8m0", "@e4m3", "@u8", "@e3m3")
NAMES = [*bases(), "ams-e3m2k3", "ams-e2m2k16", "e4m1", "e5m0"]


def tried(name: str) -> Format | None:
    try:
        return format(name)
    except FormatError as error:
        assert f"'{name}'" in str(error)  # the input is quoted
        return None


def legal() -> list[str]:
    return [name for b in NAMES for g in BLOCKS for s in STORES if (name := b + g + s) and tried(name) is not None]


LEGAL = legal()


def test_legal_combinations() -> None:
    found = set(LEGAL)
    assert len(found) > 0.6 * len(NAMES) * len(BLOCKS) * len(STORES)
    for base in NAMES:
        assert base in found and base + "-g64" in found and (base + "-row@bf16" in found) != format(base).learned
    for stored_under_rows in ("int4-row@u8", "int4-row@e3m3", "int4-tensor@u8", "mant4-row@e3m3"):
        assert stored_under_rows not in found  # one fp16 per row needs blocks below a row
    for one_scale in ("int4-tensor", "nf4-tensor@bf16", "fp4.25-tensor", "ant4-tensor", "uint4-tensor"):
        assert one_scale in found
    assert "mant4-tensor" not in found and "int4-tensor@e4m3" not in found
    assert "fp4.25-g64@e3m3" in found


@pytest.mark.parametrize("base", NAMES)
def test_json_round_trip_of_every_combination(base: str) -> None:
    for name in (n for n in LEGAL if n.split("@")[0] in {base + g for g in BLOCKS}):
        fmt = format(name)
        text = json.dumps(fmt.to_json(), allow_nan=False)
        back = Format.from_json(json.loads(text))
        assert back == fmt and hash(back) == hash(fmt) and back.name == fmt.name
        assert json.dumps(back.to_json()) == text
        assert format(fmt.name) == fmt and format(fmt.name).name == fmt.name  # the full name names it again


def test_defaults_are_spelled_out() -> None:
    full = {
        "mant4": "mant4-g64", "nf4": "nf4-g64", "iq4nl": "iq4nl-g32", "int4": "int4-g128", "pot3": "pot3-g128",
        "ant4": "ant4-row", "dynfp4": "dynfp4-g32", "fp4.25": "fp4.25", "ams-e2m2k4": "ams-e2m2k4-row",
        "mxfp4": "mxfp4", "nvfp4": "nvfp4", "fp4": "fp4-g128", "int4-g128@fp16": "int4-g128", " INT4-G64 ": "int4-g64",
        "mant4-g32@e3m3": "mant4-g32@e3m3", "nvfp4-g32": "nvfp4-g32", "razer4-g128@fp16": "razer4-g128@fp16",
    }  # fmt: skip
    assert {name: format(name).name for name in full} == full


def test_equal_parts_make_equal_formats() -> None:
    assert format("fp4.25") == format("ams-e2m2k4-row") and format("fp5.33") == format("ams-e2m3k3-row")
    for alias, base in (("fp4", "e2m1"), ("fp5", "e2m2"), ("fp6", "e2m3"), ("fp8", "e4m3")):
        assert format(f"{alias}-g64") == format(f"{base}-g64")
    assert format("nvfp4") == format("nvfp4-g16@e4m3")
    assert hash(format("fp4.25")) == hash(format("ams-e2m2k4-row"))
    assert format("int4-g64") != format("int4-g32") and format("mxfp4") != format("e2m1-g32@e8m0")
    assert len({format(n) for n in ("int4", "int4-g128", "int4@fp16")}) == 1


def test_a_format_is_frozen() -> None:
    with pytest.raises(AttributeError):
        format("int4").bits = 5  # type: ignore[misc]


BITS = {
    "mant4": 4.3125, "mant4-g64": 4.3125, "mant4-g32@e3m3": 4 + 6 / 32 + 4 / 32 + 16 / 4096, "mant4s": 4 + 19 / 64,
    "mant4-g64@u8": 4 + 8 / 64 + 4 / 64 + 16 / 4096, "mantsv4": 4 + 21 / 64, "mant3": 3 + 19 / 64,
    "fp4.25": 4.25 + 16 / 4096, "fp5.33": 5 + (1366 + 2) / 4096 + 16 / 4096, "ams-e2m1k4": 3.25 + 16 / 4096,
    "ams-e2m2k4-g128": 4.25 + 16 / 128, "int4": 4.125, "int8": 8.125, "int4-g32": 4.5, "uint4": 4 + 20 / 128,
    "uint3-g64": 3 + 19 / 64, "nf4": 4.25, "iq4nl": 4.5, "pot3": 3.125, "ant4": 4 + 16 / 4096 + 8 / (4096 * 4096),
    "bitmod3": 3 + 10 / 128 + 16 / 4096, "bitmod4": 4 + 10 / 128 + 16 / 4096, "razer4-g128@fp16": 4.125,
    "razer4": 4.5 + 32 / 4096**2, "if4": 4.5 + 32 / 4096**2, "nvfp4": 4.5 + 32 / 4096**2, "mxfp4": 4.25,
    "mxfp6-e2m3": 6.25, "mxfp6-e3m2": 6.25, "mxfp8-e4m3": 8.25, "mxfp8-e5m2": 8.25, "mxint8": 8.25, "mxint4": 4.25,
    "nvint4": 4.5 + 32 / 4096**2, "dynfp4": 4 + 12 / 32 + 16 / 4096 + 128 / 4096**2, "e4m3": 8.125,
    "int4-tensor": 4 + 16 / 4096**2,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits_per_weight(name: str) -> None:
    assert format(name).bits_per_weight((4096, 4096)) == pytest.approx(BITS[name], abs=1e-12)


# -- planes and sizes -------------------------------------------------------------------------------------------------


def expected_planes(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The planes by counting, from DESIGN.md section 1: nothing for absent weights, rows padded to whole bytes."""
    *lead, k = shape
    rows = tuple(lead)

    def packed(count: int, bits: int) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.uint8, (*rows, math.ceil(count * bits / 8))

    block = k if isinstance(fmt.block, str) else fmt.block
    starts = range(0, k, block)
    members = fmt.palette or len(fmt.members)
    units = 0
    for start in starts:
        width = min(block, k - start)
        units += len(range(0, width, fmt.unit)) if isinstance(fmt.unit, int) else 1
    store, merged = fmt.scale.store, fmt.member_home == "scale" and members > 1
    word = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}.get(store, torch.uint8)
    if merged:
        word = torch.int16 if store in ("fp16", "bf16") else torch.uint8
    out = {"codes": packed(k, fmt.bits)}
    if fmt.learned and fmt.block == "row":
        pass  # levels hold the scale
    elif fmt.block == "tensor":
        out["scale"] = word, (1,)
    elif store == "e3m3" and not merged:
        out["scale"] = packed(len(starts), 6)
    else:
        out["scale"] = word, (*rows, len(starts))
    if members > 1 and not merged:
        width = math.ceil(math.log2(members))
        out["member"] = (torch.uint8, (1,)) if fmt.unit == "tensor" else packed(units, width)
    if fmt.zero:
        out["zero"] = (torch.uint8, (1,)) if fmt.block == "tensor" else packed(len(starts), fmt.bits)
    if store in ("u8", "e3m3", "e4m3"):
        tensor_wide = store == "e4m3" or fmt.name == "razer4"
        out["parent"] = (torch.float32, (1,)) if tensor_wide else (torch.float16, rows or (1,))
    if fmt.learned:
        out["levels"] = torch.float16, (*rows, 2**fmt.bits)
    if fmt.palette:
        out["palette"] = torch.uint8, (fmt.palette,)
    return out


SOME = [*bases(), "mant4-g32@e3m3", "mant4-g64@u8", "int4-tensor", "fp4.25-g48", "fp5.33-g64", "razer4-g64@fp16",
        "razer4-g16@e4m3", "if4-g32@bf16", "nf4-row@e8m0", "uint3-g8@e3m3", "uint5-tensor", "ams-e3m1k5-g16@e3m3",
        "bitmod3-row@fp16", "mantsv4-g16@e3m3", "ant4-g16@e4m3", "nvfp4-g100"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(SOME),
    lead=st.lists(st.integers(1, 5), max_size=2),
    k=st.integers(1, 300),
)
def test_sizes_of_any_shape(name: str, lead: list[int], k: int) -> None:
    fmt, shape = format(name), (*lead, k)
    if isinstance(fmt.block, int) and fmt.block > k:
        for ask in (fmt.check_shape, fmt.planes, fmt.nbytes, fmt.bits_per_weight):
            with pytest.raises(FormatError, match=f"blocks of {fmt.block} .* only {k};"):
                ask(shape)
        return
    planes = fmt.planes(shape)
    assert {n: (p.dtype, p.shape) for n, p in planes.items()} == expected_planes(fmt, shape)
    total = sum(math.prod(p.shape) * p.dtype.itemsize for p in planes.values())
    assert fmt.nbytes(shape) == total == sum(p.nbytes for p in planes.values())
    assert fmt.bits_per_weight(shape) == 8 * total / math.prod(shape)


@pytest.mark.parametrize("name", SOME)
def test_sizes_are_those_of_packed_tensors(name: str) -> None:
    fmt = format(name)
    for shape in ((3, 200), (2, 2, 131), (129,)):
        q = quantize_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(1)), fmt, scale_rule="absmax")
        assert {n: (p.dtype, tuple(p.shape)) for n, p in q.planes.items()} == expected_planes(fmt, shape)
        assert list(q.planes) == list(fmt.planes(shape))
        stored = sum(p.numel() * p.element_size() for p in q.planes.values())
        assert q.nbytes == fmt.nbytes(shape) == stored
        assert fmt.bits_per_weight(shape) == 8 * stored / math.prod(shape)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("mant5-g64", "mant4"), ("int9", "int8"), ("nvfp5", "nvfp4"), ("fp4.26", "fp4.25"), ("mant4-64", "mant4"),
     ("mxfp6_e2m3", "mxfp6-e2m3"), ("iq4_nl", "iq4nl"), ("ink4", "int4"), ("ams-e2m2k1", "ams-e2m2k4"),
     ("bitmod", "bitmod"), ("e6m2", "e5m2")],
)  # fmt: skip
def test_unknown_names_suggest(name: str, suggestion: str) -> None:
    with pytest.raises(FormatError) as caught:
        format(name)
    text = str(caught.value)
    assert f"'{name}'" in text and f"did you mean '{suggestion}" in text and "base[-gN|-row|-tensor]" in text


@pytest.mark.parametrize(
    "name",
    ["", "@u8", "-g64", "int4-", "int4-g", "int4-gx", "int4@", "int4@@fp16", "int4-g64-g64", "int4-g64@fp16@fp16",
     "int4 g64", "int4-g-5", "int4_g64", "int4-g64-row", "x" * 500, "int4-g64.5", "ams-e5m3k2", "ams-e2m2"],
)  # fmt: skip
def test_malformed_names(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        format(name)
    assert f"'{name}'" in str(caught.value)


def test_unknown_storage_suggests() -> None:
    with pytest.raises(FormatError, match=r"storage '@e3m4' in 'mant4-g64@e3m4' \(did you mean '@e3m3'\?\)"):
        format("mant4-g64@e3m4")


@pytest.mark.parametrize(
    ("name", "why"),
    [("int4-g0", "positive count"), ("mant4-row@e3m3", "smaller than a row"), ("fp4.25-g2", "straddle"),
     ("mant4-tensor", "one scale for the tensor"), ("int4-tensor@u8", "smaller than a row"),
     ("ant4-g64@e3m3", "member per tensor")],
)  # fmt: skip
def test_impossible_parts_say_why(name: str, why: str) -> None:
    with pytest.raises(FormatError, match=f"'{name}' is not possible: .*{why}"):
        format(name)


@pytest.mark.parametrize("value", [None, 4, ("int4",), b"int4"])
def test_a_name_is_a_string(value: Any) -> None:
    with pytest.raises(FormatError, match=type(value).__name__):
        format(value)


def test_block_larger_than_the_row() -> None:
    with pytest.raises(FormatError, match=r"mant4-g64 has blocks of 64 .* \(3, 40\) has only 40; .*'-g32'"):
        format("mant4-g64").check_shape((3, 40))
    with pytest.raises(FormatError, match="at least one weight"):
        format("int4-row").check_shape((3, 0))
    with pytest.raises(FormatError, match="at least one weight"):
        format("int4-row").check_shape(())
    with pytest.raises(FormatError, match="no weights"):
        format("int4-row").bits_per_weight((0, 8))


def damaged(change: Any) -> dict[str, Any]:
    data = copy.deepcopy(format("mant4-g32@e3m3").to_json())
    change(data)
    return data


DAMAGE = {
    "no members": lambda d: d.pop("members"),
    "empty members": lambda d: d.update(members=[]),
    "members not a list": lambda d: d.update(members=3),
    "a short member": lambda d: d["members"][2]["levels"].pop(),
    "a level that is text": lambda d: d["members"][2]["levels"].__setitem__(3, "seven"),
    "a level that is missing": lambda d: d["members"][2]["levels"].__setitem__(3, None),
    "a member without name": lambda d: d["members"][0].pop("name"),
    "no bits": lambda d: d.pop("bits"),
    "many bits": lambda d: d.update(bits=9),
    "no scale": lambda d: d.pop("scale"),
    "scale of nothing": lambda d: d.update(scale=None),
    "unknown store": lambda d: d["scale"].update(store="e9m9"),
    "store of another type": lambda d: d["scale"].update(store=["fp16"]),
    "a cap of text": lambda d: d["scale"].update(cap="30"),
    "a cap below zero": lambda d: d["scale"].update(cap=-30.0),
    "a cap that is no number": lambda d: d["scale"].update(cap=math.nan),
    "nothing tried": lambda d: d["scale"].update(tries=[]),
    "a scale of zero tried": lambda d: d["scale"].update(tries=[0.0]),
    "unknown search": lambda d: d["scale"].update(search="luck"),
    "a member without numbers": lambda d: d["members"][3].update(levels=["nan"] * 16),
    "a member never emitted": lambda d: d["members"][3].update(never=list(range(16))),
    "unknown scale part": lambda d: d["scale"].update(colour="red"),
    "no parent": lambda d: d["scale"].update(parent=None),
    "wrong parent": lambda d: d["scale"].update(parent="column"),
    "block of zero": lambda d: d.update(block=0),
    "block of half": lambda d: d.update(block=0.5),
    "block of text": lambda d: d.update(block="column"),
    "unit over block": lambda d: d.update(unit=64),
    "unit of text": lambda d: d.update(unit="row"),
    "rounding": lambda d: d.update(rounding="up"),
    "member home": lambda d: d.update(member_home="attic"),
    "no room in the scale": lambda d: d.update(member_home="scale"),
    "palette": lambda d: d.update(palette=17),
    "zero with members": lambda d: d.update(zero=True),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_json_is_a_format_error(what: str) -> None:
    with pytest.raises(FormatError):
        Format.from_json(damaged(DAMAGE[what]))


@pytest.mark.parametrize("version", [0, 2, "1", None, "missing"])
def test_unknown_version(version: Any) -> None:
    data = damaged(lambda d: d.pop("version") if version == "missing" else d.update(version=version))
    with pytest.raises(FormatError, match=r"'mant4-g32@e3m3' has version .* reads 1; a newer numfit"):
        Format.from_json(data)


@pytest.mark.parametrize("value", [None, [], "mant4", 1])
def test_json_of_another_kind(value: Any) -> None:
    with pytest.raises(FormatError):
        Format.from_json(value)
