"""What a calibrated run costs: how much there is to do, told from shapes, times how fast this machine did a little of it.

    statistics   T tokens through every layer, 2·T·weights + 4·T·context·heads, and 2·T·K² for each distinct input of K channels
    solving      N·K·(a + b·K) for each weight [N, K], and c·K³ for its Cholesky factor
    learning     steps of a forward and a backward pass of one window, and d for each weight

The rates (operations a second, a, b, c, d) come from about a second of the very functions on pieces: a small gated layer, 512
columns of the first weight of each format. Gives up: what a format's own fit prunes, caches, how fast a disk takes
hidden states, the memory bandwidth of layers much larger than the pieces. Expect a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from numfit.calibration import Blocks, Statistics
from numfit.checkpoint.source import Source
from numfit.errors import CheckpointError
from numfit.formats import Format
from numfit.pipeline.learn import CPU, learn, options
from numfit.pipeline.linear import Solved, finish, solve_linear, solver_options
from numfit.pipeline.planning import Plan, PlannedTensor
from numfit.pipeline.recipe import Parts
from numfit.pipeline.results import Calibration
from numfit.pipeline.shares import SHARES
from numfit.reconstruction import fast_bf16
from numfit.solvers.linalg import cholesky_inverse_upper
from numfit.structure import Decoder, decoder_map
from numfit.text import calibration_windows, check_windows

GROUPS = 4  # of linears that share an input: q k v; o; gate up; down
COLUMNS, ROWS = 512, 256  # of the pieces that are solved
LEARNED = 4  # steps of the piece that is learned
PIECE = 3e8  # operations of the small layer
MOMENT = 0.12  # seconds for each of the pieces
# Matrices of the widest input's K² that a solver holds at once: H, its damped copy, the same reversed, L, I, the inverse, U.
FACTORS = 7
COPIES = 6  # of the largest weight, fp32, while it is solved


@dataclass(frozen=True)
class Layer:
    """One decoder layer in numbers.

    Attributes:
        weights: each weight matrix, or stack of them, and the share of all tokens that it sees.
        inputs: (channels, share of all tokens, how many such inputs) of what is different among quantized linears' inputs.
    """

    weights: tuple[tuple[PlannedTensor, float], ...]
    inputs: tuple[tuple[int, float, int], ...]

    @property
    def size(self) -> int:
        return sum(tensor.weights for tensor, _ in self.weights)

    @property
    def seen(self) -> float:
        """Weights that a token is multiplied with."""
        return sum(tensor.weights * share for tensor, share in self.weights)

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [tensor for tensor, _ in self.weights if tensor.format is not None]


@dataclass(frozen=True)
class Costs:
    """Expectations of the calibrated walk.

    Attributes:
        seconds: by part, as `quantize` tells them. prepared: what building the model and reading the text took.
        peak_bytes: at the largest moment, beyond what the process holds before. state_bytes: of all hidden states on disk.
        sealed_bytes: of hidden states that are hashed. names: of the tensors that the walk solves.
    """

    seconds: dict[str, float]
    prepared: float
    peak_bytes: int
    state_bytes: int
    sealed_bytes: int
    names: frozenset[str]


def calibrated(source: Source, plan: Plan, task: Calibration) -> Costs:
    """Expected time and memory of the calibrated walk.

    Raises:
        NumfitError: the model cannot be walked layer by layer, or there is no text to speak of, as `quantize` would say.
    """
    parts = task.parts
    started = time.perf_counter()
    blocks = Blocks(source, plan.config)
    windows, _ = calibration_windows(
        blocks.tokenizer, task.text, parts.windows, parts.context, str(plan.config.get("model_type", ""))
    )
    check_windows(windows, blocks.model.config.get_text_config(), parts.hold_out)
    prepared = time.perf_counter() - started
    count, context = windows.shape
    config = blocks.model.config.get_text_config()
    width = config.hidden_size
    layers = _layers(blocks, plan, source, int(getattr(config, "num_experts_per_tok", None) or 1))
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    forward = [2 * context * layer.seen + 4 * context * context * heads for layer in layers]  # operations a window
    inner = max((t.shape[-2] for layer in layers for t, _ in layer.weights), default=width)
    rates = _rates(context, width, inner, parts.reconstruct != "none", task.device)

    passes, sums = _passes(parts)
    through = count * sum(forward) / rates.forward  # seconds that all windows take through all layers
    summed = sum(2 * count * context * share * k * k * n for layer in layers for k, share, n in layer.inputs) / rates.moment
    solving, updates = _solving(source, plan, layers, parts, task.device)
    if parts.hold_out:  # with every share; the held-out windows run through what comes of it
        solving = len(SHARES) * (solving + parts.hold_out * sum(forward) / rates.forward)
    seconds = {"statistics": passes * through + sums * summed, "solving": solving, "learning": 0.0}
    if parts.reconstruct != "none":
        how, rounds = options(parts, count, 4), 1
        if parts.reconstruct == "progressive":  # every group of linears is watched, solved and learned for itself
            rounds = GROUPS
            seconds["learning"] = rounds * through + summed + solving
            seconds["solving"] = 0.0
        step = 3 * sum(forward) / rates.learn + updates
        judged = (how.checks + 1) * (how.holdout or count) * sum(forward) / rates.forward
        seconds["learning"] += rounds * (how.iterations * step + judged)
    streams = 2 if parts.needs_quantized else 1
    state = 4 * count * context * width
    kept = (1 + parts.span) * streams * state  # what enters each layer of a span, and what leaves the last
    return Costs(
        seconds,
        prepared,
        _peak(plan, layers, parts, context, kept),
        kept,
        streams * state * (len(layers) - 1),
        frozenset(tensor.name for layer in layers for tensor in layer.quantized),
    )


def _layers(blocks: Blocks, plan: Plan, source: Source, active: int) -> list[Layer]:
    """The decoder layers of a model of which `active` experts see each token."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    try:
        shared = _shared(decoder_map(source.names(), plan.config))
    except CheckpointError:  # linears are taken to have an input each
        shared = {}
    out = []
    for k in range(len(blocks)):
        mine = [planned[name] for name in blocks.sources_of(k) if len(planned[name].shape) in (2, 3)]
        alone = {shared[t.name][1] for t in mine if t.name in shared and shared[t.name][1] is not None}
        weights, inputs = [], {}
        for tensor in mine:
            place, expert = shared.get(tensor.name, (tensor.name, None))
            experts = tensor.shape[0] if len(tensor.shape) == 3 else len(alone) if expert is not None else 1
            share = min(1.0, active / experts) if experts > 1 else 1.0
            weights.append((tensor, share))
            if tensor.format is not None:
                inputs[place] = (tensor.shape[-1], share, tensor.shape[0] if len(tensor.shape) == 3 else 1)
        out.append(Layer(tuple(weights), tuple(inputs.values())))
    return out


def _shared(decoder: Decoder) -> dict[str, tuple[str, int | None]]:
    """A tensor → the place of its input, a name that others may share, and the expert that it is part of."""
    out: dict[str, tuple[str, int | None]] = {}
    for layer in decoder.layers:
        out |= {f"{name}.weight": (f"{layer.prefix}attention", None) for name in layer.attention_inputs}
        out |= {f"{name}.weight": (f"{layer.prefix}ffn", None) for name in layer.ffn_inputs}
        for ff in layer.feed_forwards:
            if ff.expert is not None:  # sees only the tokens that were sent to it
                out |= {f"{name}.weight": (f"{ff.down}.in", ff.expert) for name in (ff.gate, ff.up) if name}
            out[f"{ff.down}.weight"] = (f"{ff.down}", ff.expert)
    return out


def _passes(parts: Parts) -> tuple[int, int]:
    """How often all windows run through a layer while statistics are gathered, and how often its second moments are summed."""
    cross = parts.needs_cross
    both = cross or parts.propagate == "quantized"  # the model quantized so far is watched, the original moves on beside it
    passes, sums = 1 + both, 1 + cross
    if parts.transform != "none":  # gathered again behind the rewrite; without moving on
        passes, sums = passes + 1 + cross, 2 * sums
    if parts.span > 1:  # what a layer makes before it is learned goes into the next one of the same span
        passes += 1
    return passes + parts.needs_quantized, sums


@dataclass(frozen=True)
class _Rates:
    """Operations a second of a layer's forward pass, of a second moment, of forward and backward passes while learning."""

    forward: float
    moment: float
    learn: float


def _rates(context: int, width: int, inner: int, learned: bool, device: torch.device) -> _Rates:
    """Measured on a small layer like the model's: attention of one head, a gated network, a norm before each."""
    tokens = min(context, 256)
    shrink = max(1.0, (6 * tokens * width * inner / PIECE) ** 0.5)
    c, inner = max(64, int(width / shrink) & ~63), max(64, int(inner / shrink) & ~63)
    x, up, gate, down = (torch.randn(*shape, device=device) for shape in ((tokens, c), (inner, c), (inner, c), (c, inner)))
    up, gate, down, moment = up / c**0.5, gate / c**0.5, down / inner**0.5, torch.zeros(c, c, device=device)
    operations = 6 * tokens * c * inner + 4 * tokens * tokens * c

    def layer() -> Tensor:
        y = F.rms_norm(x, (c,)).view(1, tokens, c // 64, 64).transpose(1, 2)
        h = x + F.scaled_dot_product_attention(y, y, y, is_causal=True).transpose(1, 2).reshape(tokens, c)
        z = F.rms_norm(h, (c,))
        return h + F.linear(F.silu(F.linear(z, gate)) * F.linear(z, up), down)

    def learning() -> None:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            loss = layer().float().square().mean()
        torch.autograd.grad(loss, [up, gate, down])

    with torch.no_grad():
        forward = operations / _fastest(layer, device)
        square = 2 * tokens * c * c / _fastest(lambda: moment.addmm_(x.T, x), device)
    if not learned:
        return _Rates(forward, square, forward)
    for weight in (up, gate, down):
        weight.requires_grad_()
    return _Rates(forward, square, 3 * operations / _fastest(learning, device))


def _fastest(run: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds of the fastest of as many runs as a moment holds, and at least three: others may be using the machine."""
    end, least, runs = time.perf_counter() + MOMENT, float("inf"), 0
    while runs < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least, runs = min(least, time.perf_counter() - started), runs + 1
    return least


def _solving(
    source: Source, plan: Plan, layers: list[Layer], parts: Parts, device: torch.device
) -> tuple[float, float]:
    """Seconds that solving all layers takes, and one step of learning beside the layers' own passes."""
    solving = updates = 0.0
    everything = [tensor for layer in layers for tensor in layer.quantized]
    for fmt in dict.fromkeys(tensor.format for tensor in everything):
        assert fmt is not None
        mine = [tensor for tensor in everything if tensor.format == fmt]
        weight, rule = source.read(mine[0].name), plan.recipe["scale_rule"]
        cost, factor, learned = _solve_rates(weight, fmt, parts, rule, device)
        for tensor in mine:
            k, matrices = tensor.shape[-1], tensor.shape[0] if len(tensor.shape) == 3 else 1
            solving += tensor.weights * (cost[0] + cost[1] * k) + matrices * factor * k**3
            updates += tensor.weights * learned
    return solving, updates


def _solve_rates(
    weight: Tensor, fmt: Format, parts: Parts, rule: str, device: torch.device
) -> tuple[tuple[float, float], float, float]:
    """((a, b), c, d) of the module's docstring, measured on a corner of a weight with inputs drawn at random."""
    block = fmt.block if isinstance(fmt.block, int) else 1  # pieces hold whole ones
    columns = max(COLUMNS // block, 1) * block
    flat = weight.reshape(-1, weight.shape[-1])[: max(ROWS, 64 * torch.get_num_threads()), :columns].float()
    n, k = flat.shape
    narrow = k // 2 // block * block if k >= 128 else 0
    x = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.1, k)
    plain = replace(parts, reconstruct="none")
    factored = fmt.trellis is not None or "gptq" in solver_options(fmt, parts, rule).steps

    def solved(columns: int) -> Solved:
        h = 2 / len(x) * x[:, :columns].T @ x[:, :columns]
        zero = torch.zeros(columns)
        known = Statistics(len(x), h, zero, zero, zero, zero, torch.zeros_like(h) if parts.needs_cross else None)
        return solve_linear("a piece", flat[:, :columns], [known], fmt, plain, rule)

    def factor(columns: int) -> float:
        return _fastest(lambda: cholesky_inverse_upper(torch.eye(columns), parts.damp or 0.01)) if factored else 0.0

    def seconds(columns: int) -> float:  # a weight, without its factor
        spent = _fastest(lambda: finish(solved(columns)).dequantize())
        return max(0.2 * spent, spent - factor(columns)) / (n * columns)

    whole, half = seconds(k), seconds(narrow) if narrow else 0.0
    b = max(0.0, (whole - half) / (k - narrow)) if half else 0.0
    learned = _learning(solved(k), parts, device) / flat.numel() if parts.reconstruct != "none" else 0.0
    return (whole - b * k, b), factor(k) / k**3, learned


def _learning(item: Solved, parts: Parts, device: torch.device) -> float:
    """Seconds of a step of learning one linear, where hardly any token runs through it."""
    how = "tune" if parts.reconstruct == "progressive" else parts.reconstruct
    x = torch.randn(2, 4, item.weight.shape[1])

    def run(steps: int) -> float:
        chosen = replace(parts, reconstruct=how, iterations=steps)
        y = x @ item.weight.T
        return _fastest(lambda: learn(lambda w, x: F.linear(x.to(device), w[item.name]), [item], x, y, chosen, device))

    return max(0.0, run(3 * LEARNED) - run(LEARNED)) / (2 * LEARNED)


def _peak(plan: Plan, layers: list[Layer], parts: Parts, context: int, state: int) -> int:
    """Bytes at the largest moment: the embedding's, or that of a layer with its second moments, a window's activations and the
    widest factor; pages of all hidden states' files."""
    embedding = max((t.bytes_before + 4 * t.weights for t in plan.tensors if t.role == "embedding"), default=0)
    most = 0
    for layer in layers:
        largest = max((tensor.weights for tensor in layer.quantized), default=0)
        widest = max((k for k, _, _ in layer.inputs), default=0)
        moments = sum(4 * k * k * n for k, _, n in layer.inputs) * (2 if parts.needs_cross else 1)
        activations = 4 * context * sum(sum(tensor.shape[-2:]) for tensor, _ in layer.weights if len(tensor.shape) == 2)
        rotated = any(tensor.format and tensor.format.side.rotation is not None for tensor in layer.quantized)
        solved = (1 + 4 * rotated) * layer.size  # codes, and the weights in their coordinates
        weights = 4 * layer.size * (6 if parts.reconstruct != "none" else 2)
        solving = moments + FACTORS * 4 * widest * widest + COPIES * 4 * largest
        if parts.hold_out:  # the best so far beside the one that is tried, and what that decodes to
            solved = 2 * solved + 4 * layer.size
        learning = 3 * activations * parts.span if parts.reconstruct != "none" else 0
        most = max(most, parts.span * (weights + solved) + max(2 * moments + activations, solving, learning))
    return max(embedding, most) + state
