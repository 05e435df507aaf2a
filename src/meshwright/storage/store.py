"""One store: the objects below a URL, through fsspec, with errors in our words."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from meshwright.errors import InputError, MeshwrightError, Problem, RunFailed, nearest_name
from meshwright.files import named_in_errors, sync_folder
from meshwright.storage.url import url_fault

#: Bytes that a stream asks the store for at once.
READ_BYTES = 8 << 20
#: Names under which stores list a tag that changes whenever an object's content does.
_TAGS = ("ETag", "etag", "md5Hash")
#: An error of this machine's disk, which is not the store's.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: Bytes of a part of an S3 object, a few of which are sent or fetched at the same time; S3 takes so many parts at most.
PART_BYTES, _MOST_PARTS = 16 << 20, 10_000
#: What the clients of some protocols are told: to make folders, where objects' names alone do not; how many parts of a
#: file are in memory at the same time.
#: s3fs tries five times, and its client as often each time: a store that takes connections and does not answer would be
#: waited for six minutes.
_S3 = {
    "max_concurrency": 4,
    "default_block_size": PART_BYTES,
    "config_kwargs": {"retries": {"total_max_attempts": 2}},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "local": {"auto_mkdir": True},
    "s3": _S3,
    "s3a": _S3,
}
_EXTRAS = {"s3": "meshwright[s3]", "s3a": "meshwright[s3]"}
_NEAR_CREDENTIALS = "set the store's credentials, for S3 by AWS_PROFILE, or by AWS_ACCESS_KEY_ID and its secret"
_NEAR_ANSWER = "check the network, and for S3 AWS_ENDPOINT_URL and AWS_REGION; then try again"


@dataclass(frozen=True)
class Entry:
    """An object as the store lists it. `tag` changes with the content; "" where the store has none."""

    bytes: int
    tag: str


class Store:
    """The objects below `url`. Names are relative to it, with "/" between folders; "" is the object at `url` itself.

    An operation raises InputError where the object or bucket is missing or may not be used, and RunFailed where the
    store does not answer. Objects appear whole or not at all, on stores that promise it, as S3 does.
    """

    def __init__(self, url: str, system: Any, base: str) -> None:
        self.url, self._system, self._base = url.rstrip("/"), system, base.rstrip("/")
        self._in_parts = url.startswith(("s3://", "s3a://"))

    def place(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def is_object(self) -> bool:
        """Whether `url` is one object, and not a folder of them. Raises InputError where there is neither."""
        with _told(self.url):
            self._system.invalidate_cache()
            return bool(self._system.info(self._base)["type"] == "file")

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """Name -> entry of every object below `folder`, in the order of names; {} where there is none."""
        with _told(self.place(folder)):
            self._system.invalidate_cache()
            found = self._system.find(self._path(folder), detail=True)
        names = {path[len(self._base) :].lstrip("/"): info for path, info in found.items() if not path.endswith("/")}
        return {name: _entry(info) for name, info in sorted(names.items()) if info["type"] == "file"}

    def read(self, name: str, cap_bytes: int) -> bytes:
        """The content of a small object. Raises InputError where it is larger than `cap_bytes`."""
        with _told(self.place(name)), self._system.open(self._path(name), "rb", cache_type="none") as file:
            data = file.read(cap_bytes + 1)
        if len(data) > cap_bytes:
            raise InputError(Problem(self.place(name), f"is more than the {cap_bytes} bytes allowed"))
        return bytes(data)

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object."""
        with _told(self.place(name)):
            self._system.pipe_file(self._path(name), data)

    @contextmanager
    def open(self, name: str, expected: Entry) -> Iterator[BinaryIO]:
        """A stream of the object, read ahead in blocks. Raises InputError if it is no longer what was listed."""
        where = self.place(name)
        with _told(where):
            if _entry(self._system.info(self._path(name))) != expected:
                raise _changed(where)
            raw = self._system.open(self._path(name), "rb", block_size=READ_BYTES, cache_type="readahead")
        try:
            yield io.BufferedReader(_Told(raw, where), READ_BYTES)
        finally:
            raw.close()

    def upload(self, path: Path, name: str) -> None:
        """Uploads a file. To S3, one of two `PART_BYTES` or more goes in parts, several at once, which are given up
        where one fails; to other stores as their client does it."""
        size = path.stat().st_size  # a file that is missing here is no fault of the store
        parts = {"chunksize": max(PART_BYTES, -(-size // _MOST_PARTS))} if self._in_parts else {}
        with _told(self.place(name)):
            self._system.put_file(str(path), self._path(name), **parts)

    def download(self, name: str, path: Path) -> None:
        """Downloads an object to a new file, and waits until it is on the disk."""
        with named_in_errors(path), _told(self.place(name)):
            self._system.get_file(self._path(name), str(path))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are gone already count as deleted."""
        for name in names:
            with _told(self.place(name)):
                try:
                    self._system.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base


def open_store(url: str) -> Store:
    """The store below `url`. Connects when it is used. Raises InputError for a URL that is not of a store, and names
    the package where its protocol needs one that is missing."""
    fault = url_fault(url)
    if fault is not None:
        raise InputError(Problem("URL", *fault))
    protocol = url.partition("://")[0].lower()
    try:
        import fsspec
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise InputError(Problem(url, "needs the package fsspec", _pip("meshwright[s3]"))) from error
    if protocol not in {*known_implementations, *fsspec.registry}:
        near = nearest_name(protocol, ["s3", "gs", "abfs", "file"])
        raise InputError(Problem(url, f"{protocol!r} is no protocol of a store", near))
    try:
        options = _OPTIONS.get(protocol, {})
        system, base = url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        package = _EXTRAS.get(protocol)
        near = _pip(package) if package else str(known_implementations[protocol].get("err", error))
        raise InputError(Problem(url, f"needs a package for {protocol} that is not installed", near)) from error
    except Exception as error:  # each protocol refuses in its own words
        raise InputError(Problem(url, f"is not a URL of {protocol}: {_words(error)}")) from error
    return Store(url, system, base)


def _pip(package: str) -> str:
    return f"pip install '{package}'"


def _entry(info: Any) -> Entry:
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
    return Entry(int(info["size"]), tag.strip('"'))


def _changed(where: str) -> InputError:
    return InputError(Problem(where, "was changed while it was read", "let it be until the data is indexed"))


class _Told(io.RawIOBase):
    """A store's stream whose errors are in our words."""

    def __init__(self, raw: Any, where: str) -> None:
        self._raw, self._where = raw, where

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def readinto(self, buffer: Any) -> int:
        with _told(self._where):
            data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Puts what a store's client raises into our words; its clients share no tree of errors."""
    try:
        yield
    except MeshwrightError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise _refusal(error, where) from error


def _refusal(error: Exception, where: str) -> MeshwrightError:
    if type(error).__name__ in ("FileExpired", "FileExpiredError"):  # its tag is not the one that it was opened with
        return _changed(where)
    if isinstance(error, FileNotFoundError):
        return InputError(Problem(where, "the store has no such object or bucket", "name one that exists"))
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return InputError(Problem(where, f"the store refuses these credentials: {_words(error)}", _NEAR_CREDENTIALS))
    return RunFailed(Problem(where, f"the store did not answer as it should: {_words(error)}", _NEAR_ANSWER))


def _words(error: Exception) -> str:
    """The first line of an error, without the query or the user of a URL in it, which may be secret."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"\?\S*|(?<=//)[^/@\s]*@", "", lines[0])[:300] if lines else ""
    return text or type(error).__name__
