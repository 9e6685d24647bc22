"""Statistics and hidden states of layers taken one at a time, against those of the whole model with hooks on its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, save_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from numfit.calibration import Blocks, Recorder, Statistics, Stream, load_statistics, save_statistics
from numfit.calibration.statistics import Accumulator
from numfit.checkpoint.source import open_source
from numfit.errors import CheckpointError, OptionError
from numfit.text import calibration_windows

KINDS = ["llama", "llama-tied", "qwen2", "gemma3", "phi3", "mixtral", "gpt-neox"]


def blocks_of(kind: str, path: Path) -> tuple[Any, Blocks, Tensor]:
    """(whole model, its blocks, token windows [3, 12])."""
    model = build(kind, path)
    save_tokenizer(path)
    source = open_source(path)
    blocks = Blocks(source, source.config())
    return model, blocks, torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_one_at_a_time_are_the_whole_model(kind: str, tmp_path: Path) -> None:
    model, blocks, windows = blocks_of(kind, tmp_path / "model")
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        wanted = model(windows, output_hidden_states=True).hidden_states
    norm = next(m for n, m in model.named_modules() if n.rpartition(".")[2] in ("norm", "final_layer_norm"))
    hidden = torch.empty(3, 12, 64)
    blocks.embed(windows, hidden)
    torch.testing.assert_close(hidden, wanted[0], rtol=0, atol=0)
    with torch.no_grad():
        for k in range(len(blocks)):
            blocks.install(k, blocks.read(k))
            hidden = torch.cat([blocks.run(k, hidden[i : i + 1]) for i in range(3)])
            blocks.release(k)
            assert all(p.device.type == "meta" for p in blocks.layers[k].parameters())
            last = k == len(blocks) - 1  # of the last one transformers shows what its final norm makes of it
            torch.testing.assert_close(norm(hidden) if last else hidden, wanted[k + 1], rtol=1e-5, atol=1e-5)


def watched(model: nn.Module, windows: Tensor) -> dict[str, list[Tensor]]:
    """Inputs of every nn.Linear, by the name of its weight."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            seen[f"{name}.weight"] = into = []
            module.register_forward_hook(lambda _m, args, _out, into=into: into.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3", "gpt-neox"])
def test_statistics_are_those_of_hooks_on_the_modules(kind: str, tmp_path: Path) -> None:
    model, blocks, windows = blocks_of(kind, tmp_path / "model")
    seen = watched(model, windows)
    hidden = torch.empty(3, 12, 64)
    blocks.embed(windows, hidden)
    found = {}
    for k in range(len(blocks)):
        blocks.install(k, blocks.read(k))
        recorder = Recorder(blocks.layers[k], blocks.prefixes[k], set(blocks.targets))
        with torch.no_grad():
            for i in range(3):
                with recorder.watch():
                    hidden[i] = blocks.run(k, hidden[i : i + 1])[0]
                recorder.take()
        found |= recorder.finish()
    inside = {name for name in seen if ".layers." in name}
    assert {name for name, _ in found} == inside
    for name in inside:
        x = torch.cat(seen[name]).double()
        stats = found[(name, None)]
        assert stats.tokens == 36
        torch.testing.assert_close(stats.h.double(), 2 / 36 * x.T @ x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.mean_square.double(), x.square().mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.absmax.double(), x.abs().amax(0), rtol=1e-4, atol=1e-5)
    if kind in ("llama", "qwen2"):
        one = "model.layers.1.self_attn."
        assert found[(one + "q_proj.weight", None)] is found[(one + "v_proj.weight", None)]
        assert found[("model.layers.1.mlp.gate_proj.weight", None)] is found[("model.layers.1.mlp.up_proj.weight", None)]
        assert found[(one + "q_proj.weight", None)] is not found[(one + "o_proj.weight", None)]


def test_experts_in_one_tensor_have_statistics_of_their_own(tmp_path: Path) -> None:
    model, blocks, windows = blocks_of("mixtral", tmp_path / "model")
    hidden = torch.empty(3, 12, 64)
    blocks.embed(windows, hidden)
    blocks.install(0, blocks.read(0))
    recorder = Recorder(blocks.layers[0], blocks.prefixes[0], set(blocks.targets))
    with torch.no_grad():
        for i in range(3):
            with recorder.watch():
                blocks.run(0, hidden[i : i + 1])
            recorder.take()
    found = recorder.finish()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = [found[(name, e)].tokens for e in range(3) if (name, e) in found]
    assert sum(experts) == 36 * model.config.num_experts_per_tok
    # the router's own choice, recomputed
    layer = model.model.layers[0]
    picked: list[Tensor] = []
    layer.mlp.register_forward_hook(lambda _m, args, _out: picked.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    x = torch.cat(picked)
    top = F.linear(x, layer.mlp.gate.weight).softmax(-1).topk(model.config.num_experts_per_tok, -1).indices
    for expert in range(3):
        mine = x[(top == expert).any(-1)].double()
        torch.testing.assert_close(found[(name, expert)].h.double(), 2 / len(mine) * mine.T @ mine, rtol=1e-4, atol=1e-5)


def test_cross_term() -> None:
    generator = torch.Generator().manual_seed(0)
    x, original = torch.randn(2, 3, 7, 5, generator=generator)
    for double in (False, True):
        sums = Accumulator(5, torch.device("cpu"), double=double, cross=True)
        for i in range(3):
            sums.add(x[i], original[i])
        stats = sums.finish()
        flat, other = x.reshape(-1, 5).double(), original.reshape(-1, 5).double()
        assert stats.cross is not None
        torch.testing.assert_close(stats.cross.double(), 2 / 21 * (other - flat).T @ flat, rtol=1e-5, atol=1e-6)


def test_statistics_round_trip_and_share(tmp_path: Path) -> None:
    sums = Accumulator(4, torch.device("cpu"))
    sums.add(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)))
    one, other = sums.finish(), Accumulator(3, torch.device("cpu")).finish()
    save_statistics(tmp_path / "s", {("a", None): one, ("b", None): one, ("c", 2): other})
    back = load_statistics(tmp_path / "s")
    assert back[("a", None)] is back[("b", None)] and back[("c", 2)].tokens == 0
    assert torch.equal(back[("a", None)].h, one.h) and back[("a", None)].tokens == 9
    assert isinstance(back[("a", None)], Statistics) and back[("a", None)].cross is None
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        load_statistics(tmp_path / "s")


def test_non_finite_inputs_name_the_linear() -> None:
    layer = nn.Sequential(nn.Linear(3, 2))
    recorder = Recorder(layer, "model.layers.4", {"model.layers.4.0.weight"})
    with recorder.watch():
        layer(torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.4\.0\.weight' hold NaN or Inf"):
        recorder.take()


def test_layers_told_about_tokens_are_refused(tmp_path: Path) -> None:
    _, blocks, windows = blocks_of("llama", tmp_path / "model")
    decoder = blocks.model.model
    forward = decoder.rotary_emb.forward
    decoder.rotary_emb.forward = lambda x, **more: tuple(part + x.sum() for part in forward(x, **more))
    with pytest.raises(CheckpointError, match="told something about the tokens"):
        blocks.embed(windows, torch.empty(3, 12, 64))


def test_windows_of_short_texts() -> None:
    class Letters:
        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    windows, notes = calibration_windows(Letters(), "abcdefghij", 4, 4)
    assert windows.shape == (2, 4) and "10 tokens" in notes[0] and "2 windows of 4" in notes[0]
    windows, notes = calibration_windows(Letters(), "abc", 4, 8)
    assert windows.shape == (1, 3) and notes
    assert calibration_windows(Letters(), "abcdefghij", 2, 5)[1] == []
    with pytest.raises(OptionError):
        calibration_windows(Letters(), "a", 4, 8)
    assert any("language" in note for note in calibration_windows(Letters(), "x" * 2000, 2, 8)[1])


def test_streams_survive_in_files(tmp_path: Path) -> None:
    stream = Stream(tmp_path, "original", (2, 3, 4))
    first = stream.open(0, new=True)
    first.copy_(torch.arange(24.0).view(2, 3, 4))
    seal = stream.seal(0)
    again = Stream(tmp_path, "original", (2, 3, 4))
    assert torch.equal(again.open(0), first) and again.seal(0) == seal
    stream.open(1, new=True).zero_()
    stream.drop_before(1)
    assert [path.name for path in tmp_path.iterdir()] == ["original-00001.f32"]


def test_experts_without_tokens_share_nothing() -> None:
    """Two empty inputs have the same address."""
    layer = nn.ModuleDict({"a": nn.Linear(4, 2, bias=False), "b": nn.Linear(4, 2, bias=False)})
    recorder = Recorder(layer, "m", {"m.a.weight", "m.b.weight"})
    for count in (0, 3):
        with recorder.watch():
            layer["a"](torch.randn(count, 4)), layer["b"](torch.randn(count, 4))
        recorder.take()
    found = recorder.finish()
    assert found["m.a.weight", None] is not found["m.b.weight", None] and found["m.b.weight", None].tokens == 3
