"""Every transform leaves the model's logits; and each does what its paper says, by formulas written here anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from numfit.errors import CheckpointError, OptionError
from numfit.orthogonal import splitmix64
from numfit.structure import decoder_map, value_rows
from numfit.transforms import awq, fold, heads, osplus, permute, residual, smooth
from numfit.transforms.links import choose, obstacles, places, statistic
from numfit.transforms.moves import Move, execute, moved_hessian
from numfit.transforms.orthogonal import Rotation

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SHAPE = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 72, "head_dim": 12,
    "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),  # not tied
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {}),
    "gemma3_text": ("Gemma3Text", {"sliding_window": 8, "query_pre_attn_scalar": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "gpt_neox": ("GPTNeoX", {"use_parallel_residual": True}),
    "gpt_neox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
}
TIED = ("gemma", "gemma3_text", "llama-tied")


@dataclass(frozen=True)
class Stats:
    absmax: torch.Tensor
    mean: torch.Tensor
    mean_square: torch.Tensor
    mean_abs: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor


def stats_of(x):
    """x: [T, K]"""
    return Stats(x.abs().amax(0), x.mean(0), (x * x).mean(0), x.abs().mean(0), x.amin(0), x.amax(0))


class Tiny:
    """A random model with outlying channels, its tensors and map; fp64 but for what transformers does in fp32."""

    def __init__(self, kind, path):
        name, more = MODELS[kind]
        self.kind, self.path = kind, path
        shape = dict(SHAPE)
        if name == "GPTNeoX":
            del shape["num_key_value_heads"], shape["head_dim"]
        config = getattr(transformers, f"{name}Config")(**{**shape, **more})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
                elif "embed" not in key:
                    parameter *= 6
        model.save_pretrained(path)
        self.model = model.eval()
        self.tensors = safetensors_torch.load_file(path / "model.safetensors")
        self.decoder = decoder_map(self.tensors, config.to_dict())

    def layer_tensors(self, layer):
        return {name: t for name, t in self.tensors.items() if name.startswith(layer.prefix)}

    def load(self, tensors, **changes):
        """The model with other tensors, loaded as a user would."""
        out = self.path / "changed"
        self.model.config.save_pretrained(out)
        if changes:
            config = type(self.model.config)(**{**self.model.config.to_dict(), **changes})
            config.save_pretrained(out)
        safetensors_torch.save_file(
            {n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
        )
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        return model.eval()

    def random_stats(self, layer):
        generator = torch.Generator().manual_seed(layer.index)
        linears = {n.removesuffix(".weight"): t for n, t in self.layer_tensors(layer).items() if t.ndim == 2}
        routed = {c for link in links_of(self, layer) for c in link.consumers}
        out = {}
        for name, w in linears.items():
            assert name in routed, name  # every linear hangs at some link
            x = torch.randn(50, w.shape[1], generator=generator).double() * torch.rand(w.shape[1], generator=generator).exp()
            out[name] = stats_of(x + torch.randn(w.shape[1], generator=generator))
        return out

    def inputs(self, model=None):
        """Linear -> its inputs [T, K] over a fixed batch (linears that exist as modules)."""
        model = model or self.model
        seen, handles = {}, []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_hook(
                    lambda _, args, __, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).detach())
                ))  # fmt: skip
        logits(model)
        for handle in handles:
            handle.remove()
        return seen


def links_of(tiny, layer):
    return [link for link in places(tiny.decoder, layer).values() if not isinstance(link, str)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = Tiny(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


IDS = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model, **more):
    with torch.inference_mode():
        return model(IDS, **more).logits


def same(a, b):
    assert float(a.std()) > 0.05  # a model that says something
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def round_to(bits):
    """Nearest rounding with a step per row: the simplest quantizer there is."""

    def quantize(w, importance):
        assert importance.shape == w.shape[1:] and bool((importance >= 0).all())
        step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (w / step).round() * step

    return quantize


def column_factors(tiny, layer):
    generator = torch.Generator().manual_seed(5)
    return {f.down: torch.rand(72, generator=generator).double() * 3 + 0.2 for f in layer.feed_forwards}


TRANSFORMS = {
    "smooth": (smooth.apply, lambda tiny, layer: smooth.SmoothOptions(alpha=0.7)),
    "awq": (awq.apply, lambda tiny, layer: awq.AwqOptions(round_to(3))),
    "awq-weights": (awq.apply, lambda tiny, layer: awq.AwqOptions(round_to(3), grid=5, divide_by_weights=True)),
    "osplus": (osplus.apply, lambda tiny, layer: osplus.OsPlusOptions(round_to(8))),
    "fold": (fold.apply, lambda tiny, layer: fold.FoldOptions(column_factors(tiny, layer))),
    "permute": (permute.apply, lambda tiny, layer: permute.PermuteOptions("salience")),
    "heads": (heads.apply, lambda tiny, layer: heads.HeadOptions(seed=3)),
}


def transformed(tiny, names):
    """The model's tensors after transforms layer by layer."""
    tensors = dict(tiny.tensors)
    for layer in tiny.decoder.layers:
        stats = tiny.random_stats(layer)
        for name in names:
            apply, options = TRANSFORMS[name]
            mine = {n: t for n, t in tensors.items() if n.startswith(layer.prefix)}
            before = {n: t.clone() for n, t in mine.items()}
            changed = apply(layer, tiny.decoder, mine, stats, options(tiny, layer))
            assert changed.keys() <= mine.keys()
            for n, t in mine.items():
                assert torch.equal(t, before[n]), f"{n} was changed in place"
            for n, t in changed.items():
                assert t.shape == mine[n].shape and t.dtype == mine[n].dtype
            tensors |= changed
    return tensors


def differs(tiny, tensors):
    return {name for name, t in tensors.items() if not torch.equal(t, tiny.tensors[name])}


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_logits_stay(kind, transform, tiny):
    tiny = tiny(kind)
    if transform == "fold" and kind.startswith("gpt_neox"):
        with pytest.raises(OptionError, match=r"exact at 'down'.*no gate"):
            transformed(tiny, [transform])
        return
    tensors = transformed(tiny, [transform])
    changed = differs(tiny, tensors)
    assert len(changed) >= 4
    same(logits(tiny.model), logits(tiny.load(tensors)))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_all_together_and_every_linear_changes(kind, tiny):
    tiny = tiny(kind)
    names = [name for name in TRANSFORMS if not (name == "fold" and kind.startswith("gpt_neox"))]
    tensors = transformed(tiny, names)
    matrices = {n for n, t in tiny.tensors.items() if ".layers." in n and t.ndim == 2}
    assert matrices <= differs(tiny, tensors)
    same(logits(tiny.model), logits(tiny.load(tensors)))


def test_fp32_in_fp32_out(tiny):
    tiny = tiny("qwen2")
    layer = tiny.decoder.layers[0]
    tensors = {n: t.float() for n, t in tiny.layer_tensors(layer).items()}
    for apply, options in TRANSFORMS.values():
        for t in apply(layer, tiny.decoder, tensors, tiny.random_stats(layer), options(tiny, layer)).values():
            assert t.dtype == torch.float32


# --- the map ---


def test_gpt_neox_map(tiny):
    decoder = tiny("gpt_neox").decoder
    layer = decoder.layers[1]
    p = "gpt_neox.layers.1."
    assert layer.attention_inputs == (layer.qkv,) == (p + "attention.query_key_value",)
    assert layer.o == p + "attention.dense" and layer.feed_forwards[0].gate is None
    assert layer.input_norm.centred and layer.ffn_norm.weight == p + "post_attention_layernorm.weight"
    assert decoder.lm_head == "embed_out.weight" and decoder.final_norm.weight == "gpt_neox.final_layer_norm.weight"
    module, rows = value_rows(decoder, layer)
    assert module == layer.qkv and rows[:13] == [*range(24, 36), 60]  # heads of 12: q k v, q k v, …
    assert set(obstacles(decoder, layer)) == {"down"}


def test_buffers_of_old_files_are_known(tiny):
    tiny = tiny("gpt_neox")
    old = [f"gpt_neox.layers.{i}.attention.{n}" for i in range(2) for n in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    decoder = decoder_map([*tiny.tensors, *old], tiny.model.config.to_dict())
    assert not any(layer.unexplained for layer in decoder.layers)


def test_rows_of_values_in_an_unknown_fused_linear(tiny):
    tiny = tiny("gpt_neox")
    decoder = replace(tiny.decoder, model_type="strange")
    with pytest.raises(CheckpointError, match=r"query_key_value.*strange"):
        value_rows(decoder, decoder.layers[0])


def test_norms_behind_attention_are_told_apart(tiny):
    assert [n.weight.split(".")[-2] for n in tiny("gemma3_text").decoder.layers[0].post_norms] == [
        "post_attention_layernorm", "post_feedforward_layernorm"
    ]  # fmt: skip
    assert not tiny("llama").decoder.layers[0].post_norms


# --- statistics after a move, against the rewritten model itself ---


@pytest.mark.parametrize("kind", ["llama-biases", "gpt_neox"])
def test_moved_statistics_are_those_of_the_rewritten_model(kind, tiny):
    tiny = tiny(kind)
    seen = tiny.inputs()
    generator = torch.Generator().manual_seed(0)
    tensors, moves = dict(tiny.tensors), []
    for layer in tiny.decoder.layers:
        for link in links_of(tiny, layer):
            producer = tensors[link.norm.weight if link.norm else f"{link.producer}.weight"]
            count = len(link.rows) if link.rows else len(producer)
            scale = None if link.rigid else torch.rand(count, generator=generator).double() + 0.5
            shift = torch.randn(count, generator=generator).double() if kind == "gpt_neox" and link.straight else None
            order = None
            if not link.norm:
                order = permute.sort_channels(torch.rand(count, generator=generator), link.head_dim)
            moves.append(Move(link, scale, shift, order))
    tensors |= execute(moves, tensors)
    model = tiny.load(tensors)
    same(logits(tiny.model), logits(model))
    again = tiny.inputs(model)
    for move in moves:
        for name in move.link.consumers:
            x, y = seen[name], again[name]
            h, mean = 2 / len(x) * x.T @ x, x.mean(0)
            expected = 2 / len(y) * y.T @ y
            tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
            torch.testing.assert_close(moved_hessian(h, move, mean), expected, **tolerance)
            torch.testing.assert_close(moved_hessian(h.diagonal(), move, mean), expected.diagonal(), **tolerance)


def test_statistics_of_o_after_rotated_heads(tiny):
    tiny = tiny("llama")
    layer, options = tiny.decoder.layers[0], heads.HeadOptions(4)
    changed = heads.apply(layer, tiny.decoder, tiny.layer_tensors(layer), {}, options)
    again = tiny.inputs(tiny.load(tiny.tensors | changed))
    expected = heads.rotate_inputs(tiny.inputs()[layer.o], layer, tiny.decoder, options)
    torch.testing.assert_close(again[layer.o], expected, rtol=1e-5, atol=1e-5)


# --- each by its own formula ---


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_balances(alpha, tiny):
    """max|x'| = max|x|^(1-a) max|w|^(1-a) and max|w'| = (max|x| max|w|)^a, in the model that comes out."""
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    seen = tiny.inputs()
    stats = {name: stats_of(x) for name, x in seen.items()}
    options = smooth.SmoothOptions(alpha, where=("ffn", "attention"))
    changed = smooth.apply(layer, tiny.decoder, tiny.layer_tensors(layer), stats, options)
    again = tiny.inputs(tiny.load(tiny.tensors | changed))
    for names in (layer.attention_inputs, layer.ffn_inputs):
        x = stats[names[0]].absmax
        w = torch.stack([tiny.tensors[f"{n}.weight"].abs().amax(0) for n in names]).amax(0)
        after_x = again[names[0]].abs().amax(0)
        after_w = torch.stack([changed[f"{n}.weight"].abs().amax(0) for n in names]).amax(0)
        torch.testing.assert_close(after_x, (x * w) ** (1 - alpha), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after_w, (x * w) ** alpha, rtol=1e-6, atol=0)


def test_smoothquant_leaves_dead_channels(tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    stats = tiny.random_stats(layer)
    absmax = stats[layer.q].absmax.clone()
    absmax[7] = 0
    stats |= {name: replace(stats[name], absmax=absmax) for name in layer.attention_inputs}
    moves = smooth.plan(layer, tiny.decoder, tiny.layer_tensors(layer), stats, smooth.SmoothOptions(where=("attention",)))
    assert moves[0].scale[7] == 1 and int((moves[0].scale == 1).sum()) == 1


@pytest.mark.parametrize("full", [False, True])
def test_awq_chooses_by_the_error_of_the_outputs(full, tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    seen = tiny.inputs()
    loud = {name: x * (1 + 30 * (torch.arange(x.shape[1]) % 17 == 3)) for name, x in seen.items()}  # outlying channels
    stats = {name: stats_of(x) for name, x in loud.items()}
    h = {name: 2 / len(x) * x.T @ x for name, x in loud.items()} if full else None
    quantize, tensors = round_to(3), tiny.layer_tensors(layer)
    found = awq.search(layer, tiny.decoder, tensors, stats, awq.AwqOptions(quantize, h, where=("attention", "down")))
    assert [f.move.link.name for f in found] == ["down", "attention"]
    for one in found:
        x = loud[one.move.link.consumers[0]]
        by_hand = []
        for k in range(20):
            s = x.abs().mean(0) ** (k / 20)
            s = s / (s.max() * s.min()).sqrt()
            loss = 0.0
            for name in one.move.link.targets:
                w = tensors[f"{name}.weight"]
                error = quantize(w * s, s) / s - w
                loss += float((error @ x.T).square().sum()) * 2 / len(x) if full else float((error**2 * (x**2).mean(0)).sum())
            by_hand.append(loss)
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(by_hand), rtol=1e-6, atol=0)
        assert one.rho == by_hand.index(min(by_hand)) / 20 > 0  # something to gain
        s = x.abs().mean(0) ** one.rho
        torch.testing.assert_close(one.move.scale, s / (s.max() * s.min()).sqrt())


def test_awq_never_prefers_a_loss(tiny):
    tiny = tiny("mixtral")
    layer = tiny.decoder.layers[0]
    options = awq.AwqOptions(round_to(4))
    for one in awq.search(layer, tiny.decoder, tiny.layer_tensors(layer), tiny.random_stats(layer), options):
        assert min(one.losses) <= one.losses[0] and len(one.losses) == 20


def test_osplus_centres_what_a_layernorm_gives(tiny):
    tiny = tiny("gpt_neox")
    layer = tiny.decoder.layers[0]
    stats = {name: stats_of(x) for name, x in tiny.inputs().items()}
    changed = osplus.apply(layer, tiny.decoder, tiny.layer_tensors(layer), stats, osplus.OsPlusOptions())
    again = tiny.inputs(tiny.load(tiny.tensors | changed))
    for name in (layer.qkv, *layer.ffn_inputs, layer.o):
        x = again[name]
        torch.testing.assert_close(x.amax(0), -x.amin(0), rtol=1e-4, atol=1e-5)
        half = (stats[name].maximum - stats[name].minimum) / 2
        assert bool((x.amax(0) <= half * (1 + 1e-5)).all())
    down = layer.feed_forwards[0].down  # nothing passes a GELU
    assert f"{down}.weight" not in changed


def test_osplus_threshold_has_the_least_error(tiny):
    """The error recomputed from the inputs themselves: weights to 4 bits, activations to 4 with uniform noise."""
    tiny = tiny("gpt_neox")
    layer = tiny.decoder.layers[0]
    x = tiny.inputs()[layer.qkv] * (1 + 9 * (torch.arange(48) % 11 == 2))
    stats = {layer.qkv: stats_of(x)}
    seen = []

    def quantize(w, importance):
        seen.append(importance)
        return round_to(4)(w, importance)

    options = osplus.OsPlusOptions(quantize, activation_bits=4, grid=7, where=("attention",))
    (move,) = osplus.plan(layer, tiny.decoder, tiny.layer_tensors(layer), stats, options)
    z = (x.amax(0) + x.amin(0)) / 2
    torch.testing.assert_close(move.shift, z)
    torch.testing.assert_close(seen[0], ((x - z) ** 2).mean(0))  # the first threshold scales nothing
    w, peak = tiny.tensors[f"{layer.qkv}.weight"], (x - z).abs().amax(0)
    tried = {}
    for k in range(7):
        s = (peak / (peak.max() * (peak.min() / peak.max()) ** (k / 6))).clamp(min=1)
        small = (x - z) / s
        rounded = round_to(4)(w * s, s)
        noise = (small.abs().max() / 7) ** 2 / 12 * rounded.square().sum()
        tried[float(((rounded - w * s) ** 2 * (small**2).mean(0)).sum() + noise)] = s
    assert len(tried) == 7 and min(tried) < 0.9 * max(tried)
    torch.testing.assert_close(move.scale, tried[min(tried)])


def test_osplus_scales_where_no_bias_takes_a_shift(tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    stats = tiny.random_stats(layer)
    stats |= {n: replace(stats[n], absmax=stats[n].absmax * (1 + 50 * (torch.arange(48) == 5))) for n in layer.attention_inputs}
    tensors = tiny.layer_tensors(layer)
    moves = osplus.plan(layer, tiny.decoder, tensors, stats, osplus.OsPlusOptions(where=("attention",)))
    assert moves[0].shift is None and int(moves[0].scale.argmax()) == 5 and float(moves[0].scale.min()) >= 1
    with pytest.raises(OptionError, match=r"'attention'.*input_layernorm.*no bias"):
        osplus.plan(layer, tiny.decoder, tensors, stats, osplus.OsPlusOptions(shift=True, where=("attention",)))


def test_column_scale_finds_the_scale_and_never_loses():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-3, 4, (40, 24), generator=generator).double()
    levels[:, 0], levels[0] = 3, 3  # every row and column reaches the top
    c = torch.rand(24, generator=generator).double() * 1.5 + 0.5
    w = levels * c
    quantize, h = round_to(3), torch.rand(24, generator=generator).double() + 0.1
    before = float(((quantize(w, h) - w) ** 2 * h).sum())
    found = fold.column_scale(w, quantize, h)
    after = float(((quantize(w / found, h) * found - w) ** 2 * h).sum())
    assert after < 0.2 * before
    assert abs(float(found.log().mean())) < 1e-9 and bool((found > 0).all())
    exact = levels * 1.0  # nothing to gain: c stays 1
    assert torch.equal(fold.column_scale(exact, quantize, h), torch.ones(24).double())
    full = torch.randn(24, 60, generator=generator).double()
    full = full @ full.T
    noise = torch.randn(40, 24, generator=generator).double()
    found = fold.column_scale(noise, quantize, full)

    def loss(c):
        error = quantize(noise / c, full.diagonal()) * c - noise
        return float(((error @ full) * error).sum())

    assert loss(found) <= loss(torch.ones(24))
    zeros = w.clone()
    zeros[:, 3] = 0
    assert bool(torch.isfinite(fold.column_scale(zeros, quantize, h)).all())


def test_order_of_channels(tiny):
    key = torch.tensor([1.0, 5, 5, 2, 9, 0])
    assert permute.sort_channels(key).tolist() == [4, 1, 2, 3, 0, 5]
    assert permute.sort_channels(key, 3).tolist() == [1, 2, 0, 4, 3, 5]
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    stats = tiny.random_stats(layer)
    tensors = tiny.layer_tensors(layer)
    changed = permute.apply(layer, tiny.decoder, tensors, stats)
    down, up = layer.feed_forwards[0].down, layer.feed_forwards[0].up
    order = stats[down].mean_square.argsort(descending=True)
    assert torch.equal(changed[f"{down}.weight"], tensors[f"{down}.weight"][:, order])
    assert torch.equal(changed[f"{up}.weight"], tensors[f"{up}.weight"][order])
    assert set(changed) == {f"{n}.weight" for n in (down, up, layer.feed_forwards[0].gate, layer.v, layer.o)}
    back = permute.apply(layer, tiny.decoder, tensors | changed, stats, permute.PermuteOptions(
        keys={down: -order.double()}, where=("down",)))  # fmt: skip
    for name in back:  # sorting by the old place puts everything back
        assert torch.equal(back[name], tensors[name])


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 36, 45, 576])
@pytest.mark.parametrize("fixing_mean", [False, True])
def test_rotation_is_orthogonal_and_as_defined(n, fixing_mean):
    rotation = Rotation(n, 7, fixing_mean)
    matrix = rotation.rotate(torch.eye(n).double()).T  # columns are images of unit vectors
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n).double(), atol=1e-12, rtol=0)
    x = torch.randn(2, 5, n, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(rotation.rotate(x), x @ matrix.T)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x)
    power = n & -n
    sylvester = torch.ones(1, 1).double()
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1], [1, -1]]).double(), sylvester)
    k = torch.arange(n // power).double()
    dct = torch.cos(torch.pi * power / n * torch.outer(k, k + 0.5)) * (2 * power / n) ** 0.5
    dct[0] /= 2**0.5
    m = torch.kron(dct, sylvester / power**0.5)
    s = torch.tensor([-1.0 if splitmix64(7, i) >> 63 else 1.0 for i in range(n)]).double()
    s[0] = 1 if fixing_mean else s[0]
    torch.testing.assert_close(matrix, m.T @ (s[:, None] * m) if fixing_mean else m * s, atol=1e-12, rtol=0)
    if fixing_mean:
        torch.testing.assert_close(matrix @ torch.ones(n).double(), torch.ones(n).double())
    elif n > 8:
        assert float(matrix.abs().max()) <= (2 / n) ** 0.5 + 1e-12  # an outlier is spread over all channels
        assert not torch.equal(matrix, Rotation(n, 8).rotate(torch.eye(n).double()).T)


# --- the residual stream ---


@pytest.mark.parametrize("kind", [kind for kind in sorted(MODELS) if kind != "gemma3_text"])
def test_rotated_residual_stream(kind, tiny):
    tiny = tiny(kind)
    plan = residual.plan_residual(tiny.decoder, tiny.tensors, seed=2, untie=kind in TIED)
    assert plan.untied == (kind in TIED) and plan.fixing_mean == kind.startswith("gpt_neox")
    changed = dict(residual.rotate_residual(plan, tiny.tensors.__getitem__))
    assert plan.untied or changed.keys() <= tiny.tensors.keys()
    matrices = {n for n, t in tiny.tensors.items() if t.ndim == 2}
    assert matrices <= changed.keys()
    model = tiny.load(tiny.tensors | changed, **({"tie_word_embeddings": False} if plan.untied else {}))
    same(logits(tiny.model), logits(model))
    with torch.inference_mode():
        before, after = (m(IDS, output_hidden_states=True).hidden_states for m in (tiny.model, model))
    for a, b in zip(before[:2], after[:2]):  # the embedding and what leaves the first layer
        torch.testing.assert_close(b, residual.rotate_inputs(plan, a), rtol=1e-4, atol=1e-5)
    for name in matrices:
        assert not torch.equal(changed[name], tiny.tensors[name])


def test_rotation_and_layer_transforms_together(tiny):
    tiny = tiny("qwen2")
    tensors = transformed(tiny, ["smooth", "permute", "heads"])
    plan = residual.plan_residual(tiny.decoder, tensors)
    tensors |= dict(residual.rotate_residual(plan, tensors.__getitem__))
    same(logits(tiny.model), logits(tiny.load(tensors)))


def test_rotation_spreads_an_outlying_channel(tiny):
    tiny = tiny("llama")
    tensors = dict(tiny.tensors)
    embedding = tensors[tiny.decoder.embedding].clone()
    embedding[:, 5] += 10
    tensors[tiny.decoder.embedding] = embedding
    plan = residual.plan_residual(tiny.decoder, tensors)
    after = residual.rotate_tensor(plan, tiny.decoder.embedding, tensors.__getitem__)
    assert float(after.abs().max()) < 0.3 * float(embedding.abs().max())


def test_rotation_refuses_what_it_cannot_do_exactly(tiny):
    gemma, tied, neox = tiny("gemma3_text"), tiny("llama-tied"), tiny("gpt_neox")
    with pytest.raises(OptionError, match=r"post_attention_layernorm.*does not commute"):
        residual.plan_residual(gemma.decoder, gemma.tensors, untie=True)
    with pytest.raises(OptionError, match=r"tied.*untie"):
        residual.plan_residual(tied.decoder, tied.tensors)
    with pytest.raises(OptionError, match=r"projector\.weight"):
        residual.plan_residual(neox.decoder, [*neox.tensors, "projector.weight"])
    name = neox.decoder.layers[0].input_norm.weight
    dead = neox.tensors | {name: neox.tensors[name] * (torch.arange(48) != 3)}
    with pytest.raises(OptionError, match="is 0 in a channel"):
        dict(residual.rotate_residual(residual.plan_residual(neox.decoder, dead), dead.__getitem__))


# --- bad input ---


def test_a_layer_that_is_not_understood_is_refused(tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    sinks = replace(layer, unexplained=(layer.prefix + "self_attn.sinks",))
    for apply, options in TRANSFORMS.values():
        with pytest.raises(OptionError, match=r"self_attn\.sinks"):
            apply(sinks, tiny.decoder, tiny.layer_tensors(layer), tiny.random_stats(layer), options(tiny, layer))
        with pytest.raises(OptionError, match="'strange'"):
            strange = replace(tiny.decoder, verified=False, model_type="strange")
            apply(layer, strange, tiny.layer_tensors(layer), tiny.random_stats(layer), options(tiny, layer))
    with pytest.raises(OptionError, match=r"self_attn\.sinks"):
        residual.plan_residual(replace(tiny.decoder, layers=(sinks,)), tiny.tensors)


def test_places_that_do_not_exist(tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    with pytest.raises(OptionError, match="'mlp' is no place"):
        choose(tiny.decoder, layer, ("mlp",))
    with pytest.raises(OptionError, match="no norm of"):
        choose(tiny.decoder, replace(layer, input_norm=None), ("attention",))
    with pytest.raises(OptionError, match="residual stream"):
        choose(tiny.decoder, layer, ("ffn",), order=True)
    parallel = replace(layer, ffn_norm=layer.input_norm)
    assert [link.name for link in choose(tiny.decoder, parallel, None)] == ["value", "down", "attention"]
    assert choose(tiny.decoder, parallel, ("attention",))[0].consumers == layer.attention_inputs + layer.ffn_inputs
    with pytest.raises(OptionError, match="use 'attention'"):
        choose(tiny.decoder, parallel, ("ffn",))


def test_experts(tiny):
    """Routers share the input but are not quantized; an expert that saw nothing keeps its scale."""
    tiny = tiny("mixtral")
    layer = tiny.decoder.layers[0]
    links = places(tiny.decoder, layer)
    assert [name for name in links if name.startswith("down")] == ["down.0", "down.1", "down.2"]
    ffn = links["ffn"]
    assert layer.routers[0] in ffn.consumers and layer.routers[0] not in ffn.targets
    stats = tiny.random_stats(layer)
    assert torch.equal(statistic(ffn, stats, "absmax"), stats[layer.routers[0]].absmax)
    del stats[layer.routers[0]]
    expected = torch.stack([stats[name].absmax for name in ffn.targets]).amax(0)
    assert torch.equal(statistic(ffn, stats, "absmax"), expected)
    del stats[layer.feed_forwards[1].down]
    moves = smooth.plan(layer, tiny.decoder, tiny.layer_tensors(layer), stats, smooth.SmoothOptions())
    assert [move.link.name for move in moves] == ["value", "down.0", "down.2", "attention", "ffn"]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda l, d, t, s: smooth.apply(l, d, t, {}), "no statistics.*calibrate"),
        (lambda l, d, t, s: smooth.apply(l, d, t, s, smooth.SmoothOptions(alpha=1.5)), "alpha"),
        (lambda l, d, t, s: smooth.apply(l, d, t, s, smooth.SmoothOptions(smallest=0)), "smallest"),
        (lambda l, d, t, s: awq.apply(l, d, t, s, awq.AwqOptions(round_to(4), grid=1)), "grid"),
        (lambda l, d, t, s: awq.apply(l, d, t, s, awq.AwqOptions(round_to(4), {l.q: torch.eye(3)})), "q_proj.*3, 3"),
        (lambda l, d, t, s: osplus.apply(l, d, t, s, osplus.OsPlusOptions(activation_bits=1)), "2 bits"),
        (lambda l, d, t, s: fold.apply(l, d, t, s, fold.FoldOptions({l.o: torch.ones(48)})), "no down projection"),
        (lambda l, d, t, s: fold.apply(l, d, t, s, fold.FoldOptions({l.feed_forwards[0].down: -torch.ones(72)})), "positive"),
        (lambda l, d, t, s: fold.apply(l, d, t, s, fold.FoldOptions({l.feed_forwards[0].down: torch.arange(72) / 0.0})),
         "not finite"),
        (lambda l, d, t, s: fold.column_scale(t[f"{l.o}.weight"], round_to(4), torch.ones(48), start="x"), "starts from"),
        (lambda l, d, t, s: permute.apply(l, d, t, s, permute.PermuteOptions("size")), "'size'"),
        (lambda l, d, t, s: smooth.apply(l, d, {n: v for n, v in t.items() if "up_proj" not in n}, s,
                                         smooth.SmoothOptions(where=("down",))), "up_proj.*not given"),
    ],
)  # fmt: skip
def test_bad_options(call, word, tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    with pytest.raises(OptionError, match=word):
        call(layer, tiny.decoder, tiny.layer_tensors(layer), tiny.random_stats(layer))


def test_statistics_must_be_finite(tiny):
    tiny = tiny("llama")
    layer = tiny.decoder.layers[0]
    stats = tiny.random_stats(layer)
    stats[layer.o] = replace(stats[layer.o], absmax=stats[layer.o].absmax * float("nan"))
    with pytest.raises(OptionError, match=r"o_proj.*not finite"):
        smooth.apply(layer, tiny.decoder, tiny.layer_tensors(layer), stats)


def test_moves_that_do_not_fit_are_refused(tiny):
    tiny = tiny("gpt_neox")
    layer, tensors = tiny.decoder.layers[0], tiny.tensors
    links = places(tiny.decoder, layer)
    crossing = torch.arange(48).roll(1)
    for move, word in (
        (Move(links["value"], order=crossing), "one head to another"),
        (Move(links["value"], order=torch.zeros(48, dtype=torch.long)), "permutation"),
        (Move(links["attention"], order=torch.arange(48)), "residual stream"),
        (Move(links["down"], scale=torch.ones(72)), "no gate"),
        (Move(links["down"], shift=torch.ones(72)), "activation"),
    ):
        with pytest.raises(OptionError, match=word):
            execute([move], tensors)
    with pytest.raises(OptionError, match="need the mean"):
        moved_hessian(torch.eye(48), Move(links["attention"], shift=torch.ones(48)))
