"""Sources of text: files that can be listed and read again, with the same documents in the same order."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from meshwright.errors import InputError, Problem
from meshwright.files import decode_text, is_utf16, unique_keys
from meshwright.storage import Entry, Store, is_url, open_store, url_fault

#: Longer documents are cut, so that a file without line ends cannot fill the memory.
DOCUMENT_BYTES = 16 * 2**20
#: A longer line of a .jsonl file is reported as a broken record.
RECORD_BYTES = 64 * 2**20
#: Folders of the standard library that are left out: packages installed beside it, and its tests.
NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")


@dataclass(frozen=True)
class Document:
    """One piece of text. `where` names the file, and the line or part where a file holds several."""

    where: str
    text: str


@dataclass(frozen=True)
class Unreadable:
    """Data that is not a document. `broken`: the record must be mended; otherwise it is left out and counted."""

    problem: Problem
    broken: bool


Documents = Iterator[Document | Unreadable]
DocumentReader = Callable[[BinaryIO, str], Documents]


class SourceFile(Protocol):
    """A file of a source: its bytes as a stream, which raises InputError where it cannot be read, and their number."""

    def open(self) -> AbstractContextManager[BinaryIO]: ...

    def size(self) -> int: ...


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    path: Path

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb") as file:
                yield file
        except OSError as error:
            raise InputError(Problem(str(self.path), f"cannot be read: {error.strerror}")) from error

    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class StoredFile:
    """An object of a store, streamed each time that it is read; refused where it is not what was listed."""

    store: Store
    name: str
    entry: Entry

    def open(self) -> AbstractContextManager[BinaryIO]:
        return self.store.open(self.name, self.entry)

    def size(self) -> int:
        return self.entry.bytes


@dataclass(frozen=True)
class TextSource:
    """Files in a fixed order, each with its name for messages and its reader; `alone`: one file, and not a folder."""

    name: str
    files: tuple[tuple[str, SourceFile, DocumentReader], ...]
    alone: bool = False

    def documents(self) -> Documents:
        """Every document, and an Unreadable for all other data. Raises InputError if a file cannot be opened."""
        for name, source, reader in self.files:
            with source.open() as file:
                start = file.read(4)
                if is_utf16(start):
                    yield Unreadable(Problem(name, "is UTF-16 text", "convert it to UTF-8"), False)
                    continue
                file.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)  # a byte order mark is no text
                yield from reader(file, name)

    def total_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size() for _, file, _ in self.files)

    def fingerprint(self) -> dict[str, Any]:
        """The identity of this source: files, their bytes, and a digest of names and contents. Reads all of it.

        Of the name of a file that is alone only the suffix counts, which decides how it is read. Where a store lists a
        tag of every object's content, `tags` is their digest.
        """
        tags = self._tags()
        return self._fingerprints()[0] | ({"tags": tags} if tags else {})

    def has_fingerprint(self, known: dict[str, Any]) -> bool:
        """Whether `known` is the fingerprint of this source; in earlier ones the whole name of a file alone counts.

        Reads all of it, but for objects of a store whose tags are those of `known`.
        """
        if known.get("tags") is not None and known["tags"] == self._tags():
            return True
        return {key: value for key, value in known.items() if key != "tags"} in self._fingerprints()

    def _tags(self) -> str:
        """One digest of the names, sizes and tags of a store's objects; "" where one has no tag."""
        tags = [
            (name, file.entry.bytes, file.entry.tag) if isinstance(file, StoredFile) else (name, 0, "")
            for name, file, _ in self.files
        ]
        return hashlib.sha256(json.dumps(tags).encode()).hexdigest() if all(tag for _, _, tag in tags) else ""

    def _fingerprints(self) -> list[dict[str, Any]]:
        named = [(name, _digest(file)) for name, file, _ in self.files]
        by_suffix = [[(Path(name).suffix, digest) for name, digest in named]] if self.alone else []
        digests = [hashlib.sha256(json.dumps(one).encode()).hexdigest() for one in (*by_suffix, named)]
        return [{"files": len(named), "bytes": self.total_bytes(), "digest": digest} for digest in digests]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content. Raises InputError if it cannot be read."""
    return _digest(LocalFile(path))


def _digest(source: SourceFile) -> str:
    with source.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def open_source(source: str, text_key: str) -> TextSource:
    """The TextSource that `data.source` names: "stdlib", a .txt or .jsonl file, or a folder of text, or the URL of one.

    Raises InputError for a source that is missing, has no reader, or cannot be indexed (a pipe, a socket, a web page).
    """
    if source == "stdlib":
        return _standard_library()
    if is_url(source):
        return _stored(source, text_key)
    if source == "-" or source.startswith(("/dev/", "/proc/")):
        raise _not_indexable(source, "a stream")
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        near = 'nearest: "stdlib", or the path of a .txt or .jsonl file or of a folder'
        raise InputError(Problem("data.source", f"{source!r} cannot be read: {what}", near)) from error
    if stat.S_ISDIR(mode):
        return _folder(path, text_key)
    if not stat.S_ISREG(mode):
        raise _not_indexable(source, "a pipe, a socket or a device")
    return TextSource(path.name, ((path.name, LocalFile(path), _reader_alone(path.name, text_key)),), alone=True)


def _stored(url: str, text_key: str) -> TextSource:
    """The object at a URL, or all below it, hidden ones left out."""
    if fault := url_fault(url):
        raise InputError(Problem("data.source", *fault))
    store = open_store(url)
    name = PurePosixPath(store.url).name
    if store.is_object():
        reader = _reader_alone(name, text_key)
        (entry,) = store.entries().values()
        return TextSource(name, ((name, StoredFile(store, "", entry), reader),), alone=True)
    entries = {name: entry for name, entry in store.entries().items() if not _is_hidden(name)}
    files = tuple((one, StoredFile(store, one, entry), _reader_within(one, text_key)) for one, entry in entries.items())
    if not files:
        raise InputError(Problem("data.source", f"no object below {store.url}", "put text or .jsonl files there"))
    return TextSource(name, files)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _reader_alone(name: str, text_key: str) -> DocumentReader:
    """How a file that is the whole source is read, by its suffix. Raises InputError where it has no reader."""
    suffix = PurePosixPath(name).suffix
    if suffix not in (".txt", ".jsonl"):
        near = "nearest: a .txt file (documents divided by blank lines), a .jsonl file, or a folder of text files"
        raise InputError(Problem("data.source", f"no reader for {name!r}", near))
    return _records(text_key) if suffix == ".jsonl" else _paragraphs


def _reader_within(name: str, text_key: str) -> DocumentReader:
    """How a file of a folder is read, by its suffix."""
    return _records(text_key) if PurePosixPath(name).suffix == ".jsonl" else _whole


def _not_indexable(source: str, what: str) -> InputError:
    why = f"{source!r} is {what}, which cannot be indexed, so a run could not be resumed or repeated"
    return InputError(Problem("data.source", why, "save it to a file first"))


def _standard_library() -> TextSource:
    root = Path(sysconfig.get_path("stdlib"))
    sources = [(name, path) for name, path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"]
    files = ((name, LocalFile(path), _whole) for name, path in sources if path.stem[:5] != "test_")
    return TextSource("stdlib", tuple(files))


def _folder(root: Path, text_key: str) -> TextSource:
    paths = _walk(root)
    if not paths:
        raise InputError(
            Problem("data.source", f"no file in the folder {str(root)!r}", "put text or .jsonl files there")
        )
    for _, path in paths:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _not_indexable(str(path), "a pipe, a socket or a device")
    files = ((name, LocalFile(path), _reader_within(name, text_key)) for name, path in paths)
    return TextSource(root.name, tuple(files))


def _walk(root: Path, skip: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """(name relative to root, path) of all files below it, sorted by name; hidden ones are left out."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [(path.relative_to(root).as_posix(), path) for path in paths if path.exists()]
    return sorted(files)


def _whole(file: BinaryIO, name: str) -> Documents:
    """The file as one document, cut if it is longer than DOCUMENT_BYTES."""
    part, rest, last = 0, b"", False
    while not last:
        room = DOCUMENT_BYTES - len(rest)
        block = file.read(room)
        last = len(block) < room
        content, rest = (rest + block, b"") if last else _cut_at_character(rest + block)
        part += 1
        if content or part == 1:
            yield _decode(content, f"{name} (part {part})" if part > 1 else name)


def _paragraphs(file: BinaryIO, name: str) -> Documents:
    """Documents separated by blank lines."""
    chunks: list[bytes] = []
    size, first = 0, 1
    for number, chunk, whole in _chunks(file, DOCUMENT_BYTES):
        blank, too_long = whole and not chunk.strip(), size + len(chunk) > DOCUMENT_BYTES
        if chunks and (blank or too_long):
            content = b"".join(chunks)
            content, rest = (content, b"") if blank else _cut_at_character(content)
            yield _decode(content, f"{name}:{first}")
            chunks, size, first = ([rest], len(rest), number) if rest else ([], 0, number)
        if not blank:
            if not chunks:
                first = number
            chunks.append(chunk)
            size += len(chunk)
    if chunks:
        yield _decode(b"".join(chunks), f"{name}:{first}")


def _records(text_key: str) -> DocumentReader:
    """A reader of JSON lines: one object per line, its text under `text_key`."""

    def read(file: BinaryIO, name: str) -> Documents:
        too_long = 0
        for number, chunk, whole in _chunks(file, RECORD_BYTES):
            where = f"{name}:{number}"
            if not whole and number != too_long:
                too_long = number
                yield Unreadable(Problem(where, f"is longer than {RECORD_BYTES} bytes", "split the record"), True)
            elif whole and chunk.strip():
                yield _record(chunk, text_key, where)

    return read


def _record(line: bytes, text_key: str, where: str) -> Document | Unreadable:
    try:
        record = json.loads(decode_text(line), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        return Unreadable(Problem(where, f"is not JSON: {what}", f'write {{"{text_key}": "..."}}'), True)
    if not isinstance(record, dict):
        return Unreadable(Problem(where, "is not a JSON object", f'write {{"{text_key}": "..."}}'), True)
    text = record.get(text_key)
    if not isinstance(text, str):
        what = f"{text_key!r} is not text" if text_key in record else f"has no {text_key!r}"
        return Unreadable(Problem(where, what, "set data.text_key to one of: " + ", ".join(list(record)[:8])), True)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Unreadable(Problem(where, "holds half of a surrogate pair, which is no text", "mend the escape"), True)
    return Document(where, text)


def _chunks(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, at most `limit` bytes of that line, whether this is the whole line) until the end of the file."""
    number, begins = 1, True
    while chunk := file.readline(limit):
        ends = chunk.endswith(b"\n") or len(chunk) < limit
        yield number, chunk, begins and ends
        number, begins = number + ends, ends


def _cut_at_character(content: bytes) -> tuple[bytes, bytes]:
    """`content` up to its last whole UTF-8 character, and the bytes of an incomplete one after it."""
    for back in range(1, min(4, len(content) + 1)):
        lead = content[-back]
        if lead & 0b1100_0000 != 0b1000_0000:  # not a continuation byte
            needs = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return (content[:-back], content[-back:]) if needs > back else (content, b"")
    return content, b""


def _decode(content: bytes, where: str) -> Document | Unreadable:
    if b"\0" in content:
        return Unreadable(Problem(where, "holds NUL bytes, so it is UTF-16 or no text", "convert it to UTF-8"), False)
    try:
        return Document(where, content.decode())
    except UnicodeDecodeError as error:
        problem = Problem(where, f"is not UTF-8 from byte {error.start} on", "convert it to UTF-8")
        return Unreadable(problem, False)
