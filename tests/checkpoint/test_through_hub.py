"""Saving where ranks do not see the disk: through the hub, together with ranks that do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshwright.checkpoint import ModelFolder, Writer, check, latest, load, read_manifest
from meshwright.disk import OWN_DISK, Disk
from meshwright.errors import InputError, RunFailed
from meshwright.launch import hub_disk
from meshwright.layout import Layout
from tests.checkpoint.simulate import (
    example_tensors,
    held,
    in_threads,
    shapes_of,
    split_by_part,
    whole_pieces,
    world_pieces,
)
from tests.launch.elsewhere import Elsewhere, elsewhere

LAYOUT = Layout(dp=2, shard=2, tp=2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    monkeypatch.setattr(hub_disk, "CHUNK_BYTES", 200)  # so that small tensors take several messages
    with elsewhere(tmp_path / "run") as one:
        yield one


def save(
    hub: Elsewhere, step: int, disks: list[Disk], *, seed: int = 0, lease: Path | None = None
) -> list[BaseException | None]:
    """Each rank of LAYOUT saves its part of `example_tensors` on its disk; returns each one's error."""
    tensors = example_tensors(seed)
    world = world_pieces(LAYOUT, shapes_of(tensors))
    files = ModelFolder({name: name for name in tensors if not name.startswith("optimizer.")})
    generation = hub.files.hub.generation

    def one(rank: int) -> None:
        folder = lease or hub.run.lease(generation)
        options = {"lease": folder, "disk": disks[rank], "timeout_seconds": 60.0, "keep": 2}
        writer = Writer(hub.run.checkpoints, rank, len(world), layout=LAYOUT, **options)  # type: ignore[arg-type]
        writer.save(step, *split_by_part(held(tensors, world[rank])), {"seed": seed}, files)
        writer.wait()

    return in_threads(len(world), one)


def assert_holds(folder: Path, seed: int) -> None:
    check(folder)
    tensors = example_tensors(seed)
    found = held(tensors, whole_pieces(shapes_of(tensors)), fill=False)
    load(folder, found)
    assert all(found[name][1].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("here", [(), (0, 3)], ids=["none sees the disk", "ranks 0 and 3 do"])
def test_ranks_save_together_whatever_way_they_reach_the_disk(hub: Elsewhere, here: tuple[int, ...]) -> None:
    disks: list[Disk] = [OWN_DISK if rank in here else hub.disk() for rank in range(LAYOUT.devices)]
    for step in (1, 2, 3, 3):  # the last one takes the place of another; the first is deleted
        assert save(hub, step, disks, seed=step) == [None] * LAYOUT.devices
    assert sorted(path.name for path in hub.run.checkpoints.glob("step-*")) == ["step-2", "step-3"]
    newest = hub.run.checkpoints / "step-3"
    assert_holds(newest, seed=3)
    assert latest(hub.run.checkpoints) == newest == latest(hub.run.checkpoints, hub.disk())
    assert read_manifest(newest, hub.disk()) == read_manifest(newest)
    assert not list(hub.run.lease(1).glob("step-*"))


def test_the_bytes_are_those_that_ranks_with_the_disk_write(hub: Elsewhere) -> None:
    for step, disk in ((1, OWN_DISK), (2, hub.disk())):
        assert save(hub, step, [disk] * LAYOUT.devices) == [None] * LAYOUT.devices
    one, two = (hub.run.checkpoints / name for name in ("step-1", "step-2"))
    names = [str(path.relative_to(one)) for path in one.glob("*/*")]
    assert names and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_full_disk_at_the_driver_fails_the_save_on_every_rank(
    hub: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks: list[Disk] = [hub.disk() for _ in range(LAYOUT.devices)]
    save(hub, 1, disks, seed=1)
    write = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("rank-1.safetensors"):
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    errors = save(hub, 2, disks)
    assert all(isinstance(error, RunFailed) and "No space left" in str(error) for error in errors), errors
    assert str(errors[0]).startswith("rank 1, step 2:")
    assert latest(hub.run.checkpoints) == hub.run.checkpoints / "step-1"
    monkeypatch.undo()
    assert save(hub, 2, disks) == [None] * LAYOUT.devices
    assert not list(hub.run.path.rglob("*.partial-*"))


@pytest.mark.parametrize("moment", ["model", "manifest", "commit"])
def test_another_generation_begins_in_the_middle_of_a_save(
    hub: Elsewhere, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Nothing of the older one is committed, the checkpoint before stays, and the next generation saves."""
    disks: list[Disk] = [hub.disk() for _ in range(LAYOUT.devices)]
    old = hub.run.lease(1)
    save(hub, 1, disks, seed=1)
    begun: list[int] = []

    def once(before: Callable[..., None], reached: Callable[[Path], bool]) -> Callable[..., None]:
        def act(disk: hub_disk.HubDisk, path: Path, *args: object, **options: object) -> None:
            if reached(path) and not begun:
                begun.append(hub.begin())
            before(disk, path, *args, **options)

        return act

    method, reached = {
        "model": ("write_at", lambda path: path.suffix == ".safetensors" and path.parent.name == "model"),
        "manifest": ("write", lambda path: path.name == "manifest.json"),
        "commit": ("rename", lambda path: ".partial-" in path.name),
    }[moment]
    monkeypatch.setattr(hub_disk.HubDisk, method, once(getattr(hub_disk.HubDisk, method), reached))
    errors = save(hub, 2, disks, lease=old)
    assert begun == [2] and all(isinstance(error, RunFailed) for error in errors), errors
    assert any("generation 1 is over" in str(error) for error in errors), errors
    assert [path.name for path in hub.run.checkpoints.glob("step-*")] == ["step-1"] and not old.exists()
    assert save(hub, 2, [hub.disk()] * LAYOUT.devices, seed=2) == [None] * LAYOUT.devices
    assert_holds(hub.run.checkpoints / "step-2", seed=2)


def test_a_damaged_checkpoint_is_refused_through_the_hub_too(hub: Elsewhere) -> None:
    save(hub, 1, [OWN_DISK] * LAYOUT.devices)
    manifest = hub.run.checkpoints / "step-1" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step":1', b'"step":2'))
    with pytest.raises(InputError, match="digest does not match"):
        latest(hub.run.checkpoints, hub.disk())
