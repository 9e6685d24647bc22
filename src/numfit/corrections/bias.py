"""Corrections of the mean: what rounding shifts on average is taken back by a constant, at no cost in bits to speak of."""

from __future__ import annotations

from torch import Tensor

from numfit.errors import OptionError


def bias_shift(error: Tensor, mean: Tensor) -> Tensor:
    """What to add to a layer's bias so that its mean output is right again: E·mean(x), fp32 [N].

    Args:
        error: W − Ŵ [N, K], all corrections of the weight included.
        mean: of the inputs [K].

    Raises:
        OptionError: sizes that do not fit.
    """
    if error.dim() != 2 or tuple(mean.shape) != (error.shape[1],):
        raise OptionError(f"an error {tuple(error.shape)} needs one mean per input channel, not {tuple(mean.shape)}")
    return (error.double() @ mean.double()).float()


def mean_shift(mean: Tensor, square: Tensor, gate: float = 0.5) -> Tensor:
    """D²Quant's deviation-aware correction: a shift of a norm's output, in the channels where it pays.

    With d = (output in full precision) − (output of the quantized model), a shift by E[d] lowers E[d²] by E[d]². It is made
    where that is at least the share `gate` of E[d²]: a mean that is small against its spread is noise of the calibration text.

    Args:
        mean: E[d] of each channel [K].
        square: E[d²] of each channel [K].

    Returns:
        The shift [K], fp32, 0 where it does not pay: the norm's bias, or by `fold_shift` the biases of what it feeds.

    Raises:
        OptionError: sizes that do not fit, or a gate outside 0 … 1.
    """
    if mean.shape != square.shape:
        raise OptionError(f"means {tuple(mean.shape)} and mean squares {tuple(square.shape)} belong to different channels")
    if not 0 <= gate <= 1:
        raise OptionError(f"the gate is a share from 0 to 1, not {gate}")
    d = mean.double()
    pays = (d.square() >= gate * square.double()) & (d != 0)
    return d.masked_fill(~pays, 0.0).float()


def fold_shift(weight: Tensor, shift: Tensor) -> Tensor:
    """A shift [K] of a layer's input as a shift of its bias [N]: W·shift."""
    return bias_shift(weight, shift)
