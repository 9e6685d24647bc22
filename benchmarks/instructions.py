"""How many instructions a kernel executes for 64 weights of one token, by counting every one of them.

    python benchmarks/instructions.py [--library FILE] [--isa avx512] [--mode int8|exact] [FORMAT ...]

A traced child process applies a matrix of 16 rows and one of 16 more block of rows; the parent steps through both calls, an
instruction at a time (ptrace), and looks each address up in a disassembly of the library (objdump). The difference is what
rows cost: quantizing the activations, which all rows share, and everything that Python does cancel out. So this is exact, and
the same on a busy or virtual machine, where hardware counters do not exist. It runs on Linux on x86-64.

Columns: instructions in all; table lookups (`vperm*`, `vpshufb`: one a cycle at best); dot products (`vpdpbusd`,
`vpmaddubsw`: one or two a cycle); other vector instructions; scalar ones; prefetches. `bytes` are what the kernel reads for
those 64 weights. A core that executes up to four vector-related instructions in a cycle and reads B bytes in it is bound by
memory as long as instructions / 4 < bytes / B.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import ctypes
import os
import re
import signal
import subprocess

import torch

import numfit
from numfit import native
from numfit.kernels.packed import ACTIVATIONS, PackedLinear

FORMATS = ("int4-g64", "nf4-g64", "mant4-g64", "mant4-g32@e3m3", "fp4.25", "fp5.33", "pot3-g64", "pot2-g64", "int8-g64")
COLUMNS = 14400  # of the matrix: whole tiles of 64 and of 48, and a row as long as those of large models
BLOCKS = 4  # of 16 rows, that are counted
TRACEME, CONT, KILL, SINGLESTEP, GETREGS = 0, 7, 8, 9, 12
RIP = 16  # its place among the words of user_regs_struct

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes, _ptrace.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long


def disassembly(path: str) -> tuple[list[int], list[str]]:
    """Addresses in the file and the instruction that starts at each."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout
    found = [(int(m[1], 16), m[2]) for m in re.finditer(r"^ +([0-9a-f]+):\t(\S+)", text, re.MULTILINE)]
    return [a for a, _ in found], [name for _, name in found]


def mapped(path: str) -> tuple[int, int]:
    """Where the library lies in this process: its first address and the one past its last."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(os.path.realpath(path))]
    return int(spans[0][0], 16), int(spans[-1][1], 16)


def kind(name: str) -> str:
    if name.startswith(("vperm", "vpshufb")):
        return "lookup"
    if name.startswith(("vpdp", "vpmadd", "tdp")):
        return "dot"
    if name.startswith("prefetch"):
        return "prefetch"
    return "vector" if name.startswith(("v", "k", "tile")) else "scalar"


def addresses(packed: PackedLinear, mode: int, low: int, high: int) -> collections.Counter[int]:
    """Address in the library → how often it is executed in one call."""
    (n, k), error = packed.shape, ctypes.create_string_buffer(native.ERROR_BYTES)
    x, y = torch.randn(1, k), torch.empty(1, n)
    arguments = (packed.handle, x.data_ptr(), 1, k, y.data_ptr(), n, None, mode, error)
    apply = native.library().nf_apply
    apply(*arguments)
    child = os.fork()
    if child == 0:
        _ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        apply(*arguments)
        os._exit(0)
    os.waitpid(child, 0)
    counts: collections.Counter[int] = collections.Counter()
    registers = (ctypes.c_ulonglong * 27)()
    while True:
        if _ptrace(SINGLESTEP, child, None, None):
            raise OSError(ctypes.get_errno(), "this system does not let a process trace its child")
        if os.WIFEXITED(os.waitpid(child, 0)[1]):
            return counts
        _ptrace(GETREGS, child, None, ctypes.addressof(registers))
        if low <= registers[RIP] < high:
            counts[registers[RIP] - low] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", default=FORMATS)
    parser.add_argument("--library", metavar="FILE", help="a build of the library under test, in place of the package's own")
    parser.add_argument("--isa", help="an instruction set, in place of the best")
    parser.add_argument("--mode", choices=ACTIVATIONS, default="int8")
    args = parser.parse_args()
    if args.library:
        native.load(args.library)
    library = native.library()
    if library is None:
        parser.error("numfit's CPU kernels are not in this installation, so there is nothing to count")
    if args.isa:
        native.set_isa(args.isa)
    torch.set_num_threads(1)
    native.set_threads(1)
    path = library._name
    at, names = disassembly(path)
    low, high = mapped(path)
    kinds = ("lookup", "dot", "vector", "scalar", "prefetch")
    print(f"instructions for 64 weights, {native.isa()}, activations {args.mode}")
    print(f"{'':16}{'all':>8}" + "".join(f"{name:>10}" for name in kinds) + f"{'bytes':>8}")
    for name in args.formats:
        packed = [
            PackedLinear.pack(numfit.quantize_tensor(torch.randn(16 * rows, COLUMNS), name, scale_rule="absmax"))
            for rows in (1, 1 + BLOCKS)
        ]
        few, many = (addresses(p, ACTIVATIONS.index(args.mode), low, high) for p in packed)
        many.subtract(few)
        found: collections.Counter[str] = collections.Counter()
        for address, count in many.items():
            found[kind(names[bisect.bisect_right(at, address) - 1])] += count
        units = BLOCKS * 16 * COLUMNS / 64
        size = (packed[1].nbytes - packed[0].nbytes) / units
        print(
            f"{name:16}{sum(found.values()) / units:8.2f}"
            + "".join(f"{found[k] / units:10.2f}" for k in kinds)
            + f"{size:8.1f}"
        )


if __name__ == "__main__":
    main()
