"""`numfit eval`: how good a model is on a text, and how far from its reference."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

NAME = "eval"
HELP = "perplexity, bits per byte, and KL against a reference"
EPILOG = """\
examples:
  numfit eval my-model --text valid.txt
  numfit eval my-model-mant4 --text valid.txt --reference my-model
  numfit eval my-model-mant4 --text valid.txt --reference my-model --keep-reference ref.d   # next time is quicker
  numfit eval my-model-mant4 --text valid.txt --reference my-model --json | jq .kl_mean
  numfit eval my-model --text valid.txt --windows 2 --context 256         # a quick look
  numfit eval my-model --text valid.txt --reference my-model --kv kv4     # what an encoded cache costs

DIR and REF are Hugging Face directories, quantized or not. The text is cut into evenly spaced windows that do not
overlap; every position but the first of each is scored, and models that need a BOS token (Gemma) get one a window.
Compare perplexities on the same text and windows only. KL(reference || model) is in nats over the full vocabulary; a KL
below the noise floor (the reference against itself, its layers' outputs disturbed by 1 part in 512) means nothing.
The reference's log-probabilities take tokens x vocabulary x 4 bytes of disk while it runs (8 x 1024 x 49152: 1.6 GB).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a numfit checkpoint or any Hugging Face directory")
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file")
    parser.add_argument("--reference", metavar="REF", help="what to compare with, usually the unquantized model")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="number of windows (default 8)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens a window (default 1024)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows a forward pass (default 1)")
    parser.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16, float16, or auto (as config.json)"
    )
    parser.add_argument(
        "--activations", default="int8", choices=("int8", "exact", "reference"),
        help="what computes packed layers on a CPU: kernels with int8 activations (default, as 'numfit run'), kernels with "
        "exact ones, or PyTorch",
    )  # fmt: skip
    parser.add_argument(
        "--kv", metavar="CACHE",
        help="see the text through an encoded cache: kv8, kv4, kv4-rot, kv3, mant4, mant4+, or KEYS,VALUES (docs/kvcache.md)",
    )  # fmt: skip
    parser.add_argument("--kv-chunk", type=int, default=64, metavar="N", help="tokens a pass with --kv (default 64)")
    parser.add_argument("--device", metavar="DEVICE", help="where to run, for instance cuda (default: the CPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "--keep-reference", metavar="DIR",
        help="keep the reference's log-probabilities in this directory, and use them when they are already there",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from numfit.errors import OptionError
    from numfit.evaluation import Reference, evaluate
    from numfit.evaluation.measure import check_cache
    from numfit.evaluation.reference import check_directory
    from numfit.text import read_text
    from numfit.threads import cpu_threads

    text = read_text(args.text)
    if args.keep_reference is not None and args.reference is None:
        raise OptionError("--keep-reference keeps the run of a reference: pass --reference REF as well")
    options = {
        "windows": args.windows, "context": args.context, "dtype": args.dtype, "device": args.device,
        "batch": args.batch,
    }  # fmt: skip
    cache = {"kv": args.kv, "kv_chunk": args.kv_chunk}
    check_cache(**cache)
    check_directory(args.model)
    with cpu_threads(args.threads):
        if args.reference is None:
            result = evaluate(args.model, text, activations=args.activations, **cache, **options)
        else:
            kept = Path(args.keep_reference) if args.keep_reference is not None else None
            with Reference(args.reference, text, directory=kept, **options) as reference:
                result = evaluate(args.model, text, reference=reference, activations=args.activations, **cache, **options)
    print(json.dumps(result, indent=1) if args.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, for people."""
    from numfit.report import pair_table

    size = f"{result['model_bytes'] / 1e6:.1f} MB" if result["model_bytes"] else "unknown"
    pairs = [("model", result["model"]), ("whole model", size)]
    if result["bits_per_weight"] is not None:
        pairs.append(("bits per weight", f"{result['bits_per_weight']:.4f} (quantized decoder weights)"))
    against = " (reference {:.4f})" if "reference" in result else ""
    bos = ", each behind BOS" if result["bos"] else ""
    pairs += [
        ("text", f"{result['windows']} windows of {result['context']}, {result['tokens']} tokens scored{bos}"),
        ("perplexity", f"{result['ppl']:.4f}" + against.format(result.get("reference_ppl"))),
        ("bits per byte", f"{result['bits_per_byte']:.4f}" + against.format(result.get("reference_bits_per_byte"))),
    ]
    if "reference" in result:
        floor = result["noise_floor"]
        pairs += [
            ("reference", result["reference"]),
            ("KL mean", f"{result['kl_mean']:.6f} ± {result['kl_se']:.6f} nats"),
            ("KL median", f"{result['kl_median']:.6f}"),
            ("KL p90", f"{result['kl_p90']:.6f}"),
            ("KL p99", f"{result['kl_p99']:.6f}"),
            ("top-1 agreement", percent(result["top1"])),
            (
                "noise floor",
                f"KL {floor['kl_mean']:.6f}, top-1 {percent(floor['top1'])} (first window)" if floor
                else "not measured: the reference has no list of decoder layers",
            ),
        ]  # fmt: skip
    if "kv" in result:
        memory = result["kv_memory"]
        bits = f"{memory['bits_per_value']:.4g} bits a value" if memory["bits_per_value"] else "nothing encoded"
        pairs.append(("cache", f"{result['kv']}, {bits}, in passes of {result['kv_chunk']} tokens"))
    for kernel, count in result["kernels"].items():
        pairs.append(("computed by", f"{kernel}: {count} tensors, {result['activations']} activations"))
    pairs.append(("time", f"{result['seconds']:.1f} s, loading {result['load_seconds']:.1f} s, in {result['dtype']}"))
    return pair_table(pairs)


def percent(share: float) -> str:
    """A share as a percentage, never rounded up to 100 %: 99.99 % agreement is not agreement."""
    return "100 %" if share == 1 else f"{math.floor(share * 1e4) / 1e2:.2f} %"
