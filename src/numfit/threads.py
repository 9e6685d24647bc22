"""How many CPU threads torch uses while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from numfit.errors import OptionError


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads inside the block; None leaves the number alone.

    Raises:
        OptionError: fewer than one.
    """
    import torch  # here, so that the command line can name options without waiting for torch

    if threads is not None and threads < 1:
        raise OptionError(f"--threads must be at least 1, not {threads}")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
