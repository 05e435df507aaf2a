"""What a node that does not see the run folder's disk copies, and when."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright import checkpoint, data
from meshwright.errors import InputError, Problem
from meshwright.job import Job
from meshwright.launch.hub_disk import HubDisk
from meshwright.launch.rank import Context
from meshwright.run import RunFolder
from meshwright.train.rank_files import RankFiles, files_of
from meshwright.train.work import work
from tests.checkpoint.simulate import example_tensors, in_threads, save_world, shapes_of, whole_pieces
from tests.launch.elsewhere import Elsewhere, elsewhere


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Elsewhere]:
    """With a job, a plan and data in the run folder; these need not be whole ones."""
    with elsewhere(tmp_path / "run") as one:
        source = tmp_path / "corpus.txt"
        source.write_text("A wright of device meshes. " * 100)
        model = {"family": "llama", "layers": 1, "hidden": 16, "heads": 1, "ffn": 16, "vocab": 257}
        job = Job(
            model=model,
            data={"source": str(source), "seq_len": 16, "tokenizer": "bytes"},
            train={"steps": 1, "lr": 1e-3, "global_batch": 2},
        )
        data.build_manifest(job, one.run.manifest)
        one.run.write_job("the job")
        one.run.write_plan({"the": "plan"})
        yield one


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is copied, as it is."""
    names: list[str] = []
    fetch = HubDisk.fetch

    def noted(disk: HubDisk, path: Path, copy: Path) -> int:
        names.append(str(path.relative_to(disk.root)))
        return fetch(disk, path, copy)

    monkeypatch.setattr(HubDisk, "fetch", noted)
    return names


def copies(tmp_path: Path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir(exist_ok=True)
    return folder


def same(one: Path, two: Path) -> bool:
    names = [{str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} for root in (one, two)]
    return names[0] == names[1] and all((one / name).read_bytes() == (two / name).read_bytes() for name in names[0])


def test_a_node_that_sees_the_disk_copies_nothing(hub: Elsewhere) -> None:
    files = files_of(Context.alone(), hub.run)
    assert type(files) is RankFiles and files.run is hub.run
    with pytest.raises(InputError, match=r"^model\.hf: is missing$"), files.located():
        raise InputError(Problem("model.hf", "is missing"))


def test_ranks_of_one_node_copy_once_and_read_the_same(hub: Elsewhere, tmp_path: Path, fetched: list[str]) -> None:
    found: dict[int, RankFiles] = {}

    def one(rank: int) -> None:
        found[rank] = files_of(hub.context(copies(tmp_path), rank, 3), hub.run)

    assert in_threads(3, one) == [None] * 3
    assert sorted(name for name in fetched if "/" not in name) == ["job.toml", "manifest", "plan.json"]
    for files in found.values():
        assert files.run.job.read_text() == "the job" and files.run.plan.read_bytes() == hub.run.plan.read_bytes()
        assert same(files.run.manifest, hub.run.manifest)
        assert data.Manifest.open(files.run.manifest).samples == data.Manifest.open(hub.run.manifest).samples
        assert files.checkpoints == hub.run.checkpoints and isinstance(files.disk, HubDisk)


def test_the_next_generation_copies_the_plan_anew_and_keeps_the_data(
    hub: Elsewhere, tmp_path: Path, fetched: list[str]
) -> None:
    files_of(hub.context(copies(tmp_path)), hub.run)
    hub.run.write_plan({"another": "plan"})
    hub.begin()
    fetched.clear()
    files = files_of(hub.context(copies(tmp_path)), hub.run)
    assert fetched == ["job.toml", "plan.json"] and "another" in files.run.plan.read_text()
    (files.run.manifest / data.MANIFEST_NAME).write_text("of another run")
    hub.begin()
    files = files_of(hub.context(copies(tmp_path)), hub.run)
    assert same(files.run.manifest, hub.run.manifest)


def test_data_that_does_not_have_its_digest_is_refused_and_names_the_node(hub: Elsewhere, tmp_path: Path) -> None:
    tokens = hub.run.manifest / "train.tokens.bin"
    changed = bytearray(tokens.read_bytes())
    changed[7] ^= 1
    tokens.write_bytes(changed)
    with pytest.raises(InputError, match=r"on node node-0, which does not see .*train\.tokens\.bin: was changed"):
        files_of(hub.context(copies(tmp_path)), hub.run)
    with pytest.raises(InputError, match=r"train\.tokens\.bin"):  # a second rank of the node does not use it either
        files_of(hub.context(copies(tmp_path)), hub.run)


def test_the_newest_checkpoint_is_copied_once_a_generation(hub: Elsewhere, tmp_path: Path, fetched: list[str]) -> None:
    def save(step: int) -> None:
        tensors = example_tensors(step)
        save_world(hub.run.checkpoints, step, [whole_pieces(shapes_of(tensors))], tensors)

    files = files_of(hub.context(copies(tmp_path)), hub.run)
    assert files.newest_checkpoint() is None
    for step in (1, 2):
        save(step)
    fetched.clear()
    newest: dict[int, Any] = {}

    def one(rank: int) -> None:
        newest[rank] = files_of(hub.context(copies(tmp_path), rank, 2), hub.run).newest_checkpoint()

    assert in_threads(2, one) == [None] * 2
    assert newest[0] == newest[1] == copies(tmp_path) / "run" / "checkpoints" / "step-2"
    assert same(newest[0], hub.run.checkpoints / "step-2") and len(fetched) == len(set(fetched)) == 3
    checkpoint.check(newest[0])
    shutil.rmtree(hub.run.checkpoints / "step-2")
    hub.begin()
    again = files_of(hub.context(copies(tmp_path)), hub.run)
    assert again.newest_checkpoint() == copies(tmp_path) / "run" / "checkpoints" / "step-1"
    assert not newest[0].exists()  # a node keeps one


def test_a_copy_that_was_cut_short_is_made_anew(
    hub: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the rank that copies is killed."""
    save_world(hub.run.checkpoints, 1, [whole_pieces(shapes_of(example_tensors()))], example_tensors())
    fetch = HubDisk.fetch

    def cut(name: str) -> None:
        def until(disk: HubDisk, path: Path, copy: Path) -> int:
            if path.name == name:
                copy.write_bytes(b"a part")
                raise KeyboardInterrupt
            return fetch(disk, path, copy)

        monkeypatch.setattr(HubDisk, "fetch", until)

    for name in ("plan.json", "train.tokens.bin"):
        cut(name)
        with pytest.raises(KeyboardInterrupt):
            files_of(hub.context(copies(tmp_path)), hub.run)
    monkeypatch.undo()
    files = files_of(hub.context(copies(tmp_path)), hub.run)
    assert same(files.run.manifest, hub.run.manifest)
    cut("manifest.json")
    with pytest.raises(KeyboardInterrupt):
        files.newest_checkpoint()
    monkeypatch.undo()
    newest = files.newest_checkpoint()
    assert newest is not None and same(newest, hub.run.checkpoints / "step-1")


def test_problems_with_files_that_a_node_lacks_name_it(hub: Elsewhere, tmp_path: Path) -> None:
    files = files_of(hub.context(copies(tmp_path), 1, 2), RunFolder(hub.run.path))
    words = r"^on node node-1, which does not see the run folder's disk: model\.hf: is missing$"
    with pytest.raises(InputError, match=words), files.located():
        raise InputError(Problem("model.hf", "is missing"))
    hub.run.write_job(
        f'[model]\nhf = "{tmp_path}/gone"\n[data]\nsource = "{tmp_path}/gone.txt"\nseq_len = 16\n'
        "[train]\nsteps = 1\nlr = 1e-3\nglobal_batch = 2\n"
    )
    hub.begin()
    with pytest.raises(InputError, match=rf"^on node node-0, .* disk: {hub.run.job}:2: model\.hf: no folder"):
        work({"run": str(hub.run.path)}, hub.context(copies(tmp_path)))
