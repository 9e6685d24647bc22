"""A model's decoder layers, one in memory at a time.

The model is built by transformers with all its parameters on the meta device; the weights of one layer are read from the
source, brought to their places (checkpoint/index.py knows how the two differ) and let go again. What a layer is called
with beside the hidden states (masks, rotary tables) is not rebuilt here but caught: the model's own forward runs once
with layers that do nothing but note their arguments. So there is no file per architecture. Gives up: models whose
layers get something that depends on the tokens, beside the hidden states; they are refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numfit.calibration.recorder import Recorder
from numfit.calibration.statistics import Key
from numfit.checkpoint.index import Target, map_tensors
from numfit.checkpoint.source import DirectorySource, Source
from numfit.errors import CheckpointError, require
from numfit.structure.modules import decoder_layers


class Blocks:
    """The decoder of a source.

    Attributes:
        prefixes: name of each layer's module in the model, in order.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, source: Source, config: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Build the model without weights.

        Raises:
            MissingExtraError: transformers is not installed. CheckpointError: a model that cannot be walked layer by layer.
        """
        self.source, self.device = source, torch.device(device)
        self.model, self.tokenizer = _skeleton(source, config)
        layers = decoder_layers(self.model)
        if not layers:
            raise CheckpointError(
                f"no decoder layers were found in {type(self.model).__name__}, so it cannot be calibrated layer by layer; "
                "quantize it without --calibration"
            )
        self.prefixes = [name for name, _ in layers]
        self.layers = [layer for _, layer in layers]
        leads = {name: tuple(source.info(name).shape[:-1]) for name in source.names()}
        self.targets = {t.name: t for t in map_tensors(self.model, leads, frozenset(leads)).targets}
        self._rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # what each layer gets beside the hidden states

    def __len__(self) -> int:
        return len(self.layers)

    # -- weights ------------------------------------------------------------------------------------------------------

    def targets_of(self, k: int) -> list[Target]:
        """The parameters of layer k."""
        return [target for name, target in self.targets.items() if name.startswith(self.prefixes[k] + ".")]

    def sources_of(self, k: int) -> list[str]:
        """Names of the source's tensors that layer k is made of."""
        return list(dict.fromkeys(run.source for target in self.targets_of(k) for run in target.runs))

    def places(self, k: int) -> dict[str, list[Key]]:
        """Where each of layer k's source tensors is multiplied: one key for a matrix, one an expert for [E, N, K]."""
        out: dict[str, list[Key]] = {}
        for target in self.targets_of(k):
            if target.transposed or len(target.shape) not in (2, 3):
                continue
            per_expert = target.shape[-2]
            offset = 0
            for run in target.runs:
                if len(target.shape) == 2:
                    out.setdefault(run.source, []).append((target.name, None))
                else:
                    first, last = offset // per_expert, (offset + run.count - 1) // per_expert
                    out.setdefault(run.source, []).extend((target.name, expert) for expert in range(first, last + 1))
                offset += run.count
        return out

    def read(self, k: int) -> dict[str, Tensor]:
        """Layer k's tensors by the source's names, in fp32."""
        return {name: self.source.read(name).float() for name in self.sources_of(k)}

    def install(self, k: int, tensors: Mapping[str, Tensor]) -> None:
        """Give layer k's parameters the values of `tensors` (by the source's names; all that `sources_of` names)."""
        self._install(self.targets_of(k), tensors)

    def parameters(self, k: int, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name within layer k → value, of those parameters that `tensors` are part of; `base`: what else they are made of."""
        start, merged = len(self.prefixes[k]) + 1, {**base, **tensors}
        return {
            target.name[start:]: assemble(target, merged).to(self.device)
            for target in self.targets_of(k)
            if any(run.source in tensors for run in target.runs)
        }

    def release(self, k: int) -> None:
        """Let the weights of layer k go."""
        self._release(self.targets_of(k))

    def _install(self, targets: list[Target], tensors: Mapping[str, Tensor]) -> None:
        for target in targets:
            self._set(target.name, assemble(target, tensors).to(self.device))

    def _release(self, targets: list[Target]) -> None:
        for target in targets:
            self._set(target.name, torch.empty(target.shape, device="meta"))

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    # -- forward passes -----------------------------------------------------------------------------------------------

    def embed(self, windows: Tensor, out: Tensor) -> None:
        """The hidden states that enter layer 0: token ids [n, T] → `out` [n, T, C].

        Raises:
            CheckpointError: the layers' other arguments depend on the tokens.
        """
        inside = tuple(prefix + "." for prefix in self.prefixes)
        decoder = getattr(self.model, "base_model", self.model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        wanted = {names[id(p)] for p in decoder.parameters() if id(p) in names}
        outside = [t for name, t in self.targets.items() if not name.startswith(inside) and name in wanted]
        tensors = {run.source: self.source.read(run.source) for target in outside for run in target.runs}
        self._install(outside, {name: tensor.float() for name, tensor in tensors.items()})
        try:
            first: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
            for i in range(len(windows)):
                calls = self._call(decoder, windows[i : i + 1].to(self.device))
                out[i] = _split(calls[0])[0][0]
                others = [_split(call)[1] for call in calls]
                if first is None:
                    first = others
                elif i == 1 and not _equal(first, others):
                    raise CheckpointError(
                        f"the layers of {type(self.model).__name__} are told something about the tokens beside the hidden "
                        "states, so they cannot be run one by one; quantize without --calibration"
                    )
            assert first is not None
            self._rest = first
        finally:
            self._release(outside)

    def _call(self, decoder: nn.Module, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run the decoder with layers that only note their arguments."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            return args[0] if args else kwargs["hidden_states"]

        for layer in self.layers:
            layer.forward = note  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                decoder(input_ids=ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        if len(calls) != len(self.layers):
            raise CheckpointError(
                f"{type(self.model).__name__} runs {len(calls)} of its {len(self.layers)} layers; it cannot be calibrated "
                "layer by layer: quantize without --calibration"
            )
        return calls

    def run(self, k: int, hidden: Tensor) -> Tensor:
        """Layer k on hidden states [b, T, C] from any device, with gradients if they are asked for."""
        return self.run_with(k, {}, hidden)

    def run_with(self, k: int, parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """As `run`, with other values for some parameters, by their names within the layer."""
        args, kwargs = self._rest[k]
        hidden = hidden.to(self.device)
        if "hidden_states" in kwargs:
            kwargs = {**kwargs, "hidden_states": hidden}
        else:
            args = (hidden, *args)
        result = torch.func.functional_call(self.layers[k], dict(parameters), args, kwargs)
        return result if isinstance(result, Tensor) else result[0]


def watch_layer(
    blocks: Blocks, k: int, recorder: Recorder, original: Tensor, other: Tensor | None, out: Tensor | None, cross: bool
) -> None:
    """Run layer k on windows, and record what reaches its linears.

    Args:
        original: hidden states of the original model [n, T, C]. other: those to record, where they are others.
        out: where what the original ones become goes. cross: whether the two are compared.
    """
    with torch.no_grad():
        for i in range(len(original)):
            if other is None or cross or out is not None:
                with recorder.watch() if other is None else recorder.watch_original():
                    result = blocks.run(k, original[i : i + 1])
                if out is not None:
                    out[i] = result[0]
            if other is not None:
                with recorder.watch():
                    blocks.run(k, other[i : i + 1])
            recorder.take()


def assemble(target: Target, tensors: Mapping[str, Tensor]) -> Tensor:
    """A parameter of the model from the source's tensors."""
    parts = []
    for run in target.runs:
        rows = tensors[run.source].reshape(-1, target.row)
        parts.append(rows if run.rows is None else rows[run.rows])
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    if target.transposed:
        return flat.reshape(*target.shape[:-2], target.shape[-1], target.shape[-2]).transpose(-1, -2).contiguous()
    return flat.reshape(target.shape)


def _split(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states of a call, and the call without them."""
    args, kwargs = call
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], (args, {**kwargs, "hidden_states": None})


def _equal(one: Any, other: Any) -> bool:
    """Whether two trees of arguments hold the same values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other)


def _skeleton(source: Source, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(model in eval mode, its parameters on the meta device and its buffers real; tokenizer)."""
    transformers = require("transformers", "hf")
    with tempfile.TemporaryDirectory(prefix="numfit-") as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        home: Path = source.path if isinstance(source, DirectorySource) else directory
        if hasattr(source, "save_tokenizer"):
            source.save_tokenizer(directory)
        try:
            parsed = transformers.AutoConfig.from_pretrained(directory)
            tokenizer = transformers.AutoTokenizer.from_pretrained(home)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"'{source.path}' cannot be calibrated: {str(error).splitlines()[0]}") from None
    with _parameters_on_meta():
        model = transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation="sdpa")
    for module in model.modules():
        inner: Any = getattr(module, "config", None)
        if hasattr(inner, "_experts_implementation"):
            inner._experts_implementation = "eager"  # one expert after the other, each through linear()
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While inside, modules come without memory for their parameters, but with their buffers computed."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
