"""The folder of a run's checkpoints: which are committed, which is newest, and deleting the rest.

step-N                    committed: got this name after all its files were on the disk
step-N.replaced-<nonce>   an older committed step-N, read only if the new step-N was not committed
step-N.removed-<nonce>    being deleted
.saving-G                 the lease of generation G of the ranks: their messages during a save, and
    step-N.partial-<nonce>    being written, or left by writers that died; never read
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from meshwright.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest, read_manifest, stated_sequence
from meshwright.errors import InputError
from meshwright.files import sync_folder
from meshwright.run import HELD_NAME

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,15})(?:\.(partial|replaced|removed)-[0-9a-f]+)?")


def step_folder(root: Path, step: int, state: str = "", nonce: str = "") -> Path:
    """Path of a step's folder: committed, or in one of the states of this module's table."""
    return root / (f"step-{step}.{state}-{nonce}" if state else f"step-{step}")


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A committed checkpoint that was changed since. `sequence` is what its manifest still states, None if nothing."""

    folder: Path
    step: int
    sequence: int | None
    error: InputError


def committed_folders(root: Path) -> tuple[list[tuple[Path, CheckpointManifest]], list[DamagedCheckpoint]]:
    """Committed checkpoints, oldest commit first, and the damaged ones."""
    folders: dict[int, Path] = {}
    for step, state, folder in _scan(root):
        if state in ("", "replaced") and (folder / MANIFEST_NAME).exists() and (state == "" or step not in folders):
            folders[step] = folder
    sound: list[tuple[Path, CheckpointManifest]] = []
    damaged: list[DamagedCheckpoint] = []
    for step, folder in folders.items():
        try:
            sound.append((folder, read_manifest(folder)))
        except InputError as error:
            if folder.exists():  # otherwise a writer pruned it while we looked
                damaged.append(DamagedCheckpoint(folder, step, stated_sequence(folder), error))
    return sorted(sound, key=lambda entry: entry[1].sequence), damaged


def may_be_newer(damaged: DamagedCheckpoint, folder: Path, manifest: CheckpointManifest) -> bool:
    """Whether `damaged` may have been committed after the sound checkpoint in `folder`."""
    if damaged.sequence is not None:
        return damaged.sequence > manifest.sequence
    later = damaged.folder.stat().st_mtime_ns > folder.stat().st_mtime_ns  # of the last renaming inside: the commit's
    return later or damaged.step > manifest.step


def clear_leftovers(root: Path, lease: Path) -> None:
    """Deletes what dead writers left, and restores a committed folder whose replacement was not committed. Raises
    FileNotFoundError, and does nothing, where `lease` has been taken away."""
    lease.stat()
    for _, _, folder in _scan(lease):
        shutil.rmtree(folder)
    for step, state, folder in _scan(root):
        plain = step_folder(root, step)
        if state == "replaced" and not (plain / MANIFEST_NAME).exists() and (folder / MANIFEST_NAME).exists():
            if plain.exists():
                shutil.rmtree(plain)
            folder.rename(plain)
        elif state or not (folder / MANIFEST_NAME).exists():
            shutil.rmtree(folder)


def commit_folder(root: Path, lease: Path, step: int, nonce: str) -> Path:
    """Renames a finished partial folder of `lease` to step-N, replacing an older step-N. Raises FileNotFoundError where
    the lease has been taken away."""
    target = step_folder(root, step)
    lease.stat()
    if target.exists():
        target.rename(step_folder(root, step, "replaced", nonce))
    step_folder(lease, step, "partial", nonce).rename(target)
    sync_folder(root)
    replaced = step_folder(root, step, "replaced", nonce)
    if replaced.exists():
        shutil.rmtree(replaced)
    return target


def prune(root: Path, keep: int, nonce: str) -> None:
    """Deletes all but the `keep` newest committed checkpoints, and those that are being copied elsewhere; damaged ones
    are left for a person to inspect."""
    for folder, manifest in committed_folders(root)[0][:-keep]:
        if (folder / HELD_NAME).exists():
            continue
        # Renamed first: a kill during deletion must not leave a folder that looks committed.
        removed = step_folder(root, manifest.step, "removed", nonce)
        folder.rename(removed)
        shutil.rmtree(removed)


def _scan(root: Path) -> list[tuple[int, str, Path]]:
    """(step, state, folder) of every step's folder; the committed ones come first of the same step."""
    entries = []
    if root.is_dir():
        for folder in root.iterdir():
            match = _STEP.fullmatch(folder.name)
            if match and folder.is_dir() and not folder.is_symlink():
                entries.append((int(match.group(1)), match.group(2) or "", folder))
    return sorted(entries)
