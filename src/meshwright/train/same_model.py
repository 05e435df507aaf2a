"""Whether a checkpoint is of the model that a job describes, by contents and not by paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meshwright import checkpoint, families
from meshwright.errors import InputError, Problem
from meshwright.families.llama.card import hf_config, shape_from_hf
from meshwright.train.model import MODULE_NAME, Model

#: Keys of a config that do not change the model.
_NOT_THE_MODEL = ("bos_token_id", "eos_token_id")


def refuse_other_model(model: Model, where: str, folder: Path) -> None:
    """Raises InputError if the config of the checkpoint in `folder` says other than that of `model`, which `where`
    names: its weights were trained as that says. A module of the user's own has none."""
    checkpoint.check_side_files(folder / "model")
    if families.CONFIG_NAME not in model.side_files:
        return
    path = folder / "model" / families.CONFIG_NAME
    before = _config(families.read_config(path), str(path))
    now = _config(json.loads(model.side_files[families.CONFIG_NAME]), where)
    problems = [
        Problem(where, f"{key} is {now.get(key)!r}, but {before.get(key)!r} in {path}", "bring it back")
        for key in {**before, **now}
        if before.get(key) != now.get(key) and key not in _NOT_THE_MODEL
    ]
    if problems:
        raise InputError(problems)


def _config(content: dict[str, Any], where: str) -> dict[str, Any]:
    return hf_config(shape_from_hf(content, where))


def unsaved_buffers(model: Model, manifest: checkpoint.CheckpointManifest, folder: Path) -> set[str]:
    """The buffers of `model` that the checkpoint in `folder` lacks because it is older than saved buffers: they keep
    their values as built, which training did not change. Raises InputError where it did: those values are lost."""
    if manifest.version > 1:
        return set()
    unsaved = {buffer.name for buffer in model.card.persistent_buffers} - set(manifest.tensors)
    lost = [name for name in model.card.stateful_buffers if name in unsaved]
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        what = f"is older than saved buffers: it lacks the values that training gave to {names}"
        raise InputError(Problem(str(folder), what, "train again in another run folder"))
    return unsaved


def source_changed(model: Model, folder: Path) -> bool:
    """Whether the file of a module of the user's own is another than that which the checkpoint in `folder` names.

    That is no error: a fault may be mended in the middle of a run, and tensors are compared by name and shape. A
    checkpoint older than these digests does not tell.
    """
    if MODULE_NAME not in model.side_files:
        return False
    before, now = families.read_config(folder / "model" / MODULE_NAME), json.loads(model.side_files[MODULE_NAME])
    return before.get("sha256") not in (None, now["sha256"])
