"""What an encoded KV cache costs: error of the attention output, KL and perplexity through the cache, bits as they are stored.

    python benchmarks/kvcache.py                                  # SmolLM2-135M, one window of 2048
    python benchmarks/kvcache.py --model DIR --text valid.txt --windows 2
    python benchmarks/kvcache.py --model qwen-0.5b --caches kv4,kv3 --results r.json
    python benchmarks/kvcache.py --speed                          # one decode step at 8k of a Llama-7B layer, nothing else

The text goes through the model in passes of --chunk tokens, each seeing what came before it through the cache; the reference
is the same model on the whole window at once. KL is KL(reference ‖ cache) in nats over the vocabulary. The attention error is
‖o − ô‖² / ‖o‖², the mean over layers, of attention outputs with queries from the second half of 516 tokens where all but
four sinks are encoded (no residual window to hide behind). Bits count everything stored for encoded values.

`hf:…` rows are transformers' own QuantizedCache, where its backend can be imported (pip install optimum-quanto, or hqq); it
encodes the whole cache anew at each flush. The row `kivi2` is our own streams in KIVI's published setting.

--results FILE keeps what was measured and goes on from there. One core, SmolLM2, one window: about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numfit.evaluation.forward import logits_through_cache
from numfit.evaluation.metrics import divergence, next_token_losses, summarize_divergence
from numfit.kvcache import PRESETS, QuantizedCache, View, attend, packed_attention, preset
from numfit.kvcache.attention import _materialize
from numfit.kvcache.store import Store

KIVI2 = "asym2-g32/channel,asym2-g32"
OURS = [*PRESETS, KIVI2, "mant4-paper8,mant4-paper8/channel", "mant4-search8,mant4-search8/channel", "nf4-g64,nf4-g64",
        "asym4-g64,asym4-g64", "tq4,tq4", "tq3+centred,tq3", "asym3-g128/channel,rotvq", "fp8-row,fp8-row"]  # fmt: skip
PEERS = ["hf:quanto-4-g64-axis0", "hf:quanto-4-g64-axis-1", "hf:hqq-4-g64-axis1", "hf:hqq-3-g64-axis1"]


def reference(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities fp32 [T − 1, V], losses [T − 1]) of a window [1, T] without a cache."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    losses, log_probs = next_token_losses(logits, ids[0, 1:])
    return log_probs, losses


def through(model: Any, ids: Tensor, cache: Any, chunk: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, KL to `kept`, same top token) of each position, through a cache."""
    parts = []
    for begin, end, logits in logits_through_cache(model, ids, cache, chunk):
        losses, log_probs = next_token_losses(logits[0], ids[0, begin + 1 : end + 1])
        parts.append((losses, *divergence(kept[begin:end], log_probs)))
    return tuple(torch.cat(part) for part in zip(*parts))  # type: ignore[return-value]


def peer(name: str, config: Any) -> Any:
    """transformers' own quantized cache.

    Raises:
        Exception: whatever it says where it cannot be used.
    """
    from transformers import QuantizedCache as Theirs

    backend, bits, group, axis = name.removeprefix("hf:").split("-", 3)
    side = int(axis.removeprefix("axis"))
    return Theirs(backend, config, nbits=int(bits), q_group_size=int(group[1:]), axis_key=side, axis_value=side)


def peer_bits(cache: Any) -> float:
    """Stored bits a value of transformers' cache, as its tensors say."""
    size = count = 0
    for layer in cache.layers:
        for q in (layer._quantized_keys, layer._quantized_values):
            if isinstance(q, tuple):  # hqq: codes and a dict of what belongs to them
                size += q[0].nbytes + sum(t.nbytes for t in q[1].values() if isinstance(t, Tensor))
                count += int(torch.Size(q[1]["shape"]).numel())
            else:
                size += sum(t.nbytes for t in (q._data._data, q._scale, q._shift))
                count += q.numel()
    return 8 * size / count


def captured(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """(queries, keys, values, scaling) of every layer, [1, H, T, D]."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **rest: Any) -> Any:
        seen.append((query, key, value, scaling or query.shape[-1] ** -0.5))
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)

    AttentionInterface.register("numfit_spy", spy)
    AttentionMaskInterface.register("numfit_spy", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("numfit_spy")
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return seen


def attention_error(kv: str, layers: list[tuple[Tensor, Tensor, Tensor, float]]) -> float:
    """Mean over layers of ‖o − ô‖² / ‖o‖², queries of the second half, every token but four sinks encoded."""
    codecs = preset(kv)
    errors = []
    for query, key, value, scaling in layers:
        stores = [Store(codec, 4, 0, "layer") for codec in codecs]
        for store, x in zip(stores, (key, value)):
            store.append(x)
        k, v = (_materialize(s.snapshot(), x[:, :, :0], torch.float32) for s, x in zip(stores, (key, value)))
        first = query.shape[2] // 2
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()[first:]
        groups = query.shape[1] // key.shape[1]
        exact, got = (
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, first:], a.repeat_interleave(groups, 1), b.repeat_interleave(groups, 1), attn_mask=mask,
                scale=scaling,
            ) for a, b in ((key, value), (k, v))
        )  # fmt: skip
        errors.append(float((exact - got).square().sum() / exact.square().sum()))
    return sum(errors) / len(errors)


def measure(model: Any, windows: Tensor, name: str, chunk: int, kept: list[tuple[Tensor, Tensor]],
            layers: Any) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    started = time.perf_counter()
    make: Callable[[], Any] = (lambda: peer(name, model.config)) if name.startswith("hf:") else (
        lambda: QuantizedCache(model.config, name))  # fmt: skip
    losses, kls, same = [], [], []
    for ids, (log_probs, _) in zip(windows, kept):
        cache = make()
        if name.startswith("hf:"):
            parts = through(model, ids[None], cache, chunk, log_probs)
        else:
            with packed_attention(model):
                parts = through(model, ids[None], cache, chunk, log_probs)
        for into, part in zip((losses, kls, same), parts):
            into.append(part)
    base = torch.cat([loss for _, loss in kept]).mean().exp()
    ppl = torch.cat(losses).mean().exp()
    memory = None if name.startswith("hf:") else cache.memory()
    return {
        "cache": name,
        "bits": peer_bits(cache) if memory is None else memory["bits_per_value"],
        "resident_bits": None if memory is None else memory["resident_bits"],
        "attention_error": None if memory is None else attention_error(name, layers),
        "ppl": float(ppl),
        "ppl_change": float(ppl / base - 1),
        **{k: v for k, v in summarize_divergence(torch.cat(kls), torch.cat(same)).items() if k in ("kl_mean", "kl_se", "top1")},
        "seconds": time.perf_counter() - started,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = ["| cache | bits | attention error | KL | top-1 | perplexity |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "absent" in row:
            lines.append(f"| {row['cache']} | not measured: {row['absent']} | | | | |")
            continue
        error = "" if row["attention_error"] is None else f"{row['attention_error']:.4f}"
        lines.append(
            f"| {row['cache']} | {row['bits']:.3f} | {error} | {row['kl_mean']:.5f} ± {row['kl_se']:.5f} | "
            f"{100 * row['top1']:.2f} % | {row['ppl']:.3f} ({100 * row['ppl_change']:+.2f} %) |"
        )
    return "\n".join(lines)


def quality(args: argparse.Namespace) -> None:
    """The table of one model."""
    from numfit import load
    from numfit.demo import models
    from numfit.evaluation.reference import model_windows
    from numfit.text import read_text

    named = {"smollm2": models.smollm2_degrid, "qwen-0.5b": models.qwen_half_b_degrid}
    directory = named[args.model]() if args.model in named else Path(args.model)
    if args.text is None:
        from numfit.demo.wikipedia import wikipedia_texts

        text = read_text(wikipedia_texts()["valid"])
    else:
        text = read_text(args.text)
    path = Path(args.results) if args.results else None
    done: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    model, tokenizer = load(directory, dtype="float32")
    with torch.inference_mode():
        windows, _ = model_windows(model, tokenizer, text, args.windows, args.context)
        kept = [reference(model, ids[None]) for ids in windows]
        layers = captured(model, windows[:1, :516])
        base = float(torch.cat([loss for _, loss in kept]).mean().exp())
        print(f"{directory.name}: {args.windows} windows of {args.context}, passes of {args.chunk}; perplexity {base:.4f}")
        rows = []
        names = args.caches.split(";") if args.caches else OURS + PEERS
        for name in names:
            key = f"{directory.name} {args.windows}x{args.context}/{args.chunk} {name}"
            if key not in done:
                try:
                    done[key] = measure(model, windows, name, args.chunk, kept, layers)
                except Exception as error:
                    if not name.startswith("hf:"):
                        raise
                    done[key] = {"cache": name, "absent": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
                if path:
                    path.write_text(json.dumps(done, indent=1))
            rows.append(done[key])
            print(json.dumps(done[key]), file=sys.stderr, flush=True)
    print(table(rows))


def speed(args: argparse.Namespace) -> None:
    """Microseconds of attention for one token, one Llama-7B-shaped layer, --length tokens of cache."""
    heads, dim, length = 32, 128, args.length
    generator = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(1, heads, n, dim, generator=generator) for n in (length, length, 1))
    plain = keys.bfloat16(), values.bfloat16()
    q = query.bfloat16()
    new = torch.zeros(1, heads, 1, dim)
    views = {}
    for name in ("kv8", "kv4", "kv4-rot", "kv3", "mant4+", "nf4-g64,nf4-g64"):
        stores = [Store(codec, 4, 64, "layer") for codec in preset(name)]
        for store, x in zip(stores, plain):
            store.append(x)
        views[name] = View(stores[0].snapshot(), stores[1].snapshot(), new, new)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    runs: dict[str, Callable[[], Any]] = {"bf16 scaled_dot_product_attention": lambda: sdpa(q, *plain)}
    for name, view in views.items():
        runs[f"{name}, packed"] = lambda view=view: attend(query, view, dim**-0.5)
    runs["kv4, packed, PyTorch"] = lambda: attend(query, views["kv4"], dim**-0.5, compiled=False)
    runs["kv4, decoded, then attended"] = lambda: sdpa(q, *(t.bfloat16() for t in views["kv4"].materialize(torch.bfloat16)))
    print(f"{heads} heads of {dim}, {length} tokens, {torch.get_num_threads()} threads; medians of {args.repeat}")
    for name, run in runs.items():
        slow = "PyTorch" in name or "decoded" in name
        times, cpu = [], []
        with torch.inference_mode():
            run()
            for _ in range(3 if slow else args.repeat):
                started = time.perf_counter(), time.process_time()
                run()
                times.append(time.perf_counter() - started[0])
                cpu.append(time.process_time() - started[1])
        wall, used = (statistics.median(t) * 1e3 for t in (times, cpu))
        print(f"{name:38} {wall:9.2f} ms, least {min(times) * 1e3:9.2f} ms; {used:9.2f} ms of CPU time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen-0.5b, or a directory")
    parser.add_argument("--text", help="a UTF-8 file (default: the demonstration's validation text)")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--caches", help="names separated by ';' instead of all")
    parser.add_argument("--results", help="a JSON file that keeps what was measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from numfit import native

    if native.library() is not None:
        native.set_threads(args.threads)
    speed(args) if args.speed else quality(args)


if __name__ == "__main__":
    main()
