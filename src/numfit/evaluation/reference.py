"""The reference of a comparison: run once, its log-probabilities kept on disk, many models measured against it.

KL over a full vocabulary needs the reference's whole distribution at every position: 8 windows of 1024 and a
vocabulary of 49 152 are 1.6 GB in fp32. Keeping them in a file means that the reference and the model are never in
memory together and that seven models cost one reference run, for the price of that disk space. By default the file has
no name and vanishes with the process, however that ends; in a directory of the caller's it stays, and is used again as
long as the reference's files, text, windows and precision are the same.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from numfit.errors import CheckpointError, NumfitError, OptionError
from numfit.evaluation.forward import layer_noise
from numfit.evaluation.metrics import divergence, summarize_divergence, summarize_losses
from numfit.evaluation.scoring import dtype_name, score, scored_bytes
from numfit.structure.modules import decoder_layers
from numfit.text import bos_token, check_windows, read_text, token_windows

METRICS_VERSION = 1  # of what is stored and how it was computed; a kept reference of another version is not used
_DATA, _DESCRIPTION = "logprobs.f32", "reference.json"


def as_text(text: str | Path) -> str:
    """The text itself: what a Path, or a string naming an existing file, holds; any other string as it is."""
    if isinstance(text, Path):
        return read_text(text)
    return read_text(text) if os.path.isfile(text) else text  # isfile: False for what cannot be a path at all


def check_directory(directory: str | Path) -> Path:
    """The path of a model directory; CheckpointError when there is no such directory, or a GGUF file instead."""
    path = Path(directory)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and eval needs a model directory: make one of a GGUF file with "
            f"'numfit convert {path} -o DIR'"
        )
    if not path.is_dir():
        raise CheckpointError(f"the model directory {path} does not exist: pass a Hugging Face or numfit directory")
    return path


def load_model(
    directory: str | Path, dtype: str | torch.dtype, device: Any, activations: str = "int8"
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a numfit checkpoint or plain Hugging Face directory.

    Raises:
        CheckpointError: see `check_directory`; and all that numfit.load says about what it cannot load.
    """
    path = check_directory(directory)
    from numfit import runtime

    return runtime.load(path, dtype=dtype_name(dtype), device=device, activations=activations)


def model_windows(model: Any, tokenizer: Any, text: str, windows: int, context: int) -> tuple[Tensor, bool]:
    """The windows this model is scored on, int64 [windows, context], and whether they begin with BOS.

    Raises:
        OptionError: the text is too short, or the context longer than the model's.
        CheckpointError: the tokenizer is another model's.
    """
    config = model.config.get_text_config()
    bos = bos_token(tokenizer, getattr(config, "model_type", ""))
    ids = token_windows(tokenizer, text, windows, context, bos)
    check_windows(ids, config)
    return ids, bos is not None


class Reference:
    """A model's log-probabilities on the windows of a text: what other models are compared with.

        with Reference("dir", Path("valid.txt")) as reference:
            for model in models:
                print(evaluate(model, Path("valid.txt"), reference=reference)["kl_mean"])

    Attributes:
        name: the directory given. windows: int64 [n, context]. vocabulary: tokens → ids. width: logits a position.
        summary: nll, ppl, bits_per_byte of the reference itself.
        noise_floor: the KL and top-1 of the reference against itself with its layers' outputs disturbed
            (`layer_noise`), on the first window only; None when it was not asked for or no decoder layers were found.
    """

    def __init__(
        self,
        model_dir: str | Path,
        text: str | Path,
        *,
        windows: int = 8,
        context: int = 1024,
        dtype: str | torch.dtype = "float32",
        device: Any = None,
        batch: int = 1,
        noise_floor: bool = True,
        directory: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        """Run the reference, or take up a kept run of the same reference on the same text.

        Args:
            model_dir: a Hugging Face or numfit directory.
            text: a path, or the text itself.
            windows: number of windows. context: tokens a window.
            dtype: what the model computes in; losses are always computed in fp32.
            device: where, None for the loader's choice. batch: windows a forward pass.
            noise_floor: also measure the self-noise floor (one more window).
            directory: keep the log-probabilities here; None deletes them with the object.
            progress: show progress on stderr.

        Raises:
            NumfitError: text, model or directory are not what they should be, or the disk is too small.
        """
        self.name = str(model_dir)
        self._file: IO[bytes] | None = None
        content = as_text(text)
        self._directory = Path(directory) if directory is not None else None
        key = {
            "metrics_version": METRICS_VERSION,
            "files": _fingerprint(Path(model_dir)),
            "text_sha256": hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest(),
            "windows": windows,
            "context": context,
            "dtype": dtype_name(dtype),
            "noise_floor": noise_floor,
        }
        if self._directory is not None and self._take_up(self._directory, key):
            return
        model, tokenizer = load_model(model_dir, dtype, device)
        try:
            self.windows, self.has_bos = model_windows(model, tokenizer, content, windows, context)
            self.vocabulary: dict[str, int] = dict(tokenizer.get_vocab())
            self.width = 0
            begun = time.monotonic()
            losses = score(model, self.windows, self._write, name="reference", batch=batch, progress=progress)
            self.summary = summarize_losses(losses, scored_bytes(tokenizer, self.windows))
            self.noise_floor = self._measure_floor(model, progress) if noise_floor else None
            self.seconds = time.monotonic() - begun
        except BaseException:
            self.close()
            if self._directory is not None:
                (self._directory / (_DATA + ".part")).unlink(missing_ok=True)
            raise
        finally:
            del model
            release_memory()
        if self._directory is not None:
            self._describe(key)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk space (a kept directory stays)."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, window: int, begin: int, end: int, device: Any = "cpu") -> Tensor:
        """Log-probabilities at positions begin … end - 1 of a window, fp32 [end - begin, V]."""
        if self._file is None:
            raise NumfitError(f"the reference {self.name} was closed: make it anew")
        out = np.empty((end - begin, self.width), dtype=np.float32)
        self._file.seek(self._offset(window, begin))
        if self._file.readinto(out.data.cast("B")) != out.nbytes:  # type: ignore[attr-defined]
            raise NumfitError(f"the log-probabilities of the reference {self.name} end too early: make them anew")
        return torch.from_numpy(out).to(device)

    def check_same_tokens(self, name: str, windows: Tensor, vocabulary: dict[str, int]) -> None:
        """NumfitError unless text and ids mean the same to both: KL compares distributions over the same tokens."""
        other = {i: token for token, i in vocabulary.items()}
        for token, i in self.vocabulary.items():
            if other.get(i, token) != token:
                raise NumfitError(
                    f"{name} and the reference {self.name} have different vocabularies (id {i} is {other[i]!r} in "
                    f"the one and {token!r} in the other): KL needs a reference with the same tokenizer"
                )
        if not torch.equal(self.windows, windows):
            window = int((self.windows != windows).nonzero()[0, 0])  # shapes are equal: both are asked for n × context
            raise NumfitError(
                f"{name} and the reference {self.name} cut the text into different tokens (first in window {window}): "
                "KL needs the same tokenizer and text"
            )

    def _offset(self, window: int, position: int) -> int:
        return (window * (self.windows.shape[1] - 1) + position) * self.width * 4

    def _write(self, window: int, begin: int, _end: int, log_probs: Tensor) -> None:
        if self._file is None:
            self.width = log_probs.shape[-1]
            self._file = self._create(self._offset(self.windows.shape[0], 0))
        try:
            self._file.seek(self._offset(window, begin))
            self._file.write(log_probs.cpu().contiguous().numpy().data.cast("B"))
        except OSError as error:
            why = error.strerror or error
            raise NumfitError(f"writing the reference's log-probabilities failed: {why}; {_ELSEWHERE}") from None

    def _create(self, size: int) -> IO[bytes]:
        where = self._directory or Path(tempfile.gettempdir())
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(where).free) < size:
                raise NumfitError(
                    f"the reference's log-probabilities need {size / 1e9:.1f} GB, but {where} has {free / 1e9:.1f} GB "
                    f"free: {_ELSEWHERE}"
                )
            if self._directory is None:
                return tempfile.TemporaryFile(prefix="numfit-reference-")
            return open(self._directory / (_DATA + ".part"), "w+b")
        except OSError as error:
            raise NumfitError(f"cannot write to {where}: {error.strerror}; {_ELSEWHERE}") from None

    def _measure_floor(self, model: Any, progress: bool) -> dict[str, float] | None:
        if not decoder_layers(model):
            return None
        parts: list[tuple[Tensor, Tensor]] = []

        def compare(window: int, begin: int, end: int, log_probs: Tensor) -> None:
            parts.append(divergence(self.read(window, begin, end, log_probs.device), log_probs))

        with layer_noise(model):
            score(model, self.windows[:1], compare, name="noise floor", progress=progress)
        return summarize_divergence(torch.cat([kl for kl, _ in parts]), torch.cat([same for _, same in parts]))

    def _describe(self, key: dict[str, Any]) -> None:
        """Give the kept run its final names, description last: only a complete run is ever taken up."""
        assert self._directory is not None and self._file is not None
        self._file.flush()
        os.replace(self._directory / (_DATA + ".part"), self._directory / _DATA)
        description = {
            "key": key,
            "width": self.width,
            "has_bos": self.has_bos,
            "summary": self.summary,
            "noise_floor": self.noise_floor,
            "seconds": self.seconds,
            "token_ids": self.windows.tolist(),
            "vocabulary": self.vocabulary,
        }
        part = self._directory / (_DESCRIPTION + ".part")
        part.write_text(json.dumps(description, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, self._directory / _DESCRIPTION)

    def _take_up(self, directory: Path, key: dict[str, Any]) -> bool:
        """True when `directory` holds this very run; False when it is free for a new one."""
        path = directory / _DESCRIPTION
        if not path.is_file():
            leftovers = {_DATA, _DATA + ".part", _DESCRIPTION + ".part"}  # of a run that was killed
            if directory.exists() and (not directory.is_dir() or {f.name for f in directory.iterdir()} - leftovers):
                raise OptionError(f"--keep-reference {directory} holds something else: pass a new or empty directory")
            return False
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in key if kept["key"].get(name) != json.loads(json.dumps(key[name]))]
            if not changed:
                self.width, self.has_bos, self.seconds = kept["width"], kept["has_bos"], kept["seconds"]
                self.summary, self.noise_floor = kept["summary"], kept["noise_floor"]
                self.windows = torch.tensor(kept["token_ids"], dtype=torch.int64)
                self.vocabulary = kept["vocabulary"]
                self._file = open(directory / _DATA, "rb")  # noqa: SIM115 (closed by close)
                whole = self._offset(self.windows.shape[0], 0) == os.fstat(self._file.fileno()).st_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the reference kept in {directory} is damaged ({error}): delete that directory"
            ) from None
        if changed:
            raise OptionError(
                f"--keep-reference {directory} holds a run that differs in {', '.join(changed)}: "
                "pass another directory, or delete this one"
            )
        if not whole:
            self.close()
            raise CheckpointError(f"{directory / _DATA} has the wrong size: delete {directory}")
        return True


_ELSEWHERE = "free some space, or pass --keep-reference DIR on a larger disk (fewer --windows need less)"


def _fingerprint(directory: Path) -> Sequence[Sequence[Any]]:
    """Name, size and modification time of the files: enough to notice a change without reading gigabytes."""
    if not directory.is_dir():
        return []
    files = sorted(f for f in directory.iterdir() if f.is_file())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def release_memory() -> None:
    """Return a dropped model's memory before the next is loaded (call after deleting the last name of it)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
