"""A new scalar type is one registration in the user's own file, and then everything has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import numfit
from numfit.errors import FormatError
from numfit.formats import Format, Grid, QuantizedTensor, bases, catalogue, format, names, quantize_tensor, register
from numfit.formats.packing import unpack_bits

README = Path(__file__).parent.parent / "README.md"

READER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from numfit.errors import FormatError
from numfit.formats import Format, QuantizedTensor, format

try:
    format("cubic3")
except FormatError:
    pass
else:
    raise SystemExit("this process should not know the type")
description, planes, shape = json.loads(sys.stdin.read())
q = QuantizedTensor.from_planes(Format.from_json(description), tuple(shape), load_file(planes))
save_file({"values": q.dequantize()}, sys.argv[1])
print(q)
"""


@pytest.fixture(autouse=True)
def unregister() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(catalogue._BASES)
    yield
    catalogue._BASES.clear()
    catalogue._BASES.update(before)
    names._parse.cache_clear()


def cubic3() -> None:
    """Eight levels that grow as cubes."""
    register("cubic3", Grid("cubic3", (-4.0, -1.75, -0.75, -0.25, 0.25, 0.75, 1.75, 4.0)), "cubes", block=64)


def sample() -> torch.Tensor:
    return torch.randn(5, 150, generator=torch.Generator().manual_seed(1))


def run(code: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    source = str(Path(numfit.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": source}
    return subprocess.run([sys.executable, "-c", code, *args], input=stdin, capture_output=True, text=True, env=env)


def test_a_registered_type_works_everywhere() -> None:
    cubic3()
    assert "cubic3" in bases() and format("cubic3").name == "cubic3-g64"
    assert format("cubic3").bits_per_weight((4096, 4096)) == 3.25
    assert format("cubic3-g32@e3m3").bits_per_weight((4096, 4096)) == 3 + 6 / 32 + 16 / 4096
    w = sample()
    for name in ("cubic3", "cubic3-row", "cubic3-g16@e3m3", "cubic3-g32@e8m0", "cubic3-tensor", "cubic3-g16@e4m3"):
        for rule in ("mse", "absmax"):
            q = quantize_tensor(w, name, scale_rule=rule, importance=torch.rand(150))
            assert (q.dequantize() - w).square().mean() < 0.25
    q = quantize_tensor(w, "cubic3")
    codes = unpack_bits(q.planes["codes"], 3, 150)
    scale = q.planes["scale"].float().repeat_interleave(64, 1)[:, :150]
    levels = torch.tensor(format("cubic3").members[0].levels)
    assert torch.equal(q.dequantize(), levels[codes.long()] * scale)
    error = (scale[..., None] * levels - w[..., None]).abs()
    assert torch.equal(codes.long(), error.argmin(-1))


def test_a_reader_needs_no_registration(tmp_path: Path) -> None:
    cubic3()
    q = quantize_tensor(sample(), "cubic3-g32@e3m3")
    save_file(q.state_dict(), tmp_path / "planes.safetensors")
    request = json.dumps([q.format.to_json(), str(tmp_path / "planes.safetensors"), q.shape])
    result = run(READER, str(tmp_path / "values.safetensors"), stdin=request)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "QuantizedTensor(cubic3-g32@e3m3, shape=(5, 150)" in result.stdout
    assert torch.equal(load_file(tmp_path / "values.safetensors")["values"], q.dequantize())


def test_a_registered_family() -> None:
    """Several members, small units, spare scale bits: all by the same call."""
    wide, narrow = Grid("wide", (-3.0, -1.0, 1.0, 3.0)), Grid("narrow", (-2.0, -1.0, 0.0, 2.0))
    register("duo2", [wide, narrow], block=32)
    register("duo2u", [wide, narrow], block=32, unit=4)
    register("duo2s", [wide, narrow], block=32, member_home="scale")
    w = sample()
    planes = {name: set(quantize_tensor(w, name).planes) for name in ("duo2", "duo2u", "duo2s")}
    assert planes == {
        "duo2": {"codes", "scale", "member"}, "duo2u": {"codes", "scale", "member"}, "duo2s": {"codes", "scale"},
    }  # fmt: skip
    bits = [format(n).bits_per_weight((1, 4096)) for n in ("duo2", "duo2u", "duo2s")]
    assert bits == [2 + 17 / 32, 2 + 16 / 32 + 1 / 4, 2 + 16 / 32]
    assert torch.equal(quantize_tensor(w, "duo2").dequantize(), quantize_tensor(w, "duo2s").dequantize())
    error = [(quantize_tensor(w, n).dequantize() - w).square().sum() for n in ("duo2u", "duo2")]
    assert error[0] < error[1]


@pytest.mark.parametrize("name", ["int4", "mant4", "fp4.25", "e2m4", "ams-e2m2k7"])
def test_taken_names_are_refused(name: str) -> None:
    """Also names that a pattern stands for: they would change meaning."""
    grid = Grid("x", (0.0, 1.0, 2.0, 3.0))
    with pytest.raises(FormatError, match=f"'{name}' is registered already"):
        register(name, grid)


@pytest.mark.parametrize("name", ["", "4bit", "My4", "a b", "x@y", "cubic-g64", "cubic-row", "cubic-tensor"])
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"'{name}' cannot name a type"):
        register(name, Grid("x", (0.0, 1.0, 2.0, 3.0)))


NAN = float("nan")


@pytest.mark.parametrize(
    ("levels", "parts", "why"),
    [
        ((0.0, 1.0, 2.0), {}, r"2\*\*2 levels"),
        ((1.0,), {}, "1 to 8 bits"),
        (tuple(map(float, range(512))), {}, "1 to 8 bits"),
        ((NAN,) * 4, {}, "no level but zero"),
        ((0.0,) * 4, {}, "no level but zero"),
        ((0.0, 1.0, 5.0, 9.0), {"zero": True}, "zero point needs the levels"),
        ((0.0, 1.0, 2.0, 3.0), {"rounding": "up"}, "rounding is"),
        ((0.0, 1.0, 2.0, 3.0), {"store": "fp12"}, "scales are stored as one of"),
        ((0.0, 1.0, 2.0, 3.0), {"block": 0}, "positive count"),
        ((0.0, 1.0, 2.0, 3.0), {"block": "row", "store": "u8"}, "smaller than a row"),
    ],
)
def test_impossible_types_are_refused_at_once(levels: tuple[float, ...], parts: dict[str, object], why: str) -> None:
    with pytest.raises(FormatError, match=why):
        register("odd2", Grid("odd2", levels), **parts)  # type: ignore[arg-type]
    assert "odd2" not in bases()


def test_members_of_unlike_width_are_refused() -> None:
    with pytest.raises(FormatError, match="narrow"):
        register("odd", [Grid("wide", (0.0, 1.0, 2.0, 3.0)), Grid("narrow", (0.0, 1.0))])


def test_an_equal_type_under_another_name_is_the_same_format() -> None:
    cubic3()
    register("cubes", format("cubic3").members[0], block=64)
    assert format("cubes") == format("cubic3") and Format.from_json(format("cubes").to_json()) == format("cubic3")


def example() -> str:
    """The Python block under the README's heading."""
    heading = re.search(r"^#+ .*add your own type.*$", text := README.read_text(encoding="utf-8"), re.M | re.I)
    assert heading is not None, "the README has no section 'Add your own type'"
    return text[heading.end() :].split("```python\n")[1].split("```")[0]


def test_the_readme_example_runs() -> None:
    """The section "Add your own type", as printed: fewer than 40 lines, in a process of its own."""
    code = example()
    assert "register(" in code and len(code.splitlines()) < 40
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_planes_alone_do_not_tell_the_type() -> None:
    cubic3()
    q = quantize_tensor(sample(), "cubic3")
    other = QuantizedTensor.from_planes(format("int3-g64"), q.shape, q.state_dict())
    assert not torch.equal(other.dequantize(), q.dequantize())
