"""`numfit run`: a sentence from a model, on the terminal, as it is made."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

NAME = "run"
HELP = "continue a prompt with a model (quantized or not), streaming the text"
EPILOG = """\
examples:
  numfit run my-model-mant4 --prompt "The capital of France is"
  numfit run my-model-mant4 --prompt "Write a haiku about rounding." --temperature 0.8 --seed 1
  numfit run my-model-mant4 --prompt "Once upon a time" --raw --max-tokens 40   # no chat template
  numfit run my-model-mant4 --prompt "Hello" --decode-once    # without kernels, in the memory of the unquantized model
  numfit run my-model-mant4 --prompt "Hello" --kv kv4         # keys and values in four bits
  numfit run my-model-mant4 --prompt "Hello" --json | jq .text

The text goes to standard output, everything else to standard error. A model with a chat template answers the prompt as
a user's message; --raw continues it as it stands. Packed decoders of the usual kinds (Llama, Qwen, Gemma 3 and their like)
run in a native loop on the CPU; for others, and for what is not quantized, transformers' own code runs, and says why.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a numfit checkpoint or a Hugging Face directory")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what to continue or to answer; '-' reads standard input"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default), 1 samples as trained"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest P of probability")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    parser.add_argument("--decode-once", action="store_true", help="decode all weights first: as large as before, no kernels")
    parser.add_argument("--dtype", default="auto", help="of activations: auto (as config.json), float32, bfloat16, float16")
    parser.add_argument("--device", metavar="DEVICE", help="where to run, for instance cuda (default: the CPU)")
    parser.add_argument(
        "--activations", default="int8", choices=("int8", "exact", "reference"),
        help="what computes packed layers on a CPU: kernels with int8 activations (default), kernels with exact ones "
        "(slower), or PyTorch (slowest)",
    )  # fmt: skip
    parser.add_argument(
        "--kv", metavar="CACHE",
        help="keep keys and values encoded: kv8, kv4, kv4-rot, kv3, mant4, mant4+, or KEYS,VALUES (docs/kvcache.md)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")


def run(args: argparse.Namespace) -> int:
    from numfit.errors import OptionError
    from numfit.threads import cpu_threads

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise OptionError("the prompt is empty; give some text, for instance --prompt 'The capital of France is'")
    if args.kv is not None:
        from numfit.kvcache import preset

        preset(args.kv)  # an unknown name is noticed before the model is loaded
    with cpu_threads(args.threads):
        return _answer(args, prompt)


def _answer(args: argparse.Namespace, prompt: str) -> int:
    """Load, generate, print."""
    import torch

    from numfit import native
    from numfit.runtime import activations_in_use, decode_model, generate, kernels_in_use, load, packed_bytes

    started = time.perf_counter()
    print(f"loading {args.model} …", end="", file=sys.stderr, flush=True)
    try:
        activations = "reference" if args.decode_once else args.activations  # no layout for what is decoded at once
        model, tokenizer = load(args.model, dtype=args.dtype, device=args.device, activations=activations)
    except BaseException:
        print(file=sys.stderr)
        raise
    size = packed_bytes(model) / 1e6
    if args.decode_once:
        decode_model(model)
    grown = f", decoded to {packed_bytes(model) / 1e6:.0f} MB" if args.decode_once else ""
    print(f" {time.perf_counter() - started:.1f} s, {size:.0f} MB of weights{grown}", file=sys.stderr)

    kernels, activations = kernels_in_use(model), activations_in_use(model)
    for kernel, count in kernels.items():
        how = "" if kernel.startswith("PyTorch") else f", {activations} activations on {native.isa()}"
        print(f"{count} tensors: {kernel}{how}", file=sys.stderr)
    if args.kv is not None:
        from numfit.kvcache import doubt

        if note := doubt(model, args.kv):
            print(f"note: {note}", file=sys.stderr)
    decoder, reason = _decoder(model, args.kv)
    if reason:
        print(f"transformers' own code runs, because {reason}", file=sys.stderr)

    def show(text: str) -> None:
        print(text, end="", flush=True)

    result = generate(
        model, tokenizer, prompt, max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p,
        seed=args.seed, raw=args.raw, on_text=None if args.json else show, decoder=decoder, kv=args.kv,
    )  # fmt: skip
    if args.json:
        out = {
            "prompt": prompt,
            "text": result.text,
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": result.new_tokens,
            "seconds": round(result.seconds, 3),
            "tokens_per_second": round(result.tokens_per_second, 3),
            "prompt_tokens_per_second": round(result.prompt_tokens_per_second, 3),
            "decode_tokens_per_second": round(result.decode_tokens_per_second, 3),
            "decoder": "native" if decoder else "transformers",
            "decoder_reason": reason,
            "kernels": kernels,
            "activations": activations,
            "isa": native.isa(),
            "threads": torch.get_num_threads(),
            "weights_bytes": round(size * 1e6),
            "kv": args.kv,
            "kv_memory": result.cache,
        }
        print(json.dumps(out, ensure_ascii=False, indent=1))
    else:
        print()
    print(
        f"{result.new_tokens} tokens in {result.seconds:.1f} s: {result.tokens_per_second:.2f} tokens/s (prompt of "
        f"{result.prompt_tokens}: {result.prompt_tokens_per_second:.1f} tokens/s, then {result.decode_tokens_per_second:.1f})",
        file=sys.stderr,
    )
    if result.cache is not None:
        print(_cache_line(args.kv, result.cache), file=sys.stderr)
    return 0


def _cache_line(name: str, memory: dict[str, Any]) -> str:
    """What a cache holds, in a line."""
    used = memory["packed"] + memory["metadata"] + memory["residual"]
    bits = memory["bits_per_value"]
    encoded = f"{bits:.2f} bits a value where encoded" if bits else "too short to encode any"
    return (
        f"cache {name}: {memory['tokens']} tokens, {encoded}; {used / 1e6:.1f} MB with the latest tokens, "
        f"{memory['equivalent'] / 1e6:.1f} MB in 16 bits"
    )


def _decoder(model: Any, kv: str | None = None) -> tuple[Any, str]:
    """The native loop for a model, or None and why not."""
    from numfit.runtime.generate import why_not_native
    from numfit.runtime.native_decoder import build

    if kv is not None:
        return None, f"the native loop keeps a cache of its own, not {kv}"
    reason = why_not_native(model.generation_config)
    return (None, reason) if reason else build(model)

