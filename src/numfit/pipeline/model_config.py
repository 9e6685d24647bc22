"""What the source's config.json says about its weights, and what ours must say: quantized already? tied?"""

from __future__ import annotations

from typing import Any

from numfit.checkpoint.safetensors_file import same_bytes
from numfit.checkpoint.source import DirectorySource, Source
from numfit.errors import OptionError
from numfit.pipeline.roles import is_packed, role


def checked_config(source: Source) -> tuple[dict[str, Any], list[str]]:
    """The source's configuration without a stale quantization_config.

    Raises:
        OptionError: the source is quantized already.
    """
    config = dict(source.config())
    packed = [name for name in source.names() if is_packed(source.info(name))]
    if not isinstance(source, DirectorySource):
        config.setdefault("torch_dtype", "float32")  # a GGUF file is read as fp32
    quantization = config.pop("quantization_config", None)
    method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else None
    if method == "numfit":
        raise OptionError(
            f"'{source.path}' is quantized by numfit already, and quantizing twice only adds errors; "
            "quantize its source, or turn it into a plain model first: numfit convert"
        )
    if packed:
        by = f" with {method}" if method else ""
        raise OptionError(
            f"'{source.path}' is quantized already{by} (it holds '{packed[0]}'); "
            "give the unquantized model, or dequantize it first"
        )
    if quantization is None:
        return config, []
    return config, [f"config.json names {method}, but the weights are plain numbers; that quantization_config is left out"]


def untie(source: Source, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Handle an output head stored beside the embedding it is tied to: (config, dropped name → reason, warnings).

    transformers ties only where the config says so, and unties when both are there and differ; it looks for the
    embedding's name first. So an equal head is dropped, and a differing one is written with the config corrected.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    if not (config.get("tie_word_embeddings") or (text and text.get("tie_word_embeddings"))):
        return config, {}, []
    judged = {name: role(source.info(name)).kind for name in source.names()}
    heads = [name for name, kind in judged.items() if kind == "head"]
    inputs = [name for name, kind in judged.items() if kind == "embedding" and "per_layer" not in name]
    if len(heads) != 1 or len(inputs) != 1 or not isinstance(source, DirectorySource):
        return config, {}, []
    head, table = source.info(heads[0]), source.info(inputs[0])
    if same_bytes(source.path, head, table):
        return config, {head.name: f"tied: equals '{table.name}', written once"}, []
    config = {**config, "tie_word_embeddings": False}
    if text and "tie_word_embeddings" in text:
        config["text_config"] = {**text, "tie_word_embeddings": False}
    return (
        config,
        {},
        [f"config.json ties '{head.name}' to '{table.name}', but they differ; both are written and untied"],
    )
