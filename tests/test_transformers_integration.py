"""`from_pretrained` and `save_pretrained` after `import numfit`, and the two traps of a quantizer outside the tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import IDS, KINDS, build, edit_config, from_reference, logits, pack, rewrite, transformers

from numfit.errors import CheckpointError, OptionError
from numfit.integrations import _RegistryFinder, install_lazy_transformers_hook
from numfit.runtime import load, use_kernels
from numfit.runtime.prepare import Plan, unwatch


def from_pretrained(path: Path, **options: Any) -> Any:
    return transformers().AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    build("llama-tied", root / "source")
    pack(root / "source", root / "packed")
    return root / "packed"


def run_python(code: str, *args: object) -> str:
    """What a fresh interpreter prints for `code`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- registration -------------------------------------------------------------------------------------------------


def test_import_numfit_leaves_transformers_alone() -> None:
    code = "import sys, numfit; print(sorted({'transformers', 'torch'} & sys.modules.keys()))"
    assert run_python(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import numfit; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import numfit",
        "import transformers, numfit; from transformers import AutoModelForCausalLM",
    ],
)
def test_from_pretrained_in_any_import_order(imports: str, packed: Path) -> None:
    code = (
        f"import sys\n{imports}\nimport torch\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"print(model(torch.tensor({IDS.tolist()})).logits.double().sum().item())\n"
        "assert type(model.lm_head).__name__ == 'QuantLinear'\n"
    )
    expected = logits(load(packed, tokenizer=False)[0]).double().sum().item()
    assert float(run_python(code, packed)) == pytest.approx(expected, abs=1e-3)


def test_hook_is_idempotent_and_goes_away() -> None:
    transformers().AutoModelForCausalLM  # noqa: B018  imports the registry, if nothing has yet
    for _ in range(2):
        install_lazy_transformers_hook()
    assert not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path)
    from transformers.quantizers import auto

    assert auto.AUTO_QUANTIZER_MAPPING["numfit"].__name__ == "NumfitQuantizer"
    assert type(auto.__spec__.loader).__name__ == "SourceFileLoader"


# -- the same model, by both roads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_again_is_bit_identical(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed", "int4-row")
    model = from_pretrained(tmp_path / "packed")
    expected = logits(model)
    assert torch.equal(expected, logits(load(tmp_path / "packed", tokenizer=False)[0]))
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("packed", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before if before[n].ndim)
    again = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(from_pretrained(tmp_path / "twice")), expected)


def test_state_dict_names_are_those_of_the_file(packed: Path) -> None:
    model = from_pretrained(packed)
    assert model.state_dict().keys() == load_file(packed / "model.safetensors").keys()


def test_reference_in_bfloat16(packed: Path) -> None:
    """Trap 1: `model.to(bfloat16)` would round the rotary frequencies, which loading keeps in fp32."""
    model = from_pretrained(packed, dtype=torch.bfloat16)
    use_kernels(model, "reference")
    plain = from_reference(packed.with_name("packed-reference"), dtype=torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16 and torch.equal(logits(model), logits(plain))


def test_dequantize_and_save_plain(packed: Path, tmp_path: Path) -> None:
    model = from_pretrained(packed)
    use_kernels(model, "reference")
    expected = logits(model)
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    plain = from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), expected) and not hasattr(plain.config, "quantization_config")
    assert type(plain.lm_head) is torch.nn.Linear


def test_saving_what_was_rearranged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import PermuteForRope, WeightConverter

    name = "self_attn.q_proj.weight"
    build("llama", tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache that is patched
    rules = [WeightConverter(name, name, [PermuteForRope(permute_layer_names=["q_proj"])])]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", rules)
    model = from_pretrained(tmp_path / "packed")
    with pytest.raises(OptionError, match=r"q_proj.weight' was rearranged .* copy the checkpoint's directory"):
        model.save_pretrained(tmp_path / "saved")


# -- never a randomly initialised weight -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", ["model.layers.0.mlp.up_proj.weight_scale", "model.embed_tokens.weight_codes", "model.norm.weight"]
)
def test_missing_tensor(lost: str, packed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("config.json", "model.safetensors"):
        (broken / file).write_bytes((packed / file).read_bytes())
    rewrite(broken, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=lost):
        from_pretrained(broken)


def test_unexpected_tensor(packed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("config.json", "model.safetensors"):
        (broken / file).write_bytes((packed / file).read_bytes())
    rewrite(broken, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_member": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_member"):
        from_pretrained(broken)


def test_unknown_version(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((packed / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    edit_config(tmp_path, lambda config: config["quantization_config"].update(format_version=99))
    with pytest.raises(CheckpointError, match="format_version 99"):
        from_pretrained(tmp_path)


def test_no_packed_tensor_can_be_mistaken_for_a_parameter(packed: Path) -> None:
    """Trap 2: without `import numfit`, not one packed tensor may end up in a plain model by its name."""
    plain = from_reference(packed.with_name("packed-reference")).state_dict().keys()
    stored = load_file(packed / "model.safetensors").keys()
    planes = {name for name in stored if not name.endswith("norm.weight")}
    assert planes and not planes & plain


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    build("llama", tmp_path / "source")
    with pytest.raises(ValueError, match="pre-quantized"):
        from_pretrained(tmp_path / "source", quantization_config=AUTO_QUANTIZATION_CONFIG_MAPPING["numfit"]())


def test_a_transformers_that_tells_nothing_is_refused() -> None:
    class Silent:
        _adjust_missing_and_unexpected_keys = None

    model = Silent()
    model._adjust_missing_and_unexpected_keys = lambda info: None
    with pytest.raises(CheckpointError, match="does not tell"):
        unwatch(model, Plan({}, {}))
