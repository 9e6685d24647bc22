"""Devices by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numfit.errors import OptionError

if TYPE_CHECKING:
    import torch


def as_device(device: torch.device | str) -> torch.device:
    """A device of this machine.

    Raises:
        OptionError: there is none of this name, or this PyTorch was not built for it.
    """
    import torch  # here, so that the command line can name options without waiting for torch

    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for the device
        lines = str(error).strip().splitlines()
        raise OptionError(
            f"cannot use the device '{device}': {lines[0] if lines else type(error).__name__}; "
            "leave it out for the CPU, or install a PyTorch that has this device"
        ) from None
    return place
