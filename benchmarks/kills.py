"""Kill a real run at random moments, start it again each time, and compare the result with an uninterrupted run's.

    python benchmarks/kills.py MODEL [--format mant4-g64] [--kills 12] [--seed 0]

Every run is `numfit quantize` in a process of its own, ended by SIGKILL after a random part of the time that the
uninterrupted run took. Prints how many tensors each run found done, and the comparison of all files, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import random
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
        killed = 0
        while killed < args.kills:
            run = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait = draw.uniform(0.1, 0.6) * seconds
            try:
                run.wait(wait)
                print(f"run ended by itself before kill {killed + 1}; starting over")
                if run.returncode:
                    return 1
                for path in sorted(broken.iterdir()):
                    path.unlink()
                broken.rmdir()
                continue
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
            killed += 1
            journal = broken.with_name("broken.partial") / "journal.jsonl"
            done = journal.read_bytes().count(b"\n") if journal.exists() else 0
            print(f"kill {killed:2} after {wait:4.1f} s: {done} tensors recorded", flush=True)
        subprocess.run([*command, str(broken)], check=True, capture_output=True)
        one, two = digests(whole), digests(broken)
        for name in sorted(one.keys() | two.keys()):
            print(f"{'same' if one.get(name) == two.get(name) else 'DIFFERENT':9} {name}")
        return 0 if one == two else 1


if __name__ == "__main__":
    sys.exit(main())
