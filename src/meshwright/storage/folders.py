"""Folders in a store that count once their list of objects is there: it is written last and read first.

    NAME/...            the files
    NAME/objects.json   its own digest, {"version", "about", "objects": {path: {"bytes", "sha256"}}}

A store has no rename, so nothing here is ever replaced: whoever sends a folder gives it a name that follows from its
content. Two that send the same one write the same objects; a half-sent one is not listed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem, RunFailed
from meshwright.files import has_its_digest, parse_json, with_digest
from meshwright.storage.store import Entry, Store

LIST_NAME = "objects.json"
VERSION = 1
_LIST_BYTES = 64 << 20
#: Files that are sent or fetched at the same time; the client also sends parts of each at the same time.
_AT_ONCE = 2
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredObject:
    """An object of a folder: its size and the digest of all of it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFolder:
    """A folder whose list is there. `about` is its sender's JSON; `fault` says what does not fit the list, if anything.
    `digest` is that of the list."""

    name: str
    about: Mapping[str, Any]
    objects: Mapping[str, StoredObject]
    digest: str
    fault: Problem | None = None

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.objects.values())


def send(
    store: Store,
    name: str,
    root: Path,
    paths: Iterable[str],
    about: Mapping[str, Any],
    before_list: Callable[[], None] = lambda: None,
) -> StoredFolder:
    """Sends the files `paths` of the folder `root`, then their list. `before_list` may still stop it by an error.

    Raises RunFailed where the store lists another size than was sent.
    """

    def send_file(path: str) -> StoredObject:
        sent = stored_object(root / path)
        store.upload(root / path, f"{name}/{path}")
        return sent

    paths = sorted(paths)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        objects = dict(zip(paths, pool.map(send_file, paths), strict=True))
    record = {"version": VERSION, "about": about, "objects": {path: vars(one) for path, one in objects.items()}}
    data = with_digest(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    folder = StoredFolder(name, about, objects, hashlib.sha256(data).hexdigest())
    fault = _fault(store, folder, store.entries(name))
    if fault is not None:
        raise RunFailed(replace(fault, nearest="it is sent again with the next checkpoint"))
    before_list()
    store.write(f"{name}/{LIST_NAME}", data)
    return folder


def committed(store: Store, within: str = "") -> tuple[list[StoredFolder], list[str]]:
    """The folders directly below `within` whose list is there, and the names of those without one."""
    listed = store.entries(within)
    depth = within.count("/") + 2 if within else 1
    parts = (name.split("/") for name in listed)
    names = sorted({"/".join(part[:depth]) for part in parts if len(part) > depth})
    with_list = [name for name in names if f"{name}/{LIST_NAME}" in listed]
    return [read_folder(store, name, listed) for name in with_list], [name for name in names if name not in with_list]


def read_folder(store: Store, name: str, listed: Mapping[str, Entry]) -> StoredFolder:
    """The folder `name`, "" for the one at the store's URL, whose list is there; `listed` is what the store lists."""
    path = f"{name}/{LIST_NAME}" if name else LIST_NAME
    where = store.place(path)
    data = store.read(path, _LIST_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    try:
        folder = StoredFolder(name, *_decode(data, where), digest)
    except InputError as error:
        return StoredFolder(name, {}, {}, digest, error.problems[0])
    return replace(folder, fault=_fault(store, folder, listed))


def fetch(store: Store, folder: StoredFolder, target: Path, within: str = "") -> None:
    """Downloads the files of a folder below `target`; with `within`, only those whose path begins so.

    Raises InputError naming the object whose content has another digest than the list says.
    """

    def fetch_file(path: str) -> Problem | None:
        local, name = target / path, f"{folder.name}/{path}" if folder.name else path
        store.download(name, local)
        if stored_object(local) == folder.objects[path]:
            return None
        return Problem(store.place(name), "does not have the digest that its list says: it was changed or cut short")

    paths = [path for path in sorted(folder.objects) if path.startswith(within)]
    for parent in {(target / path).parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        problems = [problem for problem in pool.map(fetch_file, paths) if problem is not None]
    if problems:
        raise InputError(problems)


def remove(store: Store, name: str) -> None:
    """Deletes a folder: its list first, so that it no longer counts when only a part is gone."""
    names = sorted(store.entries(name), key=lambda one: one != f"{name}/{LIST_NAME}")
    store.delete(names)


def stored_object(path: Path) -> StoredObject:
    """Size and digest of a file of this machine."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredObject(file.tell(), digest)


def is_inside(path: str) -> bool:
    """Whether a path that a store names stays within the folder that it is fetched to."""
    parts = path.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not any(letter in path for letter in "\\\0")


def _decode(data: bytes, where: str) -> tuple[Mapping[str, Any], Mapping[str, StoredObject]]:
    if not has_its_digest(data):
        raise InputError(Problem(where, "does not have its digest: it was cut short or changed"))
    record = parse_json(data, where)
    if record.get("version") != VERSION:
        raise InputError(Problem(where, f"is of version {record.get('version')!r}", f"this Meshwright reads {VERSION}"))
    wrong = partial(Problem, where, "is not a list of objects as Meshwright writes it")
    if not isinstance(record.get("about"), dict) or not isinstance(record.get("objects"), dict):
        raise InputError(wrong())
    for path, one in record["objects"].items():
        whole = isinstance(one, dict) and set(one) == {"bytes", "sha256"} and type(one["bytes"]) is int
        if not is_inside(path) or not whole or not _SHA256.fullmatch(str(one["sha256"])):
            raise InputError(wrong())
    return record["about"], {path: StoredObject(**one) for path, one in record["objects"].items()}


def _fault(store: Store, folder: StoredFolder, listed: Mapping[str, Entry]) -> Problem | None:
    """The first object that the store does not list with its size."""
    for path, one in folder.objects.items():
        name = f"{folder.name}/{path}" if folder.name else path
        if name not in listed:
            return Problem(store.place(name), "is missing, though its list names it")
        if listed[name].bytes != one.bytes:
            return Problem(store.place(name), f"is {listed[name].bytes} bytes, its list says {one.bytes}")
    return None
