"""The manifest: data indexed once into mapped files, from which any batch of any step is read."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from meshwright.data import corpus, digits
from meshwright.data.batch import Batch, Rows, Samples, TokenWindows, window_count
from meshwright.data.order import batch_samples
from meshwright.data.sources import TextSource, file_digest, open_source
from meshwright.data.tokenizer import SIDE_FILES, Tokenizer
from meshwright.errors import InputError, Problem, RunFailed
from meshwright.files import has_its_digest, named_in_errors, sync_folder, with_digest, write_atomic

if TYPE_CHECKING:
    from meshwright.job import Job

logger = logging.getLogger("meshwright")

T = TypeVar("T")

VERSION = 2
SPLITS = ("train", "held_out")
MANIFEST_NAME = "manifest.json"
_MANIFEST_BYTES = 2**20
_CHANGED, _NEAR_CHANGED = "was changed since the run began", "bring it back, or use another run folder"


@dataclass(frozen=True)
class Survey:
    """Counts of a job's data, for `check`; `bytes` is of the documents. Broken records are in `problems`; then tokens
    and samples are 0. Images have no tokens."""

    source: str
    documents: int
    bytes: int
    duplicates: int
    empty: int = 0
    undecodable: int = 0
    tokens: int = 0
    vocab: int = 0
    held_out_documents: int = 0
    samples: int = 0
    held_out_samples: int = 0
    problems: tuple[Problem, ...] = ()


class Manifest:
    """Indexed data of a run, mapped read-only. Opening reads a few lines of JSON for data of any size."""

    def __init__(self, folder: Path, content: dict[str, Any], train: Samples, held_out: Samples) -> None:
        self.folder, self.content = folder, content  # of manifest.json: settings, source, and totals by split
        self._train, self._held_out = train, held_out

    @staticmethod
    def open(folder: Path | str) -> Manifest:
        """The manifest in `folder`. Raises InputError if there is none, or if a file has another size than it says."""
        folder = Path(folder)
        content = _read_content(folder)
        open_split = _open_tokens if content["kind"] == "text" else _open_rows
        try:
            return Manifest(folder, content, *(open_split(folder, content, split) for split in SPLITS))
        except (KeyError, TypeError, ValueError) as error:
            raise _no_manifest(folder, error) from error

    @property
    def samples(self) -> int:
        """Training samples per epoch."""
        return len(self._train)

    @property
    def held_out_samples(self) -> int:
        """Held-out samples; 0 if nothing is held out."""
        return len(self._held_out)

    def batch(
        self,
        seed: int,
        step: int,
        global_batch: int,
        start: int,
        stop: int,
        skips: Sequence[int] = (),
        shift: int = 0,
    ) -> Batch:
        """Samples at places start..stop of the batch of `step` (from 0), `global_batch` samples long.

        A language model gets input_ids, positions and targets, int64 [stop - start, seq_len]; a classifier inputs
        float32 [stop - start, ...] and targets int64 [stop - start]; a target of -100 does not count. `skips` lists
        batches that are never trained on; `shift` is what batches of other sizes consumed before, more than as many of
        this size would have. The same arguments always give the same arrays.
        """
        return self._train.take(batch_samples(self.samples, seed, step, global_batch, start, stop, skips, shift))

    def held_out(self, start: int, count: int) -> Batch:
        """`count` held-out samples from `start` on, in a fixed order; past the last come uncounted padding samples."""
        return self._held_out.take(np.arange(start, start + count))

    def held_out_bytes(self, start: int, count: int) -> int:
        """Bytes of text behind the counted targets of `held_out(start, count)`; 0 without text."""
        return self._held_out.text_bytes(np.arange(start, start + count))

    def text(self, split: str) -> bytes:
        """The text of "train" or "held_out" as bytes: its documents, joined without separators."""
        samples = self._held_out if split == "held_out" else self._train
        if not isinstance(samples, TokenWindows):
            raise InputError(Problem("data.source", "these are images, which have no text", 'nearest: "stdlib"'))
        ends = samples.documents[:, 0].tolist()
        tokenizer = self.tokenizer()
        documents = [samples.tokens[a : b - 1] for a, b in pairwise([0, *ends])]
        return "".join(tokenizer.decode_documents(documents)).encode()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text. Raises InputError if the data is not text."""
        return Tokenizer(self.side_files(), where=str(self.folder / "tokenizer"))

    def side_files(self) -> dict[str, bytes]:
        """Name -> content of the tokenizer's files, for a checkpoint; {} if the data is not text."""
        folder = self.folder / "tokenizer"
        return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}


def build_manifest(job: Job, folder: Path | str) -> Manifest:
    """The manifest in `folder` (a run's manifest/), built if it is missing. Any number of processes may call this.

    Raises InputError if the data is broken, empty or too short, or if `folder` was built from other data or changed
    since: a run keeps the data that it began with. To know, it reads the source and the folder once.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            _refuse_other_data(job, folder)
        else:
            draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                with named_in_errors(draft):
                    _build(job, draft)
                draft.chmod(0o755)
                sync_folder(draft)
                os.rename(draft, folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return Manifest.open(folder)


def survey(job: Job) -> Survey:
    """Reads and counts all of the job's data and writes nothing. Raises InputError like `build_manifest`, except that
    broken records are returned in `problems`."""
    if _kind(job) == "rows":
        images = digits.load(job.data.held_out)
        held_out, count = int(images.held_out.sum()), len(images.targets)
        rows = Survey("digits", count, images.inputs.nbytes, images.duplicates)
        return replace(rows, held_out_documents=held_out, samples=count - held_out, held_out_samples=held_out)
    source = open_source(job.data.source, job.data.text_key)
    scan = corpus.scan_source(source, job.data.held_out)
    counted = Survey(source.name, scan.documents, scan.bytes, scan.duplicates, scan.empty, scan.undecodable)
    if scan.broken:
        return replace(counted, problems=corpus.broken_records(scan, source))
    tokenizer, totals = _index(job, source, scan, None)
    tokens = {split: totals[split]["tokens"] for split in SPLITS}
    return replace(
        counted,
        tokens=sum(tokens.values()),
        vocab=tokenizer.vocab,
        held_out_documents=totals["held_out"]["documents"],
        samples=window_count(tokens["train"], _seq_len(job)),
        held_out_samples=window_count(tokens["held_out"], _seq_len(job)),
    )


def _index(
    job: Job, source: TextSource, scan: corpus.Scan, folder: Path | None
) -> tuple[Tokenizer, dict[str, dict[str, int]]]:
    """The tokenizer and the totals by split; writes the token files to `folder` if there is one."""
    corpus.refuse_broken(scan, source)
    tokenizer = corpus.make_tokenizer(job.data.tokenizer, job.model, source, scan)
    totals = corpus.pack(source, scan, tokenizer, folder)
    corpus.refuse_too_short(totals["train"]["tokens"], _seq_len(job))
    return tokenizer, totals


def _seq_len(job: Job) -> int:
    assert job.data.seq_len is not None, "a Job with a language model has a seq_len"
    return job.data.seq_len


def _kind(job: Job) -> str:
    if job.task.name == "language-model":
        return "text"
    if job.data.source != "digits":
        what = f"a classifier cannot learn from {job.data.source!r}"
        raise InputError(Problem("data.source", what, 'nearest: "digits", or task.name = "language-model"'))
    return "rows"


def _build(job: Job, folder: Path) -> None:
    content = _build_text(job, folder) if _kind(job) == "text" else _build_rows(job, folder)
    content["files"] = {str(file.relative_to(folder)): file_digest(file) for file in _files(folder)}
    text = json.dumps({"version": VERSION, **content}, indent=2) + "\n"
    for file in _files(folder):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    write_atomic(folder / MANIFEST_NAME, with_digest(text.encode()))


def _files(folder: Path) -> list[Path]:
    """Every file of the folder but its manifest.json, in the order of names."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MANIFEST_NAME]


def _build_text(job: Job, folder: Path) -> dict[str, Any]:
    source = open_source(job.data.source, job.data.text_key)
    scan = corpus.scan_source(source, job.data.held_out)
    tokenizer, totals = _index(job, source, scan, folder)
    (folder / "tokenizer").mkdir()
    for name, text in tokenizer.side_files().items():
        (folder / "tokenizer" / name).write_bytes(text)
    lengths = tokenizer.byte_lengths()
    if lengths is not None:
        (folder / "byte_lengths.bin").write_bytes(lengths.astype("<u2").tobytes())
    if scan.undecodable:
        logger.warning("%s: %d files or records are not UTF-8 and were left out", source.name, scan.undecodable)
    if not totals["held_out"]["documents"] and job.data.held_out:
        logger.warning("%s is one document: nothing can be held out to measure on", source.name)
    return {
        "kind": "text",
        "settings": _settings(job, corpus.tokenizer_identity(job.data.tokenizer)),
        "source": source.fingerprint(),
        "seq_len": _seq_len(job),
        "vocab": tokenizer.vocab,
        "eos": tokenizer.eos,
        "exact_bytes": lengths is not None,
        "found": {key: value for key, value in asdict(scan).items() if isinstance(value, int)},
        "splits": totals,
    }


def _build_rows(job: Job, folder: Path) -> dict[str, Any]:
    images = digits.load(job.data.held_out)
    splits = {}
    for split, mine in (("train", ~images.held_out), ("held_out", images.held_out)):
        (folder / f"{split}.inputs.bin").write_bytes(images.inputs[mine].astype("<f4").tobytes())
        (folder / f"{split}.targets.bin").write_bytes(images.targets[mine].astype("<i8").tobytes())
        splits[split] = {"samples": int(mine.sum())}
    return {
        "kind": "rows",
        "settings": _settings(job, ""),
        "source": {"files": 0, "bytes": int(images.inputs.nbytes), "digest": ""},
        "shape": list(images.inputs.shape[1:]),
        "classes": digits.CLASSES,
        "splits": splits,
    }


def _settings(job: Job, tokenizer: str) -> dict[str, Any]:
    """The settings, besides the source, that determine the files of a manifest. `tokenizer` is its identity."""
    if _kind(job) == "rows":
        return {"kind": "rows", "held_out": job.data.held_out}
    return {
        "kind": "text",
        "tokenizer": tokenizer,
        "vocab": corpus.model_vocab(job.model),
        "held_out": job.data.held_out,
        "seq_len": job.data.seq_len,
    }


def _refuse_other_data(job: Job, folder: Path) -> None:
    content = _read_content(folder)
    near = f"use another run folder, or remove {folder}"
    keys = {"tokenizer": "data.tokenizer", "vocab": "model.vocab"}
    before = content["settings"]
    now = _settings(job, _tokenizer_now(job, before.get("tokenizer", ""), folder))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    problems = [
        Problem(keys.get(key, f"data.{key}"), f"is {now.get(key)!r}, but the run began with {before.get(key)!r}", near)
        for key in changed
    ]
    if not problems and content["kind"] == "text":
        source = _if_there(lambda: open_source(job.data.source, job.data.text_key))
        if source is not None and not source.has_fingerprint(content["source"]):
            problems = [Problem("data.source", f"{source.name!r} is not what it was when the run began", near)]
    problems += _changed_files(folder, content)
    if problems:
        raise InputError(problems)


def check_manifest(folder: Path) -> None:
    """Checks the digest of every file of the manifest in `folder`. Raises InputError naming those that differ."""
    if problems := _changed_files(folder, _read_content(folder)):
        raise InputError(problems)


def _changed_files(folder: Path, content: dict[str, Any]) -> list[Problem]:
    return [
        Problem(str(folder / name), _CHANGED, _NEAR_CHANGED)
        for name, digest in content["files"].items()
        if file_digest(folder / name) != digest
    ]


def _tokenizer_now(job: Job, before: str, folder: Path) -> str:
    """The identity of the job's tokenizer; `before`, which the manifest in `folder` has, where that is the same one.

    Earlier manifests have the path in place of the digest; they keep the files, too, and these can be compared.
    """
    if before == job.data.tokenizer:
        return before
    now, kept = _if_there(lambda: corpus.tokenizer_identity(job.data.tokenizer)), folder / "tokenizer"
    if now is None or (kept.is_dir() and now == corpus.tokenizer_identity(str(kept))):
        return before
    return now


def _if_there(read: Callable[[], T]) -> T | None:
    """What `read` returns, None if it cannot be opened any more: the manifest is enough to continue a run."""
    try:
        return read()
    except (InputError, RunFailed) as error:
        logger.warning("%s; going on with the data as indexed", error)
        return None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A lock for one process at a time; the kernel releases it if that process dies."""
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise ValueError("too large")
        data = path.read_bytes()
        content = json.loads(data)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this program reads {VERSION}")
        if content["kind"] not in ("text", "rows") or set(content["splits"]) != set(SPLITS):
            raise ValueError("unknown kind or splits")
        if not isinstance(content["files"], dict):
            raise ValueError("files are no table")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_manifest(folder, error) from error
    if has_its_digest(data) is False:  # the manifest of an older run has none
        raise InputError(Problem(str(path), _CHANGED, _NEAR_CHANGED))
    return {key: value for key, value in content.items() if key != "sha256"}


def _no_manifest(folder: Path, error: Exception) -> InputError:
    words = f"is no data manifest: {type(error).__name__}: {error}"
    return InputError(Problem(str(folder / MANIFEST_NAME), words, "remove the folder to build anew"))


def _map(path: Path, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """The file at `path` as a read-only array. Raises InputError unless its size is that of `shape`."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    try:
        file_size = path.stat().st_size
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    if file_size != size:
        raise InputError(
            Problem(str(path), f"has {file_size} bytes instead of {size}", "remove the folder to build anew")
        )
    if size == 0:
        return np.zeros(shape, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r", shape=shape)


def _open_tokens(folder: Path, content: dict[str, Any], split: str) -> TokenWindows:
    totals, vocab = content["splits"][split], content["vocab"]
    if content["seq_len"] < 1:
        raise ValueError(f"seq_len is {content['seq_len']}")
    return TokenWindows(
        tokens=_map(folder / f"{split}.tokens.bin", corpus.token_type(vocab), (totals["tokens"],)),
        documents=_map(folder / f"{split}.documents.bin", "<u8", (totals["documents"], 2)),
        seq_len=content["seq_len"],
        eos=content["eos"],
        byte_lengths=_map(folder / "byte_lengths.bin", "<u2", (vocab,)) if content["exact_bytes"] else None,
    )


def _open_rows(folder: Path, content: dict[str, Any], split: str) -> Rows:
    samples = content["splits"][split]["samples"]
    return Rows(
        inputs=_map(folder / f"{split}.inputs.bin", "<f4", (samples, *content["shape"])),
        targets=_map(folder / f"{split}.targets.bin", "<i8", (samples,)),
    )
