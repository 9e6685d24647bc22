"""Golden vectors: every type still writes and reads the bytes frozen in data/golden.json (see make_golden.py)."""

from __future__ import annotations

import json
from typing import Any

import make_golden
import pytest
import torch

from numfit.formats import QuantizedTensor, format

GOLDEN = json.loads(make_golden.FILE.read_text())


def plane(kind: str, shape: list[int], text: str) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=torch.uint8)
    return raw.view(getattr(torch, kind)).view(shape)


def test_every_registered_type_is_frozen() -> None:
    assert list(GOLDEN["formats"]) == make_golden.names()
    assert make_golden.FILE.stat().st_size < 320_000


def test_source() -> None:
    """The recurrence gives the same weights everywhere."""
    assert make_golden.hexed(make_golden.weight()) == GOLDEN["weight"]["fp32"]
    assert make_golden.hexed(make_golden.importance()) == GOLDEN["importance"]["fp32"]
    w = make_golden.weight()
    assert w.shape == (2, 136) and w[0, :3].mul(2**20).tolist() == [-68566, 17910, -315]
    assert (w == 0).sum() == 8 and bool(torch.isfinite(w).all())


@pytest.mark.parametrize("name", GOLDEN["formats"])
def test_written_bytes(name: str) -> None:
    found: dict[str, Any] = make_golden.vector(name)
    for part, frozen in GOLDEN["formats"][name].items():
        assert found[part] == frozen, part
    assert found.keys() == GOLDEN["formats"][name].keys()


@pytest.mark.parametrize("name", GOLDEN["formats"])
def test_read_values(name: str) -> None:
    frozen = GOLDEN["formats"][name]
    planes = {n: plane(*p) for n, p in frozen["mse"].items()}
    q = QuantizedTensor.from_planes(format(name), make_golden.SHAPE, planes)
    assert make_golden.hexed(q.dequantize()) == frozen["values"]
