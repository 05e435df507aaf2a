"""The folder of a run's checkpoints: which are committed, which is newest, and deleting the rest.

step-N                    committed: got this name after all its files were on the disk
step-N.replaced-<nonce>   an older committed step-N, read only if the new step-N was not committed
step-N.removed-<nonce>    being deleted
.saving-G                 the lease of generation G of the ranks: their messages during a save, and
    step-N.partial-<nonce>    being written, or left by writers that died; never read
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from meshwright.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest, read_manifest, stated_sequence
from meshwright.disk import OWN_DISK, Disk, require
from meshwright.errors import InputError
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
    changed_ns: int
    error: InputError


def committed_folders(
    root: Path, disk: Disk = OWN_DISK
) -> tuple[list[tuple[Path, CheckpointManifest]], list[DamagedCheckpoint]]:
    """Committed checkpoints, oldest commit first, and the damaged ones."""
    folders: dict[int, Path] = {}
    for step, state, folder in _scan(root, disk):
        if state in ("", "replaced") and _has_manifest(folder, disk) and (state == "" or step not in folders):
            folders[step] = folder
    sound: list[tuple[Path, CheckpointManifest]] = []
    damaged: list[DamagedCheckpoint] = []
    for step, folder in folders.items():
        try:
            sound.append((folder, read_manifest(folder, disk)))
        except InputError as error:
            if entry := disk.entry(folder):  # otherwise a writer pruned it while we looked
                sequence = stated_sequence(folder, disk)
                damaged.append(DamagedCheckpoint(folder, step, sequence, entry.changed_ns, error))
    return sorted(sound, key=lambda entry: entry[1].sequence), damaged


def may_be_newer(damaged: DamagedCheckpoint, folder: Path, manifest: CheckpointManifest, disk: Disk = OWN_DISK) -> bool:
    """Whether `damaged` may have been committed after the sound checkpoint in `folder`."""
    if damaged.sequence is not None:
        return damaged.sequence > manifest.sequence
    entry = disk.entry(folder)
    later = entry is not None and damaged.changed_ns > entry.changed_ns  # of the last renaming inside: the commit's
    return later or damaged.step > manifest.step


def clear_leftovers(root: Path, lease: Path, disk: Disk) -> None:
    """Deletes what dead writers left, and restores a committed folder whose replacement was not committed. Raises
    FileNotFoundError, and does nothing, where `lease` has been taken away."""
    require(disk, lease)
    for _, _, folder in _scan(lease, disk):
        disk.remove(folder)
    for step, state, folder in _scan(root, disk):
        plain = step_folder(root, step)
        if state == "replaced" and not _has_manifest(plain, disk) and _has_manifest(folder, disk):
            disk.remove(plain)
            disk.rename(folder, plain)
        elif state or not _has_manifest(folder, disk):
            disk.remove(folder)


def commit_folder(root: Path, lease: Path, step: int, nonce: str, disk: Disk) -> Path:
    """Renames a finished partial folder of `lease` to step-N, replacing an older step-N. Raises FileNotFoundError where
    the lease has been taken away."""
    target, replaced = step_folder(root, step), step_folder(root, step, "replaced", nonce)
    require(disk, lease)
    if disk.entry(target) is not None:
        disk.rename(target, replaced)
    disk.rename(step_folder(lease, step, "partial", nonce), target)
    disk.sync(root)
    disk.remove(replaced)
    return target


def prune(root: Path, keep: int, nonce: str, disk: Disk) -> None:
    """Deletes all but the `keep` newest committed checkpoints, and those that are being copied elsewhere; damaged ones
    are left for a person to inspect."""
    for folder, manifest in committed_folders(root, disk)[0][:-keep]:
        if disk.entry(folder / HELD_NAME) is not None:
            continue
        # Renamed first: a kill during deletion must not leave a folder that looks committed.
        removed = step_folder(root, manifest.step, "removed", nonce)
        disk.rename(folder, removed)
        disk.remove(removed)


def _has_manifest(folder: Path, disk: Disk) -> bool:
    return disk.entry(folder / MANIFEST_NAME) is not None


def _scan(root: Path, disk: Disk) -> list[tuple[int, str, Path]]:
    """(step, state, folder) of every step's folder; the committed ones come first of the same step."""
    found = [(_STEP.fullmatch(name), name) for name, entry in disk.entries(root).items() if entry.is_folder]
    return sorted((int(match.group(1)), match.group(2) or "", root / name) for match, name in found if match)
