"""The format frontier: SQNR of every scalar type on seeded data against an independently computed table.

Recipe and numbers: ams-pot-formats.md section 7. The table was computed with numpy and float64 code that shares nothing
with numfit; agreement to 0.02 dB pins grids, scale rounding, candidate order, ties and block geometry at once.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from numfit.formats import format, quantize_tensor

ORACLE = json.loads((Path(__file__).parent / "data" / "sqnr_oracle.json").read_text())
BLOCKS = ("row", "g128", "g64", "g32", "g16")
DISTRIBUTIONS = ("normal", "laplace", "t5")
TOLERANCE = 0.02 + 0.005 + 1e-9  # dB; the table is rounded to two digits


@cache
def data() -> dict[str, torch.Tensor]:
    g = np.random.default_rng(20260101)
    arrays = {
        "normal": g.standard_normal((64, 4096)),
        "laplace": g.laplace(0, 1, (64, 4096)),
        "t5": g.standard_t(5, (64, 4096)),
    }
    return {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}


def base_name(row: str) -> str:
    """The table's row names in our grammar."""
    if row.endswith("asym"):
        return row[:-4].lower()
    if row.startswith("POT"):
        return row.lower().replace("-lin", "")
    if row.startswith("FP"):
        return row.split("-")[1]
    return row.lower().replace("iq4_nl", "iq4nl")


def sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    x64, y64 = x.double(), y.double()
    return (10 * torch.log10(x64.square().sum() / (x64 - y64).square().sum())).item()


def test_data_checksums() -> None:
    d = data()
    assert d["normal"].double().sum().item() == pytest.approx(345.6535, abs=1e-3)
    assert d["laplace"].double().square().sum().item() == pytest.approx(523204.249, abs=1e-2)
    assert d["t5"][0, :3].tolist() == pytest.approx([1.0336158, 0.14514355, -2.3736162])


@pytest.mark.parametrize("row", list(ORACLE["grids"]["normal"]))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_grid(row: str, distribution: str) -> None:
    x = data()[distribution]
    found, wanted = [], []
    for block, pair in zip(BLOCKS, ORACLE["grids"][distribution][row]):
        for rule, value in zip(("absmax", "mse"), pair):
            if value is not None:
                found.append(sqnr(x, quantize_tensor(x, f"{base_name(row)}-{block}", scale_rule=rule).dequantize()))
                wanted.append(value)
    assert len(found) == 10
    assert found == pytest.approx(wanted, abs=TOLERANCE)


BLOCK_NAMES = {
    "MX-INT4": "mxint4", "MX-FP4-e2m1": "mxfp4", "MX-INT6": "int6-g32@e8m0", "MX-FP6-e2m3": "mxfp6-e2m3",
    "MX-FP6-e3m2": "mxfp6-e3m2", "MX-INT8": "mxint8", "MX-FP8-e4m3": "mxfp8-e4m3", "MX-FP8-e5m2": "mxfp8-e5m2",
    "NV-FP4-e2m1": "nvfp4", "NV-INT4": "nvint4", "NV-INT3": "int3-g16@e4m3", "NV-FP6-e2m3": "e2m3-g16@e4m3",
    "NV-FP4 4-over-6": "nvfp4-4over6", "IF4 (FP4/INT4 in scale sign)": "if4",
}  # fmt: skip


@pytest.mark.parametrize(("row", "bits", "rule", "values"), [(r, b, u, v) for r, b, u, *v in ORACLE["blocks"]])
def test_block_format(row: str, bits: float, rule: str, values: list[float]) -> None:
    fmt = format(BLOCK_NAMES[row])
    assert fmt.bits_per_weight((64, 4096)) == pytest.approx(bits, abs=2e-3)  # the fp32 of the tensor is not in the table
    rule = "absmax" if rule.startswith("x1") else rule
    found = [sqnr(data()[d], quantize_tensor(data()[d], fmt, scale_rule=rule).dequantize()) for d in DISTRIBUTIONS]
    assert found == pytest.approx(values, abs=TOLERANCE)
