"""How far along: a bar on a terminal, a plain line now and then where standard error is a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts bytes of the source. Use as a context; `shown=False` says nothing.

    Args:
        title: what is going on.
        total: bytes of all the work.
        done: bytes that an earlier run has finished; not counted into the throughput.
    """

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.done, self.first = title, total, done, done
        self.started = self.spoke = time.monotonic()
        self.plain = shown and not _has_width()
        self.bar: Any = None
        if shown and not self.plain:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt} left {remaining}{postfix}"
            self.bar = tqdm(
                total=total, initial=done, desc=title, unit="B", unit_scale=True, bar_format=layout, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def at(self, name: str) -> None:
        """Say what is being worked on."""
        if self.bar is not None:
            self.bar.set_postfix_str(name)

    def add(self, name: str, nbytes: int) -> None:
        """`nbytes` more are done, lately those of `name`."""
        self.done += nbytes
        if self.bar is not None:
            self.bar.update(nbytes)
        now = time.monotonic()
        if self.plain and now - self.spoke >= EVERY:
            self.spoke = now
            rate = max(1.0, (self.done - self.first) / (now - self.started))
            left = (self.total - self.done) / rate
            share = 100 * self.done / max(1, self.total)
            print(
                f"{self.title}: {share:.0f} %, {rate / 1e6:.0f} MB/s, {left:.0f} s left, {name}",
                file=sys.stderr,
                flush=True,
            )


def _has_width() -> bool:
    """Whether standard error is a terminal that a bar fits on; some pseudo-terminals say that they have no columns."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
