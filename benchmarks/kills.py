"""Kill a real run at random moments, start it again each time, and compare the result with an uninterrupted run's.

    python benchmarks/kills.py MODEL [--format mant4-g64] [--kills 12] [--seed 0]

Every run is `numfit quantize` in a process of its own, ended by SIGKILL after a random part of the time that the
uninterrupted run took. A run that finishes before its kill is compared too, byte for byte, and the next kills fall on a new
one; each comparison says how many kills its result had survived.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="mant4-g64")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as work:
        whole, broken = Path(work) / "whole", Path(work) / "broken"
        command = [sys.executable, "-m", "numfit.cli.main", "quantize", args.model, "-f", args.format, "-o"]
        start = time.monotonic()
        subprocess.run([*command, str(whole)], check=True, capture_output=True)
        seconds = time.monotonic() - start
        print(f"uninterrupted: {seconds:.1f} s")
        reference = digests(whole)
        killed = survived = 0
        while True:
            run = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            last = killed == args.kills
            wait = draw.uniform(0.1, 0.6) * seconds
            try:
                if run.wait(None if last else wait):
                    print("a run failed")
                    return 1
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                killed, survived = killed + 1, survived + 1
                journal = broken.with_name("broken.partial") / "journal.jsonl"
                done = journal.read_bytes().count(b"\n") if journal.exists() else 0
                print(f"kill {killed:2} after {wait:4.1f} s: {done} tensors recorded", flush=True)
                continue
            found = digests(broken)
            different = sorted(n for n in found.keys() | reference.keys() if found.get(n) != reference.get(n))
            verdict = f"DIFFERENT: {', '.join(different)}" if different else f"all {len(found)} files the same"
            print(f"finished after {survived} kills: {verdict}", flush=True)
            if different or last:
                return bool(different)
            shutil.rmtree(broken)
            survived = 0


if __name__ == "__main__":
    sys.exit(main())
