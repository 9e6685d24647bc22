"""Golden vectors: a tiny weight in every type, byte by byte, frozen in data/golden.json.

    python tests/make_golden.py            # say whether the file would change
    python tests/make_golden.py --write    # write it anew: only after a deliberate change of a format

Anyone writing a reader can test it with this file alone. All bytes are hexadecimal, all numbers little-endian:

    weight, importance   shape and fp32 bytes of the source and of the importance of its input channels
    formats[name]        description   sha256 of the format's JSON (`Format.to_json`, keys sorted, no spaces)
                         mse           planes of `quantize_tensor(weight, name)`: plane -> [type, shape, bytes]
                         values        fp32 bytes of that tensor dequantized
                         absmax        planes under `scale_rule="absmax"`
                         weighted      planes under the importance (some names only)

The weight comes from an integer recurrence, so that no library's generator is part of the format.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from numfit.formats import QuantizedTensor, bases, format, quantize_tensor

FILE = Path(__file__).parent / "data" / "golden.json"
SHAPE = (2, 136)  # a block of 128 and a short one; two of 64; short units of AMS at both ends
MORE = (
    "mant4-g32@e3m3", "mant4-g64@u8", "mantsv4-g32@e3m3", "ams-e2m2k4-g128", "fp5.33-g64@bf16", "ams-e3m1k5-g16@e3m3",
    "razer4-g128@fp16", "razer4-g16@e4m3", "if4-g32@bf16", "int4-g128@u8", "int6-g32@e8m0", "uint3-g16@e3m3",
    "nf4-g64@bf16", "int4-tensor", "uint4-tensor", "fp4.25-tensor", "ant4-g32@e4m3", "lm4-row+rot", "lm3-row+rot7",
    "mant4-g64+rot+sparse20", "int4-g64+sparse20", "any4-g32@e3m3", "km3-row+rot",
)  # fmt: skip
WEIGHTED = ("mant4", "mant4-g32@e3m3", "fp4.25", "int4", "uint4", "nvfp4", "nf4", "km4", "any4")


def recurrence(count: int, state: int) -> list[int]:
    """x ← (1103515245·x + 12345) mod 2**31, the upper 16 bits of each: 0 … 65535."""
    out = []
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        out.append(state >> 15)
    return out


def weight() -> torch.Tensor:
    """Sums of three draws (nearly normal), sharpened in the second row; zeros, and the same weight twice."""
    rows, k = SHAPE
    draws = torch.tensor(recurrence(rows * k * 3, 20260101), dtype=torch.int64).view(rows, k, 3)
    w = (draws.sum(-1) - 98304).double() / 2**20
    w[1] *= (w[1] * 16).square()
    w[0, 40:48] = 0
    w[1, 128:130] = w[1, 127]
    return w.float()


def importance() -> torch.Tensor:
    return torch.tensor(recurrence(SHAPE[1], 7), dtype=torch.float64).div(2**15).square().add(2**-6).float()


def hexed(values: torch.Tensor) -> str:
    flat = values.flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes().hex()


def planes(q: QuantizedTensor) -> dict[str, list[Any]]:
    return {n: [str(p.dtype).removeprefix("torch."), list(p.shape), hexed(p)] for n, p in q.planes.items()}


def names() -> list[str]:
    return [*bases(), *MORE]


def vector(name: str) -> dict[str, Any]:
    """The entry of one format."""
    fmt, w = format(name), weight()
    text = json.dumps(fmt.to_json(), sort_keys=True, separators=(",", ":"))
    q = quantize_tensor(w, fmt)
    out: dict[str, Any] = {
        "description": hashlib.sha256(text.encode()).hexdigest(),
        "mse": planes(q),
        "values": hexed(q.dequantize()),
        "absmax": planes(quantize_tensor(w, fmt, scale_rule="absmax")),
    }
    if name in WEIGHTED:
        out["weighted"] = planes(quantize_tensor(w, fmt, importance=importance()))
    return out


def golden() -> dict[str, Any]:
    """The whole file."""
    return {
        "weight": {"shape": list(SHAPE), "fp32": hexed(weight())},
        "importance": {"shape": [SHAPE[1]], "fp32": hexed(importance())},
        "formats": {name: vector(name) for name in names()},
    }


def dumps(data: dict[str, Any]) -> str:
    """JSON with one line per format."""
    compact = {"separators": (",", ":")}
    lines = [f"  {json.dumps(name)}:{json.dumps(entry, **compact)}" for name, entry in data["formats"].items()]
    head = "".join(f' "{part}":{json.dumps(data[part], **compact)},\n' for part in ("weight", "importance"))
    return "{\n" + head + ' "formats":{\n' + ",\n".join(lines) + "\n }\n}\n"


def main() -> int:
    text = dumps(golden())
    if "--write" in sys.argv[1:]:
        FILE.write_text(text)
        print(f"wrote {FILE} ({len(text)} bytes)")
        return 0
    same = FILE.exists() and FILE.read_text() == text
    print("the golden vectors are as frozen" if same else "the golden vectors would change; see --write")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
