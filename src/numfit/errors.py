"""Errors meant for users: each message is a sentence that names the thing at fault and says what to do.

The command line prints them without a traceback; anything else that escapes is a bug of numfit's own.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class NumfitError(Exception):
    """Base of every error a user can act on."""


class FormatError(NumfitError):
    """An unknown or impossible format, or numbers that a format cannot hold."""


class CheckpointError(NumfitError):
    """A file or directory that is missing, damaged, or not what it claims to be."""


class OptionError(NumfitError):
    """An option that contradicts another, matches nothing, or cannot apply here."""


class OutOfMemoryError(NumfitError, MemoryError):
    """There is not enough memory for a piece of work; smaller pieces may fit."""


class MissingExtraError(NumfitError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one sentence which extra brings it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the Python package '{module.split('.')[0]}', which is not installed; "
            f"install it with: pip install 'numfit[{extra}]'"
        ) from None
