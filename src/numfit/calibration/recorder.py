"""Seeing what reaches a layer's linears, whatever its architecture.

No module is hooked. While the layer runs, every call of `torch.nn.functional.linear` is looked at, and a weight that is one of
the layer's parameters, or one expert's slice of a parameter [E, N, K], is known by its address. So linears, fused ones
and experts in one tensor are all seen by the same few lines, and linears that get the very same tensor are known to
share their input. Gives up: layers that multiply by other means (convolution-like `addmm`); what was not seen is rounded
without statistics, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from numfit.calibration.statistics import Accumulator, Key, Statistics
from numfit.errors import CheckpointError

Seen = Callable[[Key, Tensor], None]


class Watch(TorchFunctionMode):
    """While entered, calls `seen` with each linear's key and input [..., K]."""

    def __init__(self, weights: Mapping[int, tuple[Key, torch.Size]], seen: Seen) -> None:
        super().__init__()
        self.weights = weights
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) >= 2:
            known = self.weights.get(args[1].data_ptr())
            if known is not None and known[1] == args[1].shape:
                self.seen(known[0], args[0])
        return func(*args, **(kwargs or {}))


def weight_addresses(layer: nn.Module, prefix: str) -> dict[int, tuple[Key, torch.Size]]:
    """Address of every weight matrix of a layer, and of every expert's slice → (key, shape)."""
    out: dict[int, tuple[Key, torch.Size]] = {}
    for name, parameter in layer.named_parameters():
        full = f"{prefix}.{name}"
        if parameter.dim() == 2:
            out[parameter.data_ptr()] = ((full, None), parameter.shape)
        elif parameter.dim() == 3:
            for expert in range(len(parameter)):
                out[parameter[expert].data_ptr()] = ((full, expert), parameter.shape[1:])
    return out


class Recorder:
    """Statistics of all linears of one layer, over any number of forward passes.

    Use: `with recorder.watch(): layer(...)`, then `recorder.take()`, for each batch; at last `recorder.finish()`.
    """

    def __init__(
        self, layer: nn.Module, prefix: str, wanted: Container[str], *, double: bool = False, cross: bool = False
    ) -> None:
        """Watch the parameters of `layer` (called `prefix` in its model) whose full names are in `wanted`."""
        addresses = weight_addresses(layer, prefix).items()
        self.weights = {address: value for address, value in addresses if value[0][0] in wanted}
        self.double, self.cross = double, cross
        self.inputs: dict[Key, Tensor] = {}  # of the pass under way; holding them keeps their addresses apart
        self.originals: dict[Key, Tensor] = {}
        self.group: dict[Key, Key] = {}  # a linear → the first one that is fed the same tensor
        self.sums: dict[Key, Accumulator] = {}

    def watch(self) -> Watch:
        """To be entered around one forward pass of the calibrated stream."""
        return Watch(self.weights, self.inputs.__setitem__)

    def watch_original(self) -> Watch:
        """To be entered around the forward pass of the same tokens in the full-precision stream (for `cross`)."""
        return Watch(self.weights, self.originals.__setitem__)

    def take(self) -> None:
        """Add the inputs of the pass (or pair of passes) just made.

        Raises:
            CheckpointError: NaN or Inf among them; names the linear.
        """
        first: dict[tuple[int, int], Key] = {}  # address and size of an input → the first linear that got it
        places: dict[Key, tuple[int, int]] = {}  # by leader
        for key, x in self.inputs.items():
            if not x.numel():  # of an expert that no token was sent to; all such have the same address
                continue
            place = (x.data_ptr(), x.numel())
            leader = self.group.setdefault(key, first.setdefault(place, key))
            if leader in places:
                if places[leader] != place:
                    raise CheckpointError(
                        f"'{key[0]}' and '{leader[0]}' get the same input for some texts and not for others; such a layer "
                        "cannot be calibrated: quantize without --calibration"
                    )
                continue
            places[leader] = place
            if leader not in self.sums:
                self.sums[leader] = Accumulator(x.shape[-1], x.device, double=self.double, cross=self.cross)
            sums = self.sums[leader]
            sums.add(x, self.originals.get(key) if self.cross else None)
            if sums.tokens and not bool(torch.isfinite(sums.maximum - sums.minimum).all()):
                expert = "" if key[1] is None else f", expert {key[1]}"
                raise CheckpointError(
                    f"the inputs of '{key[0]}'{expert} hold NaN or Inf: the model overflows on this text, or its weights are "
                    "damaged; try another text, and check the model with numfit eval"
                )
        self.inputs.clear()
        self.originals.clear()

    def finish(self) -> dict[Key, Statistics]:
        """Statistics by key; linears that share an input share the object."""
        done = {key: sums.finish() for key, sums in self.sums.items()}
        return {key: done[leader] for key, leader in self.group.items()}
