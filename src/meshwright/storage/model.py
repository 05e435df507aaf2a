"""A model's folder on this machine: where a URL names one, it is downloaded into a cache, by its digest."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from meshwright import env
from meshwright.errors import InputError, Problem
from meshwright.files import has_its_digest, parse_json, read_capped, sync_folder, with_digest, write_atomic
from meshwright.storage import folders
from meshwright.storage.folders import LIST_NAME, StoredFolder, stored_object
from meshwright.storage.run_copy import CHECKPOINTS, RunCopy
from meshwright.storage.store import Entry, Store, open_store
from meshwright.storage.url import is_url

logger = logging.getLogger("meshwright")

_CONFIG_NAME, _MODEL = "config.json", "model"
_LIST_BYTES = 1 << 20
#: Files of a Hugging Face folder that are fetched: none that can hold code or a pickle.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


def local_model(model: str | Path) -> Path:
    """The folder that `model` names. A URL names the copy of a run, whose newest checkpoint is taken, one checkpoint of
    it, or a Hugging Face folder; its model is downloaded once into `env.cache_folder()`, under its digest. The folder
    has the name of the run or of the URL.

    Every file is held to its digest, also when it is in the cache already. For a checkpoint these are the digests that
    it was sent with; a Hugging Face folder has none in the store, and is held to those of the download. Raises
    InputError where there is no model, or where it is damaged.
    """
    if not is_url(str(model)):
        return Path(model)
    store = open_store(str(model))
    listed = store.entries()
    if LIST_NAME in listed:
        return _checkpoint_model(store, folders.read_folder(store, "", listed))
    if any(name.startswith(f"{CHECKPOINTS}/") for name in listed):
        held = RunCopy(store.url).checkpoints()
        if not held:
            raise InputError(Problem(store.url, "holds no committed checkpoint yet", "train until the first one"))
        return _checkpoint_model(store, held[-1])
    if _CONFIG_NAME in listed:
        return _hugging_face_model(store, listed)
    near = f"name the copy of a run, one of its {CHECKPOINTS}, or a Hugging Face folder"
    raise InputError(Problem(store.url, f"holds no model: no {_CONFIG_NAME}", near))


def _checkpoint_model(store: Store, stored: StoredFolder) -> Path:
    if stored.fault is not None:
        raise InputError(stored.fault)
    path = PurePosixPath(store.place(stored.name))
    name = path.parents[1].name if path.parent.name == CHECKPOINTS else path.name
    return _cached(stored.digest, name, lambda draft: folders.fetch(store, stored, draft, f"{_MODEL}/"))


def _hugging_face_model(store: Store, listed: Mapping[str, Entry]) -> Path:
    chosen = {name: one for name, one in listed.items() if "/" not in name and name.endswith(_SUFFIXES)}
    if not all(one.tag for one in chosen.values()):
        what = "is in a store that lists no tags of contents, so a changed model would not be noticed"
        raise InputError(Problem(store.url, what, "copy the folder to this machine and name that"))

    def download(draft: Path) -> None:
        for name in chosen:
            store.download(name, draft / _MODEL / name)
        now = store.entries()
        changed = [
            name
            for name, one in chosen.items()
            if now.get(name) != one or (draft / _MODEL / name).stat().st_size != one.bytes
        ]
        if changed:
            raise InputError(Problem(store.place(changed[0]), "was changed while it was read", "start again"))

    text = json.dumps([store.url, *([name, one.bytes, one.tag] for name, one in chosen.items())])
    return _cached(hashlib.sha256(text.encode()).hexdigest(), PurePosixPath(store.url).name, download)


def _cached(digest: str, name: str, download: Callable[[Path], None]) -> Path:
    """The model's folder `name` in the cache, by `digest`; where there is none, `download(draft)` fills draft/model."""
    folder = env.cache_folder() / "models" / hashlib.sha256(f"{digest} {name}".encode()).hexdigest()
    if folder.exists():
        if _is_intact(folder, name):
            return folder / name
        logger.warning("%s was changed or damaged since; it is downloaded again", folder)
        shutil.rmtree(folder)
    draft = folder.with_name(f".{digest[:16]}-{secrets.token_hex(8)}")
    (draft / _MODEL).mkdir(parents=True)
    try:
        logger.info("downloading into %s", folder)
        download(draft)
        (draft / _MODEL).rename(draft / name)
        record = {"objects": _contents(draft / name)}
        write_atomic(draft / LIST_NAME, with_digest(json.dumps(record).encode()))
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder / name


def _contents(model: Path) -> dict[str, Any]:
    return {path.name: vars(stored_object(path)) for path in sorted(model.iterdir())}


def _is_intact(folder: Path, name: str) -> bool:
    """Whether every file has the digest that it was downloaded with."""
    try:
        data = read_capped(folder / LIST_NAME, _LIST_BYTES)
        known = parse_json(data, str(folder)) if has_its_digest(data) else {}
        return bool(known.get("objects") == _contents(folder / name))
    except (InputError, OSError) as error:
        logger.info("%s", error)
        return False
