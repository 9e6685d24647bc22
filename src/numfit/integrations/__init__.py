"""Doors to other programs. This file is standard library only: `import numfit` must stay quick.

`install_lazy_transformers_hook` makes `AutoModelForCausalLM.from_pretrained` understand numfit checkpoints without
importing transformers: the quantizer is registered at the moment transformers' own registry gets imported, by whomever,
or at once if that has already happened. transformers offers no entry point for this, hence the import hook; it costs
nothing in programs that never import transformers, and takes itself away once it has done its work.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def install_lazy_transformers_hook() -> None:
    """Register numfit's quantizer with transformers now if it is imported, else as soon as it will be. Idempotent."""
    if REGISTRY in sys.modules:
        importlib.import_module(REGISTRY)  # waits if another thread is in the middle of it
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    """Register; a transformers that is too old or too new must not make `import transformers` itself fail."""
    try:
        importlib.import_module("numfit.integrations.transformers").register()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"numfit could not register with this version of transformers ({error}), so numfit checkpoints cannot be "
            "loaded; install one that numfit supports: pip install 'numfit[hf]'",
            stacklevel=2,
        )


class _RegistryFinder(MetaPathFinder):
    """Finds the registry module like everybody else, but with a loader that registers numfit after running it."""

    searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY or self.searching:
            return None
        self.searching = True  # the search below comes by here again
        try:
            spec = find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, finder: _RegistryFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # leave no trace for whoever inspects the module
        module.__loader__ = self.loader
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)  # its work is done; had the import failed, it would wait for the next
        _register()
