"""The calibrated walk: decoder layer after decoder layer, each solved with what the text does to its inputs.

    hidden states ─→ layer k as it was ─→ statistics ─→ solver ─→ (reconstruction) ─→ planes of layer k, in a file
         └────────────────────────────→ hidden states that enter layer k+1

One layer's weights and statistics are in memory, or those of the few that are learned together; hidden states lie in files
(calibration/streams.py). A finished layer is a file of planes that appears in one step, and of layers that belong together the
first one appears last, so a killed run goes on with what follows. The tensor-by-tensor walk (walk.py) then
writes the checkpoint and takes from here what has been solved; what is no decoder layer (embeddings, head) it rounds as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numfit.calibration import Blocks, Key, Recorder, Statistics, Stream, load_statistics, save_statistics, watch_layer
from numfit.checkpoint.packed import plane_name
from numfit.checkpoint.safetensors_file import DTYPES
from numfit.checkpoint.source import Source
from numfit.corrections import bias_shift
from numfit.errors import CheckpointError, NumfitError
from numfit.pipeline.kept import claim
from numfit.pipeline.learn import Run, learn, learn_in_turn
from numfit.pipeline.linear import FEW, Layer, Solved, finish, round_only, solve_linear
from numfit.pipeline.partial import IDENTITY, LAYERS
from numfit.pipeline.planning import Plan, PlannedTensor
from numfit.pipeline.progress import Progress
from numfit.pipeline.recipe import Parts
from numfit.pipeline.results import Calibration, Results
from numfit.pipeline.rewrite import rewrite_layer
from numfit.pipeline.shares import best_share, relative_distance
from numfit.structure import decoder_map
from numfit.text import calibration_windows, check_windows


class Walk:
    """The state of a calibrated walk; `run` does it."""

    def __init__(self, source: Source, plan: Plan, task: Calibration, partial: Path, shown: bool) -> None:
        parts = task.parts
        self.source, self.plan, self.parts, self.shown = source, plan, parts, shown
        self.rule = plan.recipe["scale_rule"]
        self.directory = partial / LAYERS
        self.directory.mkdir(exist_ok=True)
        self.results = Results(self.directory)
        self.blocks = Blocks(source, plan.config, task.device)
        self.windows, self.notes = calibration_windows(
            self.blocks.tokenizer, task.text, parts.windows, parts.context, str(plan.config.get("model_type", ""))
        )
        check_windows(self.windows, self.blocks.model.config.get_text_config(), parts.hold_out)
        self.watched = len(self.windows) - parts.hold_out
        self.statistics = task.statistics
        self.planned = {tensor.name: tensor for tensor in plan.tensors}
        self.decoder = decoder_map(source.names(), plan.config) if parts.transform != "none" else None
        width = self.blocks.model.config.get_text_config().hidden_size
        shape = (len(self.windows), self.windows.shape[1], width)
        self.original = Stream(self.directory, "original", shape)
        self.quantized = Stream(self.directory, "quantized", shape) if parts.needs_quantized else None
        self.streams = [self.original, *([self.quantized] if self.quantized else [])]
        if self.statistics is not None:
            claim(self.statistics, source, task.recipe["calibration"], self.windows)
            if not parts.needs_quantized and parts.transform == "none" and all(map(self._kept, range(len(self.blocks)))):
                self.streams = []  # everything is known already: no layer need run
        tokens = self.windows[: self.watched].numel()
        widest = max((t.shape[-1] for t in plan.quantized if t.role in ("linear", "experts")), default=0)
        if tokens < widest:
            self.notes.append(
                f"the text gives {tokens} tokens, fewer than the {widest} input channels of the widest layer: its second "
                f"moments are singular; {8 * widest} tokens or more are better"
            )

    def run(self) -> Results:
        """Solve every layer that is not solved yet."""
        count = len(self.blocks)
        first = self._resume()
        sizes = [sum(self.source.info(n).nbytes for n in self.blocks.sources_of(k)) for k in range(count)]
        with Progress("calibrating and solving", sum(sizes), sum(sizes[:first]), self.shown) as bar:
            if first < count and self.streams:
                self._embed(first)
            for k in range(first, count, self.parts.span):
                together = range(k, min(k + self.parts.span, count))
                bar.at(self.blocks.prefixes[k])
                self._layers(together)
                bar.add(self.blocks.prefixes[together[-1]], sum(sizes[j] for j in together))
        for stream in self.streams:
            stream.drop_before(count + 1)
        self.results.notes[:0] = self.notes
        self.results.tokens = self.windows[: self.watched].numel()
        return self.results

    def _resume(self) -> int:
        """The first layer to solve: all before it are finished, and the hidden states that enter it are sound."""
        k, said = 0, None
        while k < len(self.blocks) and (found := self.results.take_up(k)) is not None:
            k, said = k + 1, found
        if k in (0, len(self.blocks)):
            return k
        assert said is not None
        for stream in self.streams:
            if not stream.path(k).is_file() or stream.seal(k) != said["streams"].get(stream.name):
                if self.shown:
                    print("the unfinished work is damaged; beginning again", file=sys.stderr, flush=True)
                self.results = Results(self.directory)
                return 0
        return k

    def _embed(self, first: int) -> None:
        """Run what comes before the layers; also on a resumed run, since the layers' other arguments come from there."""
        windows = self.windows if first == 0 else self.windows[:2]
        target = self.original.open(0, new=True) if first == 0 else torch.empty(len(windows), *self.original.shape[1:])
        self.blocks.embed(windows, target)
        if first == 0 and self.quantized is not None:
            self.quantized.open(0, new=True).copy_(target)

    # -- layers ---------------------------------------------------------------------------------------------------------

    def _layers(self, ks: Sequence[int]) -> None:
        """Solve neighbouring layers, learn them as one where that is asked for, and write them."""
        layers = []
        for k in ks:
            layers.append(self._solved(k))
            if k != ks[-1]:  # the next one's inputs until these are learned
                self._install(layers[-1], {item.name: finish(item).dequantize() for item in layers[-1].solved})
                self._forward_quantized(k)
                self.blocks.install(k, layers[-1].tensors)  # lest decoded weights stay in memory
        if self.parts.reconstruct not in ("none", "progressive"):
            with self.results.timed("learning"):
                self._learn(layers)
        files = [self._finished(layer) for layer in layers]
        end = ks[-1] + 1
        seals = {stream.name: stream.seal(end) for stream in self.streams} if end < len(self.blocks) else {}
        for k, (planes, said) in reversed(list(zip(ks, files))):
            self.results.write(k, planes, {**said, "streams": seals})
        for k in ks:
            self.blocks.release(k)
            self.results.take_up(k)
        for stream in self.streams:
            stream.drop_before(end)

    def _solved(self, k: int) -> Layer:
        """Read, watch, rewrite and solve a layer."""
        blocks = self.blocks
        tensors = blocks.read(k)
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"tensor '{name}' holds NaN or Inf; the model is damaged, get a sound copy")
        mine = [self.planned[name] for name in tensors if self.planned[name].format is not None]
        blocks.install(k, tensors)
        names = {tensor.name for tensor in mine}
        timed = self.results.timed
        with timed("statistics"):
            statistics = self._statistics(k, names, k == len(blocks) - 1)
        notes: list[str] = []
        rewritten: dict[str, Tensor] = {}
        if self.parts.transform != "none" and mine:
            with timed("solving"):
                rewritten = self._transform(k, tensors, names, statistics)
            rewritten = {name: self._as_stored(name, tensor) for name, tensor in rewritten.items()}
            tensors |= rewritten
            blocks.install(k, tensors)
            with timed("statistics"):
                statistics = self._gather(k, names)
        if self.parts.reconstruct == "progressive":
            with timed("learning"):
                solved = self._in_turn(k, mine, tensors, statistics, notes)
        else:
            with timed("solving"):
                solved = self._solve_by_share(k, mine, tensors, statistics, notes)
        return Layer(k, tensors, mine, rewritten, solved, notes)

    def _learn(self, layers: list[Layer]) -> None:
        """Learn what is solved of neighbouring layers against what they make, in full precision, of the text."""
        runs = [self._runner(layer.k, layer.tensors) for layer in layers]

        def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            for one in runs:
                hidden = one(weights, hidden)
            return hidden

        solved = [item for layer in layers for item in layer.solved]
        inputs, targets = self._inputs_and_targets(layers[0].k, layers[-1].k + 1)
        watched = slice(self.watched)
        after = learn(run, solved, inputs[watched], targets[watched], self.parts, self.blocks.device)
        learned = {item.name: item for item in after}
        for layer in layers:
            layer.solved = [learned[item.name] for item in layer.solved]

    def _finished(self, layer: Layer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Pack a layer and move the quantized stream on: what its file holds, and what that says of itself."""
        tensors, planes, effective = layer.tensors, dict[str, Tensor](), dict[str, Tensor]()
        errors: dict[str, float] = {}
        for item in layer.solved:
            packed = finish(item)
            weight = packed.dequantize()
            errors[item.name] = _relative(tensors[item.name], weight)
            planes |= {plane_name(item.name, plane): value for plane, value in packed.state_dict().items()}
            effective[item.name] = weight
            layer.notes += item.notes
            bias = item.name.removesuffix("weight") + "bias"
            if self.parts.bias_correction and bias in tensors and item.mean is not None:
                shifted = tensors[bias] + bias_shift(tensors[item.name] - weight, item.mean)
                tensors[bias] = layer.rewritten[bias] = self._as_stored(bias, shifted)
        kept = {name: self.planned[name] for name in layer.rewritten if self.planned[name].format is None}
        planes |= {name: layer.rewritten[name].to(DTYPES[tensor.dtype]) for name, tensor in kept.items()}
        if layer.k < len(self.blocks) - 1 and self.quantized is not None:
            self._install(layer, effective)
            self._forward_quantized(layer.k)
        return planes, {"errors": errors, "rewritten": list(kept), "notes": layer.notes}

    def _install(self, layer: Layer, effective: Mapping[str, Tensor]) -> None:
        """Give a layer the weights that its codes stand for."""
        self.blocks.install(layer.k, {**layer.tensors, **effective})

    def _forward_quantized(self, k: int) -> None:
        """The hidden states of the model quantized so far through layer k as it is now."""
        assert self.quantized is not None
        with self.results.timed("statistics"):
            self._forward(k, self.quantized)

    def _forward(self, k: int, stream: Stream) -> None:
        """Hidden states through layer k as it is now."""
        hidden, out = stream.open(k), stream.open(k + 1, new=True)
        with torch.no_grad():
            for i in range(len(hidden)):
                out[i] = self.blocks.run(k, hidden[i : i + 1])[0]

    def _statistics(self, k: int, names: set[str], last: bool) -> dict[Key, Statistics]:
        """Statistics of layer k's linears; the original stream moves on to layer k+1 by the way."""
        parts = self.parts
        move_on = not last or parts.reconstruct != "none" or parts.hold_out > 0
        if self.statistics is None:
            return self._gather(k, names, move_on=move_on)
        if kept := self._kept(k):
            if move_on and self.streams:
                self._forward(k, self.original)
            return load_statistics(kept)
        found = self._gather(k, set(self.blocks.sources_of(k)), move_on=move_on)  # another run may keep other tensors
        save_statistics(self.statistics / f"{k:05d}.safetensors", found)
        return found

    def _kept(self, k: int) -> Path | None:
        """The file of layer k's statistics that an earlier run has kept."""
        path = self.statistics / f"{k:05d}.safetensors" if self.statistics else None
        return path if path is not None and path.is_file() else None

    def _gather(
        self, k: int, names: set[str], *, move_on: bool = False, quantized: bool = False
    ) -> dict[Key, Statistics]:
        """Statistics of layer k as it is now.

        Args:
            move_on: the original stream moves on to layer k+1 by the way.
            quantized: take the inputs of the model quantized so far, whatever the recipe says.
        """
        blocks, cross = self.blocks, self.parts.needs_cross
        wanted = {target.name for target in blocks.targets_of(k) if any(run.source in names for run in target.runs)}
        recorder = Recorder(blocks.layers[k], blocks.prefixes[k], wanted, cross=cross)
        original = self.original.open(k)
        quantized = quantized or cross or self.parts.propagate == "quantized"
        other = self.quantized.open(k) if self.quantized and quantized else None
        out = self.original.open(k + 1, new=True) if move_on else None
        watched = slice(self.watched)
        watch_layer(blocks, k, recorder, original[watched], None if other is None else other[watched], out, cross)
        if out is not None:
            with torch.no_grad():
                for i in range(self.watched, len(original)):
                    out[i] = blocks.run(k, original[i : i + 1])[0]
        return recorder.finish()

    def _transform(
        self, k: int, tensors: dict[str, Tensor], names: set[str], statistics: Mapping[Key, Statistics]
    ) -> dict[str, Tensor]:
        """The tensors of layer k that the recipe's rewrites change; `names`: of those that are quantized."""
        assert self.decoder is not None
        places = {name: keys[0] for name, keys in self.blocks.places(k).items() if name in names and len(keys) == 1}
        known = {name.removesuffix(".weight"): statistics[key] for name, key in places.items() if key in statistics}
        quantized = {name.removesuffix(".weight"): f for name in tensors if (f := self.planned[name].format) is not None}
        return rewrite_layer(self.parts.transform, self.decoder, k, tensors, known, quantized, self.rule)

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A changed tensor with the values that the checkpoint will hold, where it is not quantized.

        Raises:
            CheckpointError: they are not finite.
        """
        if self.planned[name].format is None:
            tensor = tensor.to(DTYPES[self.planned[name].dtype]).float()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"tensor '{name}' would hold NaN or Inf as {self.planned[name].dtype} after the transform or bias correction; "
                "leave that out, or convert the model to BF16 or F32 first"
            )
        return tensor

    def _solve(
        self, k: int, mine: list[PlannedTensor], tensors: Mapping[str, Tensor], statistics: Mapping[Key, Statistics],
        notes: list[str], parts: Parts | None = None,
    ) -> list[Solved]:  # fmt: skip
        places = self.blocks.places(k)
        solved = []
        for tensor in mine:
            assert tensor.format is not None
            rows = [(key, statistics.get(key)) for key in places.get(tensor.name, [])]
            w = tensors[tensor.name]
            k_in = tensor.shape[-1]
            known = [stats for _, stats in rows if stats is not None and stats.tokens >= FEW and len(stats.mean) == k_in]
            if not rows or len(known) < len(rows):
                seen = min((stats.tokens if stats is not None else 0 for _, stats in rows), default=0)
                expert = any(key[1] is not None for key, _ in rows)
                why = f"one of its experts saw {seen} tokens" if expert else f"{seen} tokens were seen to reach it"
                notes.append(f"'{tensor.name}' was rounded without statistics: {why}, {FEW} are needed")
                solved.append(round_only(tensor.name, w, tensor.format, self.rule))
                continue
            solved.append(solve_linear(tensor.name, w, known, tensor.format, parts or self.parts, self.rule))
        return solved

    def _solve_by_share(
        self, k: int, mine: list[PlannedTensor], tensors: Mapping[str, Tensor], statistics: Mapping[Key, Statistics],
        notes: list[str],
    ) -> list[Solved]:  # fmt: skip
        """Solve a layer; where windows are held out, with the share of retargeting that is best there."""
        differs = any(stats.cross is not None and bool(stats.cross.any()) for stats in statistics.values())
        if not self.parts.hold_out or not differs:  # layer 0 sees the same in both streams
            return self._solve(k, mine, tensors, statistics, notes)

        def distance(weights: Mapping[str, Tensor]) -> float:
            inputs, targets = (x[self.watched :] for x in self._inputs_and_targets(k, k + 1))
            run = self._runner(k, tensors)
            with torch.no_grad():
                each = [relative_distance(run(weights, x[None]).cpu(), y[None]) for x, y in zip(inputs, targets)]
            return sum(each) / len(each)

        def solve(parts: Parts, told: list[str]) -> list[Solved]:
            return self._solve(k, mine, tensors, statistics, told, parts)

        solved, told = best_share(self.parts, solve, distance, self.blocks.prefixes[k])
        notes += told
        return solved

    def _runner(self, k: int, base: Mapping[str, Tensor]) -> Run:
        """Layer k with other weights, by the source's names; `base`: what it has."""
        return lambda weights, hidden: self.blocks.run_with(k, self.blocks.parameters(k, weights, base), hidden)

    def _inputs_and_targets(self, k: int, end: int) -> tuple[Tensor, Tensor]:
        """What enters layer k in the model quantized so far, and what enters layer `end` in the original."""
        assert self.quantized is not None
        return self.quantized.open(k), self.original.open(end)

    def _in_turn(
        self, k: int, mine: list[PlannedTensor], tensors: Mapping[str, Tensor], statistics: Mapping[Key, Statistics],
        notes: list[str],
    ) -> list[Solved]:  # fmt: skip
        """Solve linears that share an input together, one such group after the other; what is left learns to make up."""
        places, planned = self.blocks.places(k), {tensor.name: tensor for tensor in mine}
        home = {places[name][0]: name for name in planned if len(places.get(name, [])) == 1 and places[name][0][1] is None}
        groups: dict[int, list[str]] = {}
        for key, stats in statistics.items():  # in the order in which the layer applies them
            if key in home and stats.tokens >= FEW:
                groups.setdefault(id(stats), []).append(home[key])
        named = [name for group in groups.values() for name in group]
        alone = self._solve(k, [tensor for tensor in mine if tensor.name not in named], tensors, statistics, notes)
        base = {**tensors, **{item.name: finish(item).dequantize() for item in alone}}

        def solve(group: Sequence[str], current: Mapping[str, Tensor]) -> list[Solved]:
            current = {name: weight.cpu() for name, weight in current.items()}
            self.blocks.install(k, {**base, **current})
            seen = self._gather(k, set(group), quantized=True)
            return self._solve(k, [planned[name] for name in group], current, seen, notes)

        if not named:
            return alone
        weights = {name: tensors[name] for name in named}
        fmt = planned[named[0]].format
        assert fmt is not None
        learned = learn_in_turn(
            self._runner(k, base), list(groups.values()), weights, solve, *self._inputs_and_targets(k, k + 1), self.parts,
            fmt.bits, self.blocks.device,
        )
        return [*alone, *learned]


def _relative(w: Tensor, w_hat: Tensor) -> float:
    """Σ(w − ŵ)² / Σw² with six digits."""
    total = float(w.double().square().sum())
    lost = float((w.double() - w_hat.double()).square().sum())
    return float(f"{lost / total:.6g}") if total else 0.0


def solve_layers(source: Source, plan: Plan, task: Calibration, partial: Path, shown: bool) -> Results:
    """Solve every decoder layer of a plan; see the module docstring.

    Args:
        partial: the directory of unfinished work, where finished layers and hidden states go.
    """
    try:
        walk = Walk(source, plan, task, partial, shown)
    except NumfitError:  # nothing is begun: what the message advises shall not be taken for another setting
        if not any((partial / LAYERS).iterdir()):
            (partial / IDENTITY).unlink(missing_ok=True)
        raise
    return walk.run()
