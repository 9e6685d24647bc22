"""Tiny random models, and numfit checkpoints of them written by hand from the specification of the format.

By hand, so that the runtime is tested against the specification and not against the pipeline that usually writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import numfit
from numfit.integrations import install_lazy_transformers_hook

install_lazy_transformers_hook()

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),  # biases
    "gemma3": ("Gemma3TextConfig", {}),  # a subclass of nn.Embedding that scales; tied
    "phi3": ("Phi3Config", {}),  # qkv and gate_up fused in the file already
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),  # Conv1D: neither Linear nor Embedding
    "olmo": ("OlmoConfig", {}),  # norms without weights: no parameter is left
    "minimax": ("MiniMaxConfig", {"num_local_experts": 3}),  # persistent buffers that look like matrices
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),  # a tensor per expert in the file, fused in the model
    "gpt-neox": ("GPTNeoXConfig", {"tie_word_embeddings": False}),  # fused qkv, biases, attention and network in parallel
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4}),  # 3-D experts with biases in the file
}
IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))

Rule = Callable[[str, str | None], str | None]


@cache
def transformers() -> Any:
    """The library, without its chatter."""
    import transformers as library

    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def build(kind: str, path: Path, **changed: Any) -> Any:
    """A random model of a kind, saved as a Hugging Face directory; `changed`: of its configuration."""
    library = transformers()
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    model = library.AutoModelForCausalLM.from_config(getattr(library, name)(**{**COMMON, **extra, **changed})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change a directory's single weight file in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a directory's config.json in place."""
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def default_rule(fmt: str, embedding: str) -> Rule:
    """Matrices in `fmt`, embedding and output layer in `embedding`, norms and routers kept."""

    def rule(name: str, _: str | None) -> str | None:
        if "norm" in name or "router" in name or ".gate.weight" in name or "wpe" in name or "_bias" in name:
            return None
        table = "embed" in name or "lm_head" in name or "wte" in name
        return embedding if table else fmt

    return rule


def pack(source: Path, out: Path, fmt: str = "int4-g32", embedding: str = "int8-g32", rule: Rule | None = None) -> Path:
    """Write a numfit checkpoint of `source` to `out`, and beside it `<out>-reference` with the decoded weights.

    Returns:
        The reference, a plain directory.
    """
    reference = out.with_name(out.name + "-reference")
    packed: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        chosen = default_rule(fmt, embedding)(name, None) if tensor.ndim > 1 else None
        chosen = rule(name, chosen) if rule else chosen
        if chosen is None or chosen == "keep":
            packed[name] = decoded[name] = tensor
            continue
        q = numfit.quantize_tensor(tensor, chosen, scale_rule="mse" if numfit.format(chosen).trellis else "absmax")
        packed |= {f"{name}_{plane}": values for plane, values in q.state_dict().items()}
        decoded[name] = q.dequantize().to(tensor.dtype)
        names[name] = chosen
    config = json.loads((source / "config.json").read_text())
    for path, tensors in ((out, packed), (reference, decoded)):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    quantization = {
        "quant_method": "numfit",
        "format_version": 1,
        "formats": {name: numfit.format(name).to_json() for name in sorted(set(names.values()))},
        "tensors": names,
    }
    edit_config(out, lambda c: c.update(quantization_config=quantization))
    return reference


def logits(model: Any) -> Tensor:
    """Of the fixed batch `IDS`: [2, 11, vocabulary]."""
    with torch.no_grad():
        return model(IDS).logits


def from_reference(path: Path, **options: Any) -> Any:
    """The plain model, its experts applied in the same order as ours."""
    return transformers().AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager", **options)


def words(count: int, seed: int = 5) -> str:
    """A text of so many tokens for the tokenizer of `save_tokenizer`."""
    return " ".join(f"w{i}" for i in torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def save_tokenizer(path: Path, chat_template: str | None = None) -> None:
    """A word-level tokenizer for the tiny models: `<pad> <s> </s> w3 … w95`, split at spaces, with a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 96))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )
    if chat_template:
        fast.chat_template = chat_template
    fast.save_pretrained(path)
