"""numfit checkpoints in transformers: a quantizer outside its tree, `quant_method: "numfit"`.

`register()` is called by the import hook of `numfit.integrations`; after `import numfit`, `from_pretrained` on a numfit
checkpoint and `save_pretrained` of the model work. transformers loads what is kept; packed weights are numfit's own
business from the file to the buffer (see numfit.runtime.prepare for why), and an incomplete checkpoint is an error.

Without `import numfit` transformers only warns that it does not know the method, and returns a model with random
weights. That cannot be prevented from here; the tensors of a numfit file are named so that at least none is mistaken
for another.

This file is imported while transformers itself still is, right after its registry: only the few modules that the
registry needs may be imported at its top.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from numfit.checkpoint.packed import config_formats
from numfit.errors import CheckpointError, OptionError
from numfit.runtime.modules import activations_when_loaded, decode_model, packed_modules
from numfit.runtime.prepare import Plan, fill, prepare, unwatch, watch

METHOD = "numfit"


class NumfitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a numfit checkpoint, kept as it is in config.json (docs/format.md)."""

    def __init__(self, **entries: Any) -> None:
        entries.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum knows only its own
        self.__dict__.update(deepcopy(entries))


class NumfitQuantizer(HfQuantizer):
    """Loads and saves numfit checkpoints; never quantizes (that is `numfit.quantize`, which needs no model)."""

    requires_calibration = True  # in transformers' words: cannot be applied to an unquantized checkpoint

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.formats = config_formats({"quantization_config": quantization_config.to_dict()}, Path("config.json"))
        self.plan: Plan | None = None
        self.conversions: list[Any] = []

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> Any:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(
                "a numfit checkpoint is loaded from its directory with .safetensors files, not from a state dict"
            )
        self.plan = prepare(model, self.formats, checkpoint_files)
        watch(model, self.plan)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self.plan is not None
        unwatch(model, self.plan)
        fill(model, self.plan, activations_when_loaded.get())
        self.plan = None
        # state_dict_for_file reverts the names itself, since only it can tell planes from parameters
        self.conversions, model._weight_conversions = getattr(model, "_weight_conversions", None) or [], []
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model._weight_conversions = self.conversions
        return decode_model(model, dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: planes under the names they came from, the rest as transformers would.

        Raises:
            OptionError: a tensor of the file was split or permuted while loading, so that it cannot be written back.
        """
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        kept = dict(model.state_dict())
        packed_tensors: dict[str, Tensor] = {}
        for path, module in packed_modules(model):
            for packed in module._packed.values():
                if packed.home is not module:
                    continue
                for piece in packed.pieces:
                    if not piece.whole:
                        raise OptionError(
                            f"'{piece.source}' was rearranged while loading and cannot be saved as it was; copy the "
                            "checkpoint's directory instead"
                        )
                    for buffer in piece.buffers(packed.dtype):
                        plane = buffer.removeprefix(piece.prefix)  # "_codes", …, or "" for a dense piece
                        packed_tensors[piece.source + plane] = kept.pop(f"{path}.{buffer}" if path else buffer)
        kept = remove_tied_weights_from_state_dict(kept, model)
        model._weight_conversions = self.conversions
        try:
            kept = revert_weight_conversion(model, kept)
        finally:
            model._weight_conversions = []
        return {**kept, **packed_tensors}, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make transformers know `quant_method: "numfit"`. Idempotent."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(NumfitConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(NumfitQuantizer)
