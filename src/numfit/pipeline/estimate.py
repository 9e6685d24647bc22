"""How long a plan will take and how much memory, from quantizing a small slice of this very model on this machine.

One tensor per format is read and a few rows of it are quantized and decoded some times over: the fastest gives the rate,
the rest is what happens only once (compilation). An estimate, no promise: a loaded machine, a slow disk or layers that
prune worse than the slice make it longer. What a text adds is in costs.py.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable

from numfit.checkpoint.source import Source
from numfit.errors import FormatError
from numfit.formats import Format, quantize_tensor
from numfit.pipeline.costs import calibrated
from numfit.pipeline.memory import resident_bytes
from numfit.pipeline.planning import Estimate, Plan, PlannedTensor, rule_for
from numfit.pipeline.results import Calibration

SLICE = 1 << 19  # weights
REPEAT = 4  # compilation can take part in the first two runs
# What quantizing and checking take beyond the tensor and its planes, for large tensors and per weight of small ones:
# fp32 copies of some rows, the candidates' errors. With this the estimate for an embedding of 151936 × 896 is 13 % above
# the measured peak (1207 MB).
CHUNKS_BYTES = 100 << 20
PER_WEIGHT = 8


def measure(source: Source, plan: Plan, task: Calibration | None = None) -> Estimate:
    """Expected seconds and peak host memory of `quantize` for a plan. Reads one tensor per format."""
    costs = calibrated(source, plan, task) if task else None
    rounded = [tensor for tensor in plan.quantized if costs is None or tensor.name not in costs.names]
    seconds = costs.prepared + sum(costs.seconds.values()) if costs else 0.0
    for fmt in dict.fromkeys(tensor.format for tensor in rounded if tensor.format):
        mine = [tensor for tensor in rounded if tensor.format == fmt]
        once, per_weight = _rate(source, fmt, mine, rule_for(fmt, plan.recipe["scale_rule"]))
        seconds += once + per_weight * sum(tensor.weights for tensor in mine)
    totals = plan.totals()
    # The source is hashed and the output is hashed when written, when read back and as a whole file.
    hashed = totals["source_bytes"] + 3 * totals["bytes"] + (costs.sealed_bytes if costs else 0)
    seconds += hashed * _hash_seconds_per_byte()
    most = max(*map(_working_set, plan.tensors), costs.peak_bytes if costs else 0)
    if costs is None:
        return Estimate(resident_bytes() + most, seconds)
    return Estimate(resident_bytes() + most, seconds, costs.seconds, costs.state_bytes)


def _rate(source: Source, fmt: Format, tensors: Iterable[PlannedTensor], rule: str) -> tuple[float, float]:
    """(seconds spent once, seconds per weight) of one format on this model's weights."""
    ordered = sorted(tensors, key=lambda tensor: tensor.weights)
    tensor = next((tensor for tensor in ordered if tensor.weights >= SLICE), ordered[-1])
    weight = source.read(tensor.name)
    rows = max(1, math.ceil(SLICE / (tensor.weights // tensor.shape[0])))
    piece = weight[:rows].clone()
    del weight
    times = []
    for _ in range(REPEAT):
        started = time.perf_counter()
        try:
            quantize_tensor(piece, fmt, scale_rule=rule).dequantize()
        except FormatError as error:
            raise FormatError(f"tensor '{tensor.name}': {error}") from None
        times.append(time.perf_counter() - started)
    return sum(times) - REPEAT * min(times), min(times) / piece.numel()


def _hash_seconds_per_byte() -> float:
    block = bytes(1 << 24)
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    return (time.perf_counter() - started) / len(block)


def _working_set(tensor: PlannedTensor) -> int:
    """Bytes that one tensor needs while it is worked on: itself, its planes twice, and temporaries."""
    if tensor.dropped:
        return 0
    if tensor.format is None:
        return 2 * tensor.bytes_before
    return tensor.bytes_before + 2 * tensor.bytes_after + min(CHUNKS_BYTES, PER_WEIGHT * tensor.weights)
