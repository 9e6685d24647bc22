"""What an encoded KV cache costs: error of the attention output, KL and perplexity through the cache, bits as they are stored.

    python benchmarks/kvcache.py                                  # SmolLM2-135M, one window of 2048
    python benchmarks/kvcache.py --model qwen-0.5b --results q.jsonl --markdown
    python benchmarks/kvcache.py --model DIR --text valid.txt --caches "kv4;kv4 sink=0;hf:quanto-4"
    python benchmarks/kvcache.py --errors-only                    # the attention error alone, in a few minutes
    python benchmarks/kvcache.py --speed                          # one decode step at 8k of a Llama-7B layer, nothing else

The text goes through the model in passes of --chunk tokens, each seeing what came before it through the cache; the reference
is the same model on the whole window at once. KL is KL(reference ‖ cache) in nats over the vocabulary. The attention error is
‖o − ô‖² / ‖o‖², the mean over layers, of attention outputs with queries from the second half of 516 tokens where all but
four sinks are encoded (no residual window to hide behind). Bits count everything stored for encoded values; `kept` is how many
of the past tokens a pass found as they came (sinks and residual), the mean over passes.

`hf:` rows are transformers' own QuantizedCache with backend quanto or hqq (pip install optimum-quanto hqq), in groups of 64,
with a residual such that about as many tokens are kept as here. It has no sinks (`kv4 sink=0` is ours without), and encodes the
whole cache anew at each flush. Its scales have the model's dtype, and are counted in 16 bits, as in a model of 16 bits.
A backend that cannot be used is a row that says why. `asym2-g32/channel,asym2-g32` is KIVI-2 as published, and so on.

--results FILE is a file of JSON lines: what it has for this model, text and setting is not measured again.
One core, SmolLM2, one window: about ten minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numfit.evaluation.forward import logits_by_position, logits_through_cache
from numfit.evaluation.metrics import divergence, next_token_losses, summarize_divergence
from numfit.kvcache import PRESETS, QuantizedCache, View, attend, packed_attention, preset
from numfit.kvcache.store import Store

OURS = [
    *PRESETS, "kv4 sink=0",
    "asym4-g32/channel,asym4-g32", "asym2-g32/channel,asym2-g32", "asym2-g64/channel,asym2-g64",  # KIVI
    "mant4-paper8,mant4-paper8/channel", "mant4-table16,mant4-table16/channel", "mant4-search8,mant4-search8/channel",
    "asym4-g64,asym4-g64", "asym4-g32,asym4-g64", "asym4-g32+centred,asym4-g64", "asym4-g32+permuted,asym4-g64",
    "tq4,tq4", "tq3+centred,tq3", "oct3+centred,oct3",
    "asym3-g128/channel,rotvq", "rotvq+centred,rotvq", "asym4-g128/channel,ternary-g32/channel",
    "asym3-g128/channel+outliers0.01,tq3", "polar4-g128,tq4", "sign-g32/channel+fourier,asym2-g32",
    "nf4-g64,nf4-g64", "fp8-row,fp8-row",
]  # fmt: skip
# transformers' caches. Axes of keys and of values: with quanto 0 groups channels of a token, -1 tokens of a channel; with hqq 1
# groups channels of a token, 0 numbers of one channel, far apart.
PEERS: dict[str, dict[str, Any]] = {
    "hf:quanto-4": {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0},
    "hf:quanto-4-kivi": {"backend": "quanto", "nbits": 4, "axis_key": -1, "axis_value": 0},
    "hf:quanto-2-kivi": {"backend": "quanto", "nbits": 2, "axis_key": -1, "axis_value": 0},
    "hf:hqq-4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "hf:hqq-4-kivi": {"backend": "hqq", "nbits": 4, "axis_key": 0, "axis_value": 1},
    "hf:hqq-2-kivi": {"backend": "hqq", "nbits": 2, "axis_key": 0, "axis_value": 1},
    "hf:fp8": {"backend": "fp8"},
}
PEER_RESIDUAL = 320  # in passes of 64: 0, 64, … 256 tokens kept, on average 128; ours keep 4 and 64 to 192


def settings(name: str) -> tuple[str, dict[str, int]]:
    """"NAME sink=0 residual=64" → (NAME, its options)."""
    name, *options = name.split()
    return name, {key: int(value) for key, _, value in (option.partition("=") for option in options)}


def reference(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities fp32 [T − 1, V], losses [T − 1]) of a window [1, T] without a cache."""
    kept: Tensor | None = None
    losses = []
    for begin, end, logits in logits_by_position(model, ids):
        loss, log_probs = next_token_losses(logits[0], ids[0, begin + 1 : end + 1])
        if kept is None:
            kept = log_probs.new_empty(ids.shape[1] - 1, log_probs.shape[1])
        kept[begin:end] = log_probs
        losses.append(loss)
    assert kept is not None
    return kept, torch.cat(losses)


def through(model: Any, ids: Tensor, cache: Any, chunk: int, kept: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(losses, KL to `kept`, same top token) of the positions of each pass, through a cache."""
    for begin, end, logits in logits_through_cache(model, ids, cache, chunk):
        losses, log_probs = next_token_losses(logits[0], ids[0, begin + 1 : end + 1])
        yield losses, *divergence(kept[begin:end], log_probs)


def peer(name: str, config: Any) -> Any:
    """transformers' own quantized cache.

    Raises:
        Exception: whatever it says where it cannot be used.
    """
    from transformers import QuantizedCache as Theirs

    base, options = settings(name)
    how = dict(PEERS[base])
    if how["backend"] != "fp8":
        how |= {"q_group_size": 64, "residual_length": options.get("residual", PEER_RESIDUAL)}
    return Theirs(config=config, **how)


def peer_bits(cache: Any) -> float:
    """Stored bits a value of transformers' cache, as its tensors say; scales and offsets in 16 bits."""
    bits = count = 0.0
    for layer in cache.layers:
        for q in (layer._quantized_keys, layer._quantized_values):
            if isinstance(q, tuple) and isinstance(q[1], dict):  # hqq
                codes, numbers, size = q[0], (q[1]["scale"], q[1]["zero"]), torch.Size(q[1]["shape"]).numel()
            elif isinstance(q, tuple):  # fp8
                codes, numbers, size = q[0], (q[1],), q[0].numel()
            else:
                codes, numbers, size = q._data._data, (q._scale, q._shift), q.numel()
            bits += 8 * codes.nbytes + 16 * sum(t.numel() for t in numbers)
            count += size
    return bits / count


def kept_tokens(cache: Any) -> float:
    """Tokens that a cache holds as they came, the mean over layers, keys and values."""
    counts = []
    for layer in cache.layers:
        if hasattr(layer, "stores"):
            counts += [store.length - store.count for store in layer.stores]
        else:
            counts.append(layer.keys.shape[-2] if layer.keys.dim() == 4 else 0)
    return sum(counts) / len(counts)


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


def decoded(name: str, key: Tensor, value: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Keys and values after the four sinks, encoded and decoded."""
    if name.startswith("hf:"):
        layer = peer(name, config).layers[0]
        layer.update(key[:, :, 4:], value[:, :, 4:])  # the first ones are encoded at once, and come back the next time
        return tuple(t[:, :, :-1] for t in layer.update(key[:, :, :1], value[:, :, :1]))  # type: ignore[return-value]
    stores = [Store(codec, 4, 0, "layer") for codec in preset(settings(name)[0])]
    for store, x in zip(stores, (key, value)):
        store.append(x)
    view = View(*(s.snapshot() for s in stores), key[:, :, :0], value[:, :, :0])
    return tuple(t[:, :, 4:] for t in view.materialize(torch.float32))  # type: ignore[return-value]


def attention_error(name: str, layers: list[tuple[Tensor, Tensor, Tensor, float]], config: Any) -> float:
    """Mean over layers of ‖o − ô‖² / ‖o‖², queries of the second half, every token but four sinks encoded."""
    errors = []
    for query, key, value, scaling in layers:
        k, v = (torch.cat([x[:, :, :4], y], 2) for x, y in zip((key, value), decoded(name, key, value, config)))
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


def stored_bits(name: str, dim: int) -> float:
    """Bits a value, by definition: keys and values alike."""
    if name.startswith("hf:"):
        return PEERS[settings(name)[0]].get("nbits", 8) + (0 if name.startswith("hf:fp8") else 32 / 64)
    return sum(s.bits_per_value(dim) for s in preset(settings(name)[0])) / 2


def measure(model: Any, windows: Tensor, name: str, chunk: int, kept: list[tuple[Tensor, Tensor]],
            layers: Any) -> dict[str, Any]:  # fmt: skip
    """One row of the table; without `kept`, only its attention error."""
    started = time.process_time()
    theirs = name.startswith("hf:")
    kv, options = settings(name)
    if not kept:
        bits = stored_bits(name, layers[0][1].shape[-1])
        return {"cache": name, "bits": bits, "attention_error": attention_error(name, layers, model.config)}
    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    found: list[float] = []
    for ids, (log_probs, _) in zip(windows, kept):
        cache = peer(name, model.config) if theirs else QuantizedCache(model.config, kv, **options)  # type: ignore[arg-type]
        with packed_attention(model) if not theirs else nullcontext():
            for part in through(model, ids[None], cache, chunk, log_probs):
                passes.append(part)
                found.append(kept_tokens(cache))
    losses, kls, same = (torch.cat(parts) for parts in zip(*passes))
    base = torch.cat([loss for _, loss in kept]).mean().exp()
    ppl = losses.mean().exp()
    return {
        "cache": name,
        "bits": peer_bits(cache) if theirs else cache.memory()["bits_per_value"],
        "kept": sum(found) / len(found),
        "attention_error": attention_error(name, layers, model.config),
        "ppl": float(ppl),
        "ppl_change": float(ppl / base - 1),
        **{k: v for k, v in summarize_divergence(kls, same).items() if k in ("kl_mean", "kl_se", "top1")},
        "cpu_seconds": time.process_time() - started,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "absent" in row:
        return [row["cache"], f"not measured: {row['absent']}", *[""] * 5]
    if "ppl" not in row:
        return [row["cache"], f"{row['bits']:.3f}", "", f"{row['attention_error']:.4f}", *[""] * 3]
    return [
        row["cache"], f"{row['bits']:.3f}", f"{row['kept']:.0f}", f"{row['attention_error']:.4f}",
        f"{row['kl_mean']:.5f} ± {row['kl_se']:.5f}", f"{100 * row['top1']:.2f} %",
        f"{row['ppl']:.3f} ({100 * row['ppl_change']:+.2f} %)",
    ]  # fmt: skip


def table(rows: list[dict[str, Any]], markdown: bool) -> str:
    """Rows under their heads, as Markdown or in columns."""
    head = ["cache", "bits", "kept", "attention error", "KL", "top-1", "perplexity"]
    lines = [head, *map(cells, rows)]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines[1:]])
    widths = [max(len(line[i]) for line in lines if i != 1 or len(line[i]) < 20) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


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
    setting = {"model": directory.name, "text": hashlib.sha256(text.encode()).hexdigest()[:16], "windows": args.windows,
               "context": args.context, "chunk": args.chunk}  # fmt: skip
    if args.errors_only:
        setting = {"model": directory.name, "text": setting["text"], "errors_only": True}
    path = Path(args.results) if args.results else None
    done: dict[str, Any] = {}
    if path and path.exists():
        for row in map(json.loads, path.read_text().splitlines()):
            if row["setting"] == setting and "absent" not in row:  # (by now it may be there)
                done[row["cache"]] = row
    names = [name.strip() for name in args.caches.split(";")] if args.caches else [*OURS, *PEERS]
    for name in names:  # a misspelt one is noticed before anything is loaded
        if name.startswith("hf:") and settings(name)[0] not in PEERS:
            raise SystemExit(f"{name}: no such row; transformers' caches are: {', '.join(PEERS)}")
        if not name.startswith("hf:"):
            preset(settings(name)[0])
    if missing := [name for name in names if name not in done]:
        model, tokenizer = load(directory, dtype="float32")
        with torch.inference_mode():
            windows, _ = model_windows(model, tokenizer, text, args.windows, args.context)
            kept = [] if args.errors_only else [reference(model, ids[None]) for ids in windows]
            layers = captured(model, windows[:1, :516])
            base = float(torch.cat([loss for _, loss in kept]).mean().exp()) if kept else None
            for name in missing:
                try:
                    row = measure(model, windows, name, args.chunk, kept, layers)
                except Exception as error:
                    if not name.startswith("hf:"):
                        raise
                    row = {"cache": name, "absent": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
                done[name] = {**row, "reference_ppl": base, "setting": setting}
                print(json.dumps(done[name]), file=sys.stderr, flush=True)
                if path:
                    with path.open("a") as file:
                        file.write(json.dumps(done[name]) + "\n")
    rows = [done[name] for name in names]
    what = "attention errors alone" if args.errors_only else (
        f"{args.windows} × {args.context} tokens in passes of {args.chunk}; "
        f"perplexity without a cache {rows[0]['reference_ppl']:.3f}"
    )  # fmt: skip
    print(f"{directory.name}: {what}\n")
    print(table(rows, args.markdown))


def peak(run: Callable[[], Any]) -> float:
    """MiB by which the process grows at most while `run` runs (Linux: the kernel's high-water mark of resident memory)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system, and is seen when taken again
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    resident = lambda key: int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])  # noqa: E731
    before = resident("VmRSS")
    held = run()
    after = resident("VmHWM")
    del held
    return max(0, after - before) / 1024


def speed(args: argparse.Namespace) -> None:
    """Time and memory of attention for one token, one Llama-7B-shaped layer, --length tokens of cache."""
    heads, dim, length = 32, 128, args.length
    generator = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(1, heads, n, dim, generator=generator) for n in (length, length, 1))
    plain = keys.bfloat16(), values.bfloat16()
    del keys, values
    q = query.bfloat16()
    new = torch.zeros(1, heads, 1, dim)
    stores = {}
    for name in ("kv8", "kv4", "kv4-rot", "kv3", "mant4+", "nf4-g64,nf4-g64"):
        stores[name] = [Store(codec, 4, 64, "layer") for codec in preset(name)]
        for store, x in zip(stores[name], plain):
            store.append(x)
    view = lambda name: View(*(s.snapshot() for s in stores[name]), new, new)  # noqa: E731
    sdpa = torch.nn.functional.scaled_dot_product_attention
    runs: dict[str, Callable[[], Any]] = {"bf16, scaled_dot_product_attention": lambda: sdpa(q, *plain)}
    for name in stores:
        runs[f"{name}, packed"] = lambda name=name: attend(query, view(name), dim**-0.5)
    runs["kv4, packed, PyTorch alone"] = lambda: attend(query, view("kv4"), dim**-0.5, compiled=False)
    runs["kv4, decoded, then attended"] = lambda: sdpa(q, *view("kv4").materialize(torch.bfloat16))

    def step() -> None:  # appends too, and every 64 or 128 steps encodes what falls due
        for store in stores["kv4"]:
            store.append(new.bfloat16())
        attend(query, view("kv4"), dim**-0.5)

    runs["kv4, packed, with appending (mean)"] = step
    print(f"{heads} heads of {dim}, {length} tokens, {torch.get_num_threads()} threads; medians of {args.repeat}")
    print(f"{'':38} {'wall ms':>9} {'least':>9} {'CPU ms':>9} {'cache MiB':>10} {'more MiB':>9}")
    for name, run in runs.items():
        codec = name.partition(", ")[0] if name.partition(", packed")[0] not in stores else name.partition(", packed")[0]
        stored = sum(sum(s.memory().values()) for s in stores[codec]) if codec in stores else sum(t.nbytes for t in plain)
        slow, mean = "PyTorch" in name or "decoded" in name, "mean" in name
        times, cpu = [], []
        with torch.inference_mode():
            run()
            for _ in range(3 if slow else 128 if mean else args.repeat):
                started = time.perf_counter(), time.process_time()
                run()
                times.append(time.perf_counter() - started[0])
                cpu.append(time.process_time() - started[1])
            more = "" if mean else f"{peak(run):9.1f}"
        wall, used = ((statistics.mean if mean else statistics.median)(t) * 1e3 for t in (times, cpu))
        print(f"{name:38} {wall:9.2f} {min(times) * 1e3:9.2f} {used:9.2f} {stored / 2**20:10.1f} {more}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen-0.5b, or a directory")
    parser.add_argument("--text", help="a UTF-8 file (default: the demonstration's validation text)")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--caches", help="names separated by ';' instead of all")
    parser.add_argument("--results", help="a file of JSON lines that keeps what was measured")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--errors-only", action="store_true", help="only the attention errors")
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
