"""numfit: fit the number type to the numbers.

`import numfit` is light: it brings in neither torch nor transformers until a name that needs them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numfit.version import VERSION as __version__

_HOME = {
    "Format": "numfit.formats",
    "QuantizedTensor": "numfit.formats",
    "format": "numfit.formats",
    "quantize_tensor": "numfit.formats",
    "register": "numfit.formats",
    "plan": "numfit.pipeline",
    "quantize": "numfit.pipeline",
    "load": "numfit.runtime",
    "evaluate": "numfit.evaluation",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from numfit.evaluation import evaluate as evaluate
    from numfit.formats import Format as Format
    from numfit.formats import QuantizedTensor as QuantizedTensor
    from numfit.formats import format as format
    from numfit.formats import quantize_tensor as quantize_tensor
    from numfit.formats import register as register
    from numfit.pipeline import plan as plan
    from numfit.pipeline import quantize as quantize
    from numfit.runtime import load as load


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'numfit' has no attribute '{name}'")


def _install_hook() -> None:
    from numfit.integrations import install_lazy_transformers_hook

    install_lazy_transformers_hook()


_install_hook()  # so that transformers' own from_pretrained reads numfit checkpoints; imports nothing yet
