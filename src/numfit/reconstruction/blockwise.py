"""Learned rounding of the linears of a block (or of several blocks) against the outputs of the unquantized one.

Every step runs the block on a few windows with the weights as they stand, takes the gradient of the output error by each
*decoded weight*, and hands it to the rounding method and to the scales: autograd sees the block and nothing of the formats.
Gradients by scales are sums over blocks of gradient · level. Scales are in stored form at every step (scales.py), and what is
kept is judged by running the block on what `decode` makes of codes and parameters: never worse than the start on the windows
that choose, and byte for byte what `pack` saves.

Costs: per weight 4 fp32 numbers beside the weight (signround), and a step of a forward and a backward of the block. On a CPU
with bf16 tiles, 135M parameters, one idle core: 14 + 27 ms per 512 tokens and block (fp32: 36 + 59). Rounding and scales of
its 3.5M weights take another 0.6 of that at 512 tokens a step, and no more at 2048.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.formats.codec import decode
from numfit.formats.params import row_chunks
from numfit.reconstruction.adaround import SoftRounding
from numfit.reconstruction.cells import cells, rows_of, run_sums, scaled
from numfit.reconstruction.scales import Adam, Scales
from numfit.reconstruction.signround import SignRounding
from numfit.reconstruction.state import Options, Report, State, check_states, check_windows
from numfit.reconstruction.tune import FixedRounding

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
# Weights worked on at a time: on a CPU what the passes of a step share stays in a core's cache; elsewhere calls are what costs.
_CHUNK, _CHUNK_ELSEWHERE = 1 << 16, 1 << 26


class Rounding(Protocol):
    """How codes are learned; see signround.py, adaround.py, tune.py."""

    def values(self, s: slice) -> Tensor: ...
    def step(self, s: slice, gradient: Tensor, scale: Tensor, run: int, progress: float) -> None: ...
    def hard(self) -> Tensor: ...


@dataclass
class _Linear:
    """What moves while one state is learned."""

    state: State
    rounding: Rounding
    scales: Scales
    low_rank: list[Tensor]  # fp32 [N, r], [r, K]; empty where there is none
    adam: list[Adam]  # theirs, where they move

    @property
    def chunk(self) -> int:
        return _CHUNK if self.state.w.device.type == "cpu" else _CHUNK_ELSEWHERE

    def _stored(self, factor: Tensor) -> Tensor:
        """A low-rank factor as it will be stored, where it moves."""
        return _half(factor) if self.adam else factor

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight as it stands, in the coordinates of the codes: [N, K]."""
        n, k = self.state.w.shape
        run = self.state.fmt.geometry(k).block
        out = torch.empty((n, k), dtype=dtype, device=self.state.w.device)
        for s in row_chunks(n, k, self.chunk):
            value = scaled(self.rounding.values(s), rows_of(self.scales.effective, s), run)
            if self.low_rank:
                value += self._stored(self.low_rank[0][s]) @ self._stored(self.low_rank[1])
            out[s] = value
        return out

    def update(self, gradient: Tensor, lr_scale: float, lr: float, progress: float) -> None:
        """One step along −gradient, that of the loss by `decoded` [N, K]."""
        n, k = gradient.shape
        g = self.state.fmt.geometry(k)
        effective = self.scales.effective
        by_scale = torch.zeros_like(effective)
        for s in row_chunks(n, k, self.chunk):
            part = gradient[s].to(torch.float32, copy=True)
            if lr_scale:
                sums = run_sums(part * self.rounding.values(s), g.block, effective.shape[1])
                if len(effective) == 1:
                    by_scale += sums.sum(0, keepdim=True)
                else:
                    by_scale[s] = sums
            self.rounding.step(s, part, rows_of(effective, s), g.block, progress)
        if lr_scale:
            self.scales.step(by_scale, lr_scale)
        if self.adam:
            b, a = self.low_rank
            gradient = gradient.float()
            gb, ga = gradient @ a.T, b.T @ gradient
            for x, gx, adam in zip(self.low_rank, (gb, ga), self.adam, strict=True):
                x -= adam.step(gx, lr * _size(x))

    def solution(self) -> State:
        """The codes and stored parameters as they stand."""
        low = None if not self.low_rank else (_half(self.low_rank[0]), _half(self.low_rank[1]))
        if not self.adam:
            low = self.state.low_rank
        return replace(self.state, codes=self.rounding.hard(), params=self.scales.params, low_rank=low)


def reconstruct(
    run: Run,
    states: Mapping[str, State],
    inputs: Tensor,
    targets: Tensor,
    options: Options = Options(),  # noqa: B008 (frozen)
    progress: Callable[[int, float], None] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, State], Report]:
    """Learn codes and scales of a block's linears so that its outputs come near `targets`.

    Args:
        run: runs the block on x [b, T, C] with the named weights in place of its own. It is called with gradients on, and
            must be differentiable by the weights; where bf16 is used, under autocast.
        states: linear → where it starts.
        inputs: what the block will see, [S, T, C] (usually of the model whose earlier blocks are quantized already). Windows
            go to the device of the states one batch at a time.
        targets: what it should make of them, [S, T, C'] (usually of the unquantized model).
        options: see `Options`.
        progress: called after each step with (step, training loss).
        extra: further tensors that `run` takes by name and that shall move, norm gains say; fp32.

    Returns:
        The new states (the given ones where no step was better) and a report.

    Raises:
        OptionError: numbers that are not finite, shapes that do not fit, or too few windows.
        FormatError: codes that no encoder emits.
    """
    check_states(states)
    check_windows(inputs, targets)
    o = options
    learn, judge = _split(len(inputs), o.holdout)
    clock = {"forward": 0.0, "backward": 0.0, "update": 0.0, "checks": 0.0}
    device = next(iter(states.values())).w.device
    low = fast_bf16(device) if o.bf16 is None else o.bf16
    linears = {name: _start(name, state, o) for name, state in states.items()}
    others = {name: value.detach().float().clone().requires_grad_() for name, value in (extra or {}).items()}
    mover = _adam(others, o)

    best, best_extra, kept = dict(states), {n: v.detach().clone() for n, v in others.items()}, 0
    begin = time.perf_counter()
    start = least = _loss(run, best, best_extra, inputs, targets, judge, o)
    clock["checks"] += time.perf_counter() - begin
    looks = [(0, start)]
    at = {round(o.iterations * (i + 1) / o.checks) for i in range(o.checks)}
    generator = torch.Generator().manual_seed(o.seed)
    queue: list[int] = []
    for step in range(o.iterations):
        while len(queue) < min(o.batch, len(learn)):
            queue += [learn[i] for i in torch.randperm(len(learn), generator=generator).tolist()]
        chosen, queue = queue[: o.batch], queue[o.batch :]
        loss, gradients = _gradients(
            run, linears, others, inputs[chosen].to(device).float(), targets[chosen].to(device).float(), o, low, start, clock
        )
        begin = time.perf_counter()
        done = (step + 0.5) / o.iterations
        for (name, linear), gradient in zip(linears.items(), gradients, strict=False):
            if not bool(torch.isfinite(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
                raise OptionError(
                    f"the gradient of '{name}' is not finite at step {step + 1}; check the block's outputs, or switch bf16 off"
                )
            linear.update(gradient, o.scale_lr * (1 - done), o.extra_lr * (1 - done), done)
        if mover is not None:
            for group, gradient in zip(mover.param_groups, gradients[len(linears) :], strict=True):
                group["params"][0].grad = gradient.float()
                group["lr"] = group["initial_lr"] * (1 - done)
            mover.step()
        clock["update"] += time.perf_counter() - begin
        if progress is not None:
            progress(step + 1, loss)
        if step + 1 in at:
            begin = time.perf_counter()
            now = {name: linear.solution() for name, linear in linears.items()}
            error = _loss(run, now, others, inputs, targets, judge, o)
            looks.append((step + 1, error))
            if error < least:
                best, best_extra, kept, least = now, {n: v.detach().clone() for n, v in others.items()}, step + 1, error
            clock["checks"] += time.perf_counter() - begin
    flipped = {n: float((best[n].codes != s.codes).float().mean()) for n, s in states.items()}
    return best, Report(start, least, kept, tuple(looks), flipped, clock, best_extra)


def weight(state: State) -> Tensor:
    """The weight that the module multiplies with: decoded, low-rank term added, un-rotated; fp32 [N, K]."""
    w = decode(state.fmt, state.codes, state.params)
    if state.low_rank is not None:
        w = w + state.low_rank[0].float() @ state.low_rank[1].float()
    return w if state.effective is None else state.effective(w)


def _adam(extra: dict[str, Tensor], o: Options) -> torch.optim.Adam | None:
    """Adam over the extra tensors, in one pass each; steps are in parts of a tensor's root mean square."""
    if not extra:
        return None
    groups = [{"params": [x], "lr": o.extra_lr * _size(x.detach())} for x in extra.values()]
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-15, fused=True)


def _start(name: str, state: State, o: Options) -> _Linear:
    scales = Scales(state.fmt, state.params, o.scale_range, o.tune_parents)
    rounding: Rounding
    if o.method == "tune":
        rounding = FixedRounding(state.fmt, state.codes, state.params)
    else:
        c = cells(state.fmt, state.codes, state.params, state.w.float(), o.trust, name)
        if o.method == "signround":
            rounding = SignRounding(c, o.lr if o.lr is not None else 1 / o.iterations, o.momentum)
        else:
            rounding = SoftRounding(c, o.lr if o.lr is not None else 0.2)
    low = [] if state.low_rank is None else [x.detach().float().clone() for x in state.low_rank]
    return _Linear(state, rounding, scales, low, [Adam(x) for x in low] if o.tune_low_rank else [])


def _gradients(
    run: Run, linears: dict[str, _Linear], others: dict[str, Tensor], x: Tensor, y: Tensor, o: Options, low: bool,
    unit: float, clock: dict[str, float],
) -> tuple[float, list[Tensor]]:  # fmt: skip
    """(training loss, gradients by the decoded weights and then by the extra tensors) on windows x, y [b, T, C]."""
    begin = time.perf_counter()
    leaves: list[Tensor] = []
    weights: dict[str, Tensor] = {}
    for name, linear in linears.items():
        turned = linear.state.effective
        leaf = linear.decoded(torch.bfloat16 if low and turned is None else torch.float32).requires_grad_()
        leaves.append(leaf)
        with torch.enable_grad():
            weights[name] = leaf if turned is None else turned(leaf)
    weights |= others
    leaves += others.values()
    clock["update"] += time.perf_counter() - begin
    begin = time.perf_counter()
    context: Any = torch.autocast(x.device.type, torch.bfloat16) if low else nullcontext()
    with torch.enable_grad():
        with context:
            out = run(weights, x)
        error = _error(out.float() - y, y, o)
        if o.drop:
            error = without_largest(error, o.drop)
        loss = error.mean()
        clock["forward"] += time.perf_counter() - begin
        begin = time.perf_counter()
        gradients = torch.autograd.grad(loss / max(unit, 1e-20), leaves)  # in units of the start: far from underflow
    clock["backward"] += time.perf_counter() - begin
    return float(loss.detach()), list(gradients)


def _error(difference: Tensor, y: Tensor, o: Options) -> Tensor:
    """Squared error by element [b, T, C]."""
    error = difference.square()
    if o.loss == "relative":
        error = error / y.square().mean(-1, keepdim=True).clamp_min(1e-12)
    return error


def without_largest(error: Tensor, fraction: float) -> Tensor:
    """The errors with the largest `fraction` of them as zeros."""
    count = int(error.numel() * fraction)
    if not count:
        return error
    edge = error.detach().flatten().topk(count, sorted=False).values.min()
    return torch.where(error < edge, error, torch.zeros_like(error))


@torch.no_grad()
def _loss(
    run: Run, states: Mapping[str, State], extra: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, windows: list[int],
    o: Options,
) -> float:  # fmt: skip
    """The true loss of stored states: fp32, no element dropped."""
    weights = {name: weight(state) for name, state in states.items()} | dict(extra)
    device = next(iter(states.values())).w.device
    total, count = 0.0, 0
    for i in range(0, len(windows), o.batch):
        chosen = windows[i : i + o.batch]
        y = targets[chosen].to(device).float()
        error = _error(run(weights, inputs[chosen].to(device).float()).float() - y, y, o)
        total, count = total + float(error.double().sum()), count + error.numel()
    value = total / count
    if value != value or value == float("inf"):
        raise OptionError("the block's outputs with these quantized weights are not finite; check the start and its inputs")
    return value


def _split(windows: int, holdout: int | None) -> tuple[list[int], list[int]]:
    """(windows to learn from, windows to judge by)."""
    if holdout is None:
        holdout = windows // 8
    if holdout == 0:
        return list(range(windows)), list(range(windows))
    if holdout >= windows:
        raise OptionError(f"{holdout} held-out windows of {windows} leave none to learn from; give more text or hold out fewer")
    judge = [int((i + 0.5) * windows / holdout) for i in range(holdout)]
    return [i for i in range(windows) if i not in set(judge)], judge


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones here, in both directions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _size(x: Tensor) -> float:
    """Root mean square, not 0."""
    return max(float(x.square().mean().sqrt()), 1e-12)
