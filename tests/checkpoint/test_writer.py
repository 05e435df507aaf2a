from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meshwright.checkpoint import ModelFolder, Writer, latest, load, read_manifest
from meshwright.checkpoint.rendezvous import Rendezvous
from meshwright.checkpoint.writer import _give_up
from meshwright.errors import RunFailed
from meshwright.layout import Box, Layout
from meshwright.placement import Placement
from tests.checkpoint.pickles import assert_no_pickles
from tests.checkpoint.simulate import (
    example_tensors,
    held,
    in_threads,
    save_world,
    shapes_of,
    split_by_part,
    whole_pieces,
    world_pieces,
)

LAYOUTS = [
    Layout(),
    Layout(dp=4, shard=4),
    Layout(dp=4, shard=2),
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=4, shard=4, tp=2, pp=2),
]


def assert_loads(folder: Path, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
    """Every rank of `layout` finds its own boxes in the checkpoint, bit for bit."""
    for pieces in world_pieces(layout, shapes_of(tensors)):
        got = held(tensors, pieces, fill=False)
        load(folder, got)
        for name, (_, expected) in held(tensors, pieces).items():
            assert got[name][1].dtype == expected.dtype
            assert torch.equal(got[name][1], expected), name


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_any_layout_loads_any_other_bit_for_bit(tmp_path: Path, saved: Layout) -> None:
    tensors = example_tensors()
    save_world(tmp_path, 3, world_pieces(saved, shapes_of(tensors)), tensors, layout=saved)
    folder = latest(tmp_path)
    assert folder == tmp_path / "step-3"
    assert_no_pickles(tmp_path)
    for wanted in LAYOUTS:
        assert_loads(folder, wanted, tensors)


def test_model_files_read_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = example_tensors()
    names = {name: f"hf.{name}" for name in tensors if not name.startswith("optimizer.")}
    files = ModelFolder(names, {"config.json": b"{}"}, max_shard_bytes=150)
    save_world(tmp_path, 1, world_pieces(LAYOUTS[-1], shapes_of(tensors)), tensors, model_files=files)
    model = tmp_path / "step-1" / "model"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(model.glob("model-0000*-of-0000*.safetensors"))) > 1
    read = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(read) == set(names.values()) == set(index["weight_map"])
    for name, file_name in names.items():
        assert torch.equal(read[file_name], tensors[name]) and read[file_name].dtype == tensors[name].dtype
    assert (tmp_path / "step-1" / "model" / "config.json").read_bytes() == b"{}"
    states = [load_file(file) for file in (tmp_path / "step-1" / "state").iterdir()]
    stored = sum(tensor.numel() for state in states for tensor in state.values())
    assert stored == sum(t.numel() for n, t in tensors.items() if n.startswith("optimizer."))  # by one owner, once


def test_manifest_records_the_run(tmp_path: Path) -> None:
    tensors = example_tensors()
    layout = Layout(dp=2, shard=2)
    meta = {"seed": 5, "skips": [[3, 4]], "tokens_seen": 2**40, "rng": {"cpu": "00ff"}}
    save_world(tmp_path, 8, world_pieces(layout, shapes_of(tensors)), tensors, meta=meta, layout=layout)
    manifest = read_manifest(tmp_path / "step-8")
    assert (manifest.step, manifest.world, manifest.parent) == (8, 2, None)
    assert manifest.meta == meta
    assert Layout(**manifest.layout) == layout
    assert sorted(p.name for p in (tmp_path / "step-8").iterdir()) == ["manifest.json", "model", "state"]
    assert {p.suffix for p in (tmp_path / "step-8" / "state").iterdir()} == {".safetensors"}


def single(tmp_path: Path, **options: object) -> Writer:
    return Writer(tmp_path, 0, 1, timeout_seconds=60, **options)  # type: ignore[arg-type]


def save_single(writer: Writer, step: int, tensors: dict[str, torch.Tensor]) -> None:
    model, state = split_by_part(held(tensors, whole_pieces(shapes_of(tensors))))
    writer.save(step, model, state, {}, ModelFolder({name: name for name in model}))


def test_tensors_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    writer = single(tmp_path)
    weight = torch.arange(300_000, dtype=torch.float32)
    piece = Placement("w", Box.whole((300_000,)), 1, True)
    writer.save(1, {"w": (piece, weight)}, {}, {}, ModelFolder({"w": "w"}))
    weight.zero_()
    writer.wait()
    assert torch.equal(
        load_file(tmp_path / "step-1" / "model" / "model.safetensors")["w"], torch.arange(300_000, dtype=torch.float32)
    )


def test_a_commit_is_told_when_it_is_one(tmp_path: Path) -> None:
    told = []
    for asynchronous in (True, False):
        root = tmp_path / str(asynchronous)
        options = {"asynchronous": asynchronous, "committed": lambda step, _: told.append((step, latest(root)))}  # noqa: B023
        writer = single(root, **options)
        save_single(writer, 1, example_tensors())
        writer.wait()
        assert told.pop() == (1, root / "step-1")
        broken = {"w": (Placement("w", Box((4,), (0,), (2,)), 1, True), torch.zeros(2))}  # half of it has no owner
        with pytest.raises(RunFailed):
            writer.save(2, broken, {}, {}, ModelFolder({"w": "w"}))
            writer.wait()
        assert told == []


def test_two_saves_in_flight_commit_in_order_and_name_their_parent(tmp_path: Path) -> None:
    writer = single(tmp_path, parent=0, keep=5)
    for step in (1, 2, 3):
        save_single(writer, step, example_tensors(step))
    writer.wait()
    assert [read_manifest(tmp_path / f"step-{step}").parent for step in (1, 2, 3)] == [0, 1, 2]
    for step in (1, 2, 3):
        assert_loads(tmp_path / f"step-{step}", Layout(), example_tensors(step))


def test_synchronous_save_has_committed_when_it_returns(tmp_path: Path) -> None:
    save_single(single(tmp_path, asynchronous=False), 4, example_tensors())
    assert latest(tmp_path) == tmp_path / "step-4"


def test_keeps_the_newest_and_clears_what_dead_writers_left(tmp_path: Path) -> None:
    writer = single(tmp_path, keep=2)
    for step in (1, 2, 3):
        save_single(writer, step, example_tensors())
    writer.wait()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-2", "step-3"]
    (tmp_path / ".saving-0" / "step-4.partial-00ff" / "state").mkdir(parents=True)
    (tmp_path / "step-5" / "model").mkdir(parents=True)  # no manifest: it never was a checkpoint
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == tmp_path / "step-3"
    save_single(writer, 5, example_tensors())
    writer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".saving-0", "notes", "step-3", "step-5"]
    assert not list(tmp_path.rglob("*.partial-*"))


def test_nothing_is_committed_without_the_lease(tmp_path: Path) -> None:
    """A machine that was cut off, or stopped, and goes on after other ranks have begun to train the run."""
    lease = tmp_path / ".saving-1"
    lease.mkdir()
    writer = Writer(tmp_path, 0, 1, lease=lease)
    save_single(writer, 1, example_tensors())
    writer.wait()
    lease.rename(tmp_path / ".ended")
    save_single(writer, 2, example_tensors())
    with pytest.raises(RunFailed, match="rank 0, step 2: is not committed: other ranks train this run now"):
        writer.wait()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]


def test_the_lease_may_be_taken_away_at_any_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the commit itself, after all else has been written."""
    lease = tmp_path / ".saving-1"
    lease.mkdir()
    rename = Path.rename

    def taken_away_first(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            rename(lease, tmp_path / ".ended")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", taken_away_first)
    writer = Writer(tmp_path, 0, 1, lease=lease)
    save_single(writer, 1, example_tensors())
    with pytest.raises(RunFailed, match="other ranks train this run now"):
        writer.wait()
    assert not list(tmp_path.glob("step-*"))


def test_a_step_saved_again_takes_the_old_ones_place(tmp_path: Path) -> None:
    writer = single(tmp_path)
    for seed in (1, 2):
        save_single(writer, 6, example_tensors(seed))
    writer.wait()
    assert_loads(tmp_path / "step-6", Layout(), example_tensors(2))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-6"]


def test_after_a_rewind_the_last_committed_is_the_newest(tmp_path: Path) -> None:
    for step in (10, 20):
        save_single(single(tmp_path, asynchronous=False), step, example_tensors())
    rewound = single(tmp_path, asynchronous=False, parent=10)
    save_single(rewound, 11, example_tensors())
    assert latest(tmp_path) == tmp_path / "step-11"
    save_single(rewound, 12, example_tensors())
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-11", "step-12"]


def test_error_in_the_background_is_raised_at_the_next_call_and_then_forgotten(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("a file where the folder should be")
    writer = single(tmp_path / "in-the-way")
    save_single(writer, 1, example_tensors())
    with pytest.raises(RunFailed, match=r"rank 0, saving step 1.*Not a directory|File exists"):
        save_single(writer, 2, example_tensors())
    (tmp_path / "in-the-way").unlink()
    save_single(writer, 2, example_tensors())
    writer.wait()
    assert latest(tmp_path / "in-the-way") is not None


def test_full_disk_fails_the_save_on_every_rank_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(dp=2, shard=2)
    tensors = example_tensors()
    world = world_pieces(layout, shapes_of(tensors))
    save_world(tmp_path, 1, world, tensors)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    names = {name: name for name in tensors if not name.startswith("optimizer.")}

    def one(rank: int) -> None:
        writer = Writer(tmp_path, rank, 2, timeout_seconds=60)
        writer.save(2, *split_by_part(held(tensors, world[rank])), {}, ModelFolder(names))
        writer.wait()

    errors = in_threads(2, one)
    assert all(isinstance(error, RunFailed) and "No space left" in str(error) for error in errors), errors
    assert latest(tmp_path) == tmp_path / "step-1"
    monkeypatch.undo()
    save_world(tmp_path, 2, world, tensors)  # the next save clears what the failed one left
    assert latest(tmp_path) == tmp_path / "step-2"
    assert not list(tmp_path.rglob("*.partial-*"))


def test_failure_of_one_rank_reaches_every_rank_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = example_tensors()
    world = world_pieces(Layout(dp=2, shard=2), shapes_of(tensors))
    write = os.pwrite

    def full_for_rank_1(descriptor: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("rank-1.safetensors"):
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full_for_rank_1)
    names = {name: name for name in tensors if not name.startswith("optimizer.")}

    def one(rank: int) -> None:
        writer = Writer(tmp_path, rank, 2, timeout_seconds=60)
        writer.save(2, *split_by_part(held(tensors, world[rank])), {}, ModelFolder(names))
        writer.wait()

    errors = in_threads(2, one)
    assert str(errors[0]).startswith("rank 1, step 2:") and "No space left" in str(errors[0])
    assert "rank 1, saving step 2" in str(errors[1])
    assert latest(tmp_path) is None


def test_a_file_made_while_rank_0_removes_a_failed_save_is_removed_too(tmp_path: Path) -> None:
    first, second = (Rendezvous(tmp_path, 1, rank, 2, timeout_seconds=10) for rank in range(2))
    first.begin()
    second.nonce = first.nonce
    for rendezvous in (first, second):
        rendezvous.say_hello({})
    first.gather_hellos()
    _give_up(first, OSError(28, "No space left on device"))
    assert not first.partial.exists()
    (second.partial / "state").mkdir(parents=True)
    (second.partial / "state" / "rank-1.safetensors").touch()
    with pytest.raises(RunFailed, match="No space left"):
        _give_up(second, OSError(28, "No space left on device"))
    assert not second.partial.exists()


def test_missing_rank_is_named(tmp_path: Path) -> None:
    tensors = example_tensors()
    world = world_pieces(Layout(dp=3), shapes_of(tensors))

    def one(rank: int) -> None:
        writer = Writer(tmp_path, (0, 2)[rank], 3, timeout_seconds=1)
        model, state = split_by_part(held(tensors, world[(0, 2)[rank]]))
        writer.save(1, model, state, {}, ModelFolder({name: name for name in model}))
        writer.wait()

    errors = in_threads(2, one)
    assert "no word from rank 1 after 1 s" in str(errors[0])
    assert isinstance(errors[1], RunFailed)
    assert latest(tmp_path) is None


def test_files_of_a_dead_run_do_not_pass_for_living_ranks(tmp_path: Path) -> None:
    """Hello, begin and end files of an earlier save of the same step and world lie about; rank 1 comes late."""
    layout = Layout(dp=2, shard=2)
    tensors = example_tensors()
    world = world_pieces(layout, shapes_of(tensors))
    save_world(tmp_path, 1, world, example_tensors(9))
    nonce = json.loads((tmp_path / ".saving-0" / "begin.json").read_text())["nonce"]
    (tmp_path / ".saving-0" / f"step-1.partial-{nonce}").mkdir()
    names = {name: name for name in tensors if not name.startswith("optimizer.")}
    first_is_waiting = threading.Event()

    def one(rank: int) -> None:
        writer = Writer(tmp_path, rank, 2, timeout_seconds=60)
        if rank == 0:
            first_is_waiting.wait()
        writer.save(1, *split_by_part(held(tensors, world[rank])), {}, ModelFolder(names))
        first_is_waiting.set()
        writer.wait()

    assert in_threads(2, one) == [None, None]
    assert_loads(tmp_path / "step-1", Layout(), tensors)


@pytest.mark.parametrize(
    ("owners", "message"),
    [((True, True), "two pieces hold the same elements"), ((True, False), "do not cover it")],
    ids=["twice", "never"],
)
def test_a_box_written_twice_or_by_nobody_fails_the_save(
    tmp_path: Path, owners: tuple[bool, bool], message: str
) -> None:
    whole = Box.whole((4, 2))
    boxes = (whole, whole) if owners[1] else (whole.split(0, 2, 0), whole.split(0, 2, 1))

    def one(rank: int) -> None:
        writer = Writer(tmp_path, rank, 2, timeout_seconds=60)
        entry = (Placement("w", boxes[rank], 1, owners[rank]), torch.zeros(boxes[rank].shape))
        writer.save(1, {"w": entry}, {}, {}, ModelFolder({"w": "w"}))
        writer.wait()

    errors = in_threads(2, one)
    assert all(message in str(error) for error in errors), errors
    assert latest(tmp_path) is None


def test_mistakes_of_the_caller_are_said_at_once(tmp_path: Path) -> None:
    writer = single(tmp_path)
    piece = Placement("w", Box.whole((2,)), 1, True)
    with pytest.raises(ValueError, match="its piece"):
        writer.save(1, {"w": (piece, torch.zeros(3))}, {}, {}, ModelFolder({"w": "w"}))
    with pytest.raises(ValueError, match="in the model and in the state"):
        writer.save(1, {"w": (piece, torch.zeros(2))}, {"w": (piece, torch.zeros(2))}, {}, ModelFolder({"w": "w"}))
    with pytest.raises(ValueError, match="JSON"):
        writer.save(1, {"w": (piece, torch.zeros(2))}, {}, {"loss": float("nan")}, ModelFolder({"w": "w"}))
    with pytest.raises(ValueError, match="not a name"):
        ModelFolder({}, {"../config.json": b""})


DYING_WRITER = """
import os, signal, sys
from pathlib import Path
from meshwright.layout import Layout
from tests.checkpoint.simulate import example_tensors, save_world, shapes_of, world_pieces

root, fatal_call = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
layout = Layout(dp=2, shard=2)

def mortal(name):
    original = getattr(os, name)
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(os, name, call)

for name in ("pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
    mortal(name)
tensors = example_tensors(2)
save_world(root, 2, world_pieces(layout, shapes_of(tensors)), tensors, keep=1)
print(calls)
"""


def run_dying_writer(root: Path, fatal_call: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DYING_WRITER, str(root), str(fatal_call)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The process is killed at its n-th call that changes the disk, for n over the whole save."""
    first = example_tensors(1)
    whole = [whole_pieces(shapes_of(first))]
    save_world(tmp_path / "undisturbed", 1, whole, first)
    done = run_dying_writer(tmp_path / "undisturbed", fatal_call=0)
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    survivors = set()
    for fatal_call in sorted({1, *(round(calls * part / 6) for part in range(1, 6)), calls - 6, calls - 1}):
        root = tmp_path / f"killed-{fatal_call}"
        save_world(root, 1, whole, first)
        assert run_dying_writer(root, fatal_call).returncode == -signal.SIGKILL
        folder = latest(root)
        assert folder is not None
        survivors.add(folder.name)
        assert_loads(folder, Layout(), example_tensors(read_manifest(folder).step))
        save_world(root, 3, whole, first)  # and the next run goes on in the same folder
        assert latest(root) == root / "step-3"
        assert not list(root.rglob("*.partial-*")) and not list(root.glob("*.removed-*"))
    assert "step-1" in survivors


def test_real_processes_save_together(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from meshwright.checkpoint import ModelFolder, Writer
from meshwright.layout import Layout
from tests.checkpoint.simulate import example_tensors, held, shapes_of, split_by_part, world_pieces
root, rank = Path(sys.argv[1]), int(sys.argv[2])
writer = Writer(root, rank, 2, timeout_seconds=60)
for step in (1, 2):
    tensors = example_tensors(step)
    model, state = split_by_part(held(tensors, world_pieces(Layout(dp=2, shard=2), shapes_of(tensors))[rank]))
    names = {name: name for name in tensors if not name.startswith("optimizer.")}
    writer.save(step, model, state, {}, ModelFolder(names))
writer.wait()
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(rank)], cwd=Path(__file__).parents[2])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for step in (1, 2):
        assert_loads(tmp_path / f"step-{step}", Layout(dp=4, shard=2), example_tensors(step))
