"""Files that a verb writes into a folder of the user's choice: all or none, and never over what it did not write."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from meshwright.errors import InputError, Problem
from meshwright.files import write_atomic


def write_files(
    files: Mapping[str, str], folder: str | Path, *, record: str, writer: str, private: Collection[str] = ()
) -> list[Path]:
    """Write files by name into a folder, which is created if need be, and return their paths.

    Replaces all files that an earlier `writer` ("plan") left there, or none if a write fails; `record` is the name of
    the file that says which these are. Those in `private` can be read by their owner alone. Raises InputError, before
    anything is replaced, where a file of the same name was not written so or was changed since.
    """
    if str(folder) == "":
        raise InputError(Problem("command line: --write", "names no folder", "name one; '.' is this one"))
    root = Path(folder)
    written = _Written(root, record, writer)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            return written.replace_all(files, private)
    except OSError as error:
        raise InputError(Problem(str(root), f"cannot be written: {error.strerror}", "name another folder")) from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock of the folder: one process writes at a time."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Written:
    """What was written into a folder: file name -> digests (two while a write is under way), so that no other file is
    ever overwritten."""

    root: Path
    record: str
    writer: str

    def replace_all(self, files: Mapping[str, str], private: Collection[str]) -> list[Path]:
        """Write all files as drafts, then move them into place. If that is interrupted, the record has the digests of
        the old and the new files, and the next write removes the drafts."""
        root, drafts_begin = self.root, f".{self.writer}-"
        for draft in (*root.glob(f"{drafts_begin}*"), *root.glob(f".{self.record}.*.tmp")):
            shutil.rmtree(draft) if draft.is_dir() and not draft.is_symlink() else draft.unlink()
        old = self.read()
        self.check_conflicts(files, old)
        new = {name: sha256(text.encode()).hexdigest() for name, text in files.items()}
        with tempfile.TemporaryDirectory(prefix=drafts_begin, dir=root) as drafts:
            for name, text in files.items():
                mode = 0o600 if name in private else 0o644
                with os.fdopen(os.open(Path(drafts) / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                    file.write(text.encode())
            self._save({**old, **{name: [*old.get(name, []), digest] for name, digest in new.items()}})
            for name in files:
                os.replace(Path(drafts) / name, root / name)
        for name in set(old) - set(files):  # written by an earlier version, for example
            if self._conflict(name, old[name]) is None:
                (root / name).unlink(missing_ok=True)
        self._save({name: [digest] for name, digest in new.items()})
        return [root / name for name in files]

    def check_conflicts(self, files: Mapping[str, str], record: Mapping[str, list[str]]) -> None:
        problems = [problem for name in files if (problem := self._conflict(name, record.get(name))) is not None]
        if problems:
            raise InputError(problems)

    def read(self) -> dict[str, list[str]]:
        path = self.root / self.record
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            digests = {name: [value] if isinstance(value, str) else value for name, value in record.items()}
            lists = all(
                isinstance(value, list) and all(isinstance(d, str) for d in value) for value in digests.values()
            )
            if lists and all(self._stays_in_folder(name) for name in digests):
                return digests
        raise InputError(Problem(str(path), f"is not a record of a {self.writer}'s files", "name another folder"))

    def _save(self, record: Mapping[str, list[str]]) -> None:
        write_atomic(self.root / self.record, (json.dumps(record, indent=2) + "\n").encode())

    def _conflict(self, name: str, digests: list[str] | None) -> Problem | None:
        """Why a file must not be replaced; None where it does not exist or was written before."""
        path, near = self.root / name, "name another folder, or move it away"
        if not path.exists() and not path.is_symlink():
            return None
        if digests is None:
            return Problem(str(path), f"exists, and no {self.writer} wrote it", near)
        if path.is_symlink() or not path.is_file() or sha256(path.read_bytes()).hexdigest() not in digests:
            return Problem(str(path), f"was changed since the {self.writer} wrote it", near)
        return None

    def _stays_in_folder(self, name: str) -> bool:
        return Path(name).name == name and name not in ("", ".", "..", self.record)
