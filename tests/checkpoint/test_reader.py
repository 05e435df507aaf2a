from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.checkpoint import check, check_side_files, latest, load, read_manifest, read_model_folder
from meshwright.checkpoint.manifest import MANIFEST_CAP_BYTES
from meshwright.checkpoint.model_folder import ModelFolder
from meshwright.checkpoint.tensors import digest_of
from meshwright.engine.folder import find_model
from meshwright.errors import InputError
from meshwright.layout import Box, Layout
from meshwright.placement import Placement
from tests.checkpoint.simulate import (
    as_version_1,
    example_tensors,
    forge,
    held,
    save_world,
    shapes_of,
    whole_pieces,
    world_pieces,
)


def grid(shape: tuple[int, ...], parts: tuple[int, ...]) -> list[Box]:
    boxes = [Box.whole(shape)]
    for dim, count in enumerate(parts):
        boxes = [box.split(dim, count, index) for box in boxes for index in range(count)]
    return boxes


@st.composite
def resharding(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype]:
    """A shape, how the saving and how the loading world split it, and a dtype."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    split = st.tuples(*(st.integers(1, 3) for _ in shape)).filter(lambda parts: torch.Size(parts).numel() <= 9)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]))
    return shape, draw(split), draw(split), dtype


@settings(max_examples=25, derandomize=True)
@given(case=resharding())
def test_any_split_loads_into_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype],
) -> None:
    shape, saved, wanted, dtype = case
    root = tmp_path_factory.mktemp("checkpoints")
    tensors = {"w": (torch.randn(shape) * 100).to(dtype), "optimizer.w": (torch.randn(shape) * 100).to(dtype)}
    world = [{name: Placement(name, box, 1, True) for name in tensors} for box in grid(shape, saved)]
    save_world(root, 1, world, tensors)
    for box in grid(shape, wanted):
        pieces = {name: Placement(name, box, 1, True) for name in tensors}
        got = held(tensors, pieces, fill=False)
        load(root / "step-1", got)
        for name, (_, expected) in held(tensors, pieces).items():
            assert torch.equal(got[name][1], expected)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = example_tensors()
    names = {name: f"hf.{name}" for name in tensors if not name.startswith("optimizer.")}
    files = ModelFolder(names, {"config.json": b'{"a": 1}'})
    save_world(tmp_path, 1, world_pieces(Layout(dp=2, shard=2), shapes_of(tensors)), tensors, model_files=files)
    return tmp_path / "step-1"


def everything() -> dict[str, tuple[Placement, torch.Tensor]]:
    tensors = example_tensors()
    return held(tensors, whole_pieces(shapes_of(tensors)), fill=False)


def test_parameters_that_need_gradients_and_views_are_filled_in_place(saved: Path) -> None:
    expected = example_tensors()["blocks.embed.weight"]
    piece = Placement("blocks.embed.weight", Box.whole((10, 6)), 1, True)
    parameter = torch.nn.Parameter(torch.zeros(10, 6))
    load(saved, {"blocks.embed.weight": (piece, parameter)})
    assert torch.equal(parameter, expected) and parameter.requires_grad
    transposed = torch.zeros(6, 10).t()
    load(saved, {"blocks.embed.weight": (piece, transposed)})
    assert torch.equal(transposed, expected)


def test_another_dtype_is_refused(saved: Path) -> None:
    piece = Placement("blocks.embed.weight", Box.whole((10, 6)), 1, True)
    half = torch.zeros(10, 6, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"'blocks.embed.weight' is F32, wanted BF16"):
        load(saved, {"blocks.embed.weight": (piece, half)})


def test_missing_and_misshapen_tensors_are_all_named_and_nothing_is_filled(saved: Path) -> None:
    wanted = everything()
    wanted["blocks.embed.weigth"] = wanted.pop("blocks.embed.weight")
    wanted["blocks.0.norm.weight"] = (
        Placement("blocks.0.norm.weight", Box.whole((7,)), 1, True),
        torch.zeros(7, dtype=torch.bfloat16),
    )
    with pytest.raises(InputError) as caught:
        load(saved, wanted)
    text = str(caught.value)
    assert "no tensor 'blocks.embed.weigth' (nearest: 'blocks.embed.weight')" in text
    assert "'blocks.0.norm.weight' has shape [6], wanted [7]" in text
    assert len(caught.value.problems) == 2
    assert torch.all(wanted["blocks.0.attn.q.weight"][1] == 7)


@pytest.mark.parametrize("part", ["model", "state"])
def test_flipped_byte_is_refused_naming_file_and_tensor(saved: Path, part: str) -> None:
    path = sorted((saved / part).glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load(saved, everything())
    assert str(path) in str(caught.value) and "the bytes of tensor '" in str(caught.value)


def test_a_changed_header_is_refused(saved: Path) -> None:
    model = saved / "model" / "model.safetensors"
    original = model.read_bytes()
    model.write_bytes(original.replace(b"hf.blocks.embed", b"hf.blocks.embex"))
    with pytest.raises(InputError, match=r"model\.safetensors: its header does not have the manifest's digest"):
        load(saved, everything())


def test_short_missing_and_linked_files_are_refused(saved: Path, tmp_path: Path) -> None:
    model = saved / "model" / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: is \d+ bytes, its manifest says"):
        read_manifest(saved)
    model.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: is missing"):
        load(saved, everything())
    (tmp_path / "elsewhere").write_bytes(data)
    model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not a regular file"):
        load(saved, everything())
    model.unlink()
    os.mkfifo(model)
    with pytest.raises(InputError, match="not a regular file"):
        load(saved, everything())


def test_linked_part_of_the_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "model").rename(tmp_path / "moved")
    (saved / "model").symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match="link"):
        load(saved, everything())


def test_torn_manifest_is_refused_and_not_passed_over(saved: Path) -> None:
    path = saved / "manifest.json"
    data = path.read_bytes()
    for torn in (data[:-40], data.replace(b'"step":1', b'"step":2'), b"", b"{}", b"\x80\x04."):
        path.write_bytes(torn)
        for read in (read_manifest, lambda folder: latest(folder.parent), lambda folder: load(folder, everything())):
            with pytest.raises(InputError, match=r"manifest\.json"):
                read(saved)
    path.unlink()
    assert latest(saved.parent) is None
    with pytest.raises(InputError, match="not a committed checkpoint"):
        read_manifest(saved)


def test_damaged_older_checkpoint_does_not_stop_the_newer_one(saved: Path) -> None:
    tensors = example_tensors()
    save_world(saved.parent, 2, [whole_pieces(shapes_of(tensors))], tensors)
    (saved / "manifest.json").write_bytes(b"{}")
    assert latest(saved.parent) == saved.parent / "step-2"
    save_world(saved.parent, 3, [whole_pieces(shapes_of(tensors))], tensors)
    assert latest(saved.parent) == saved.parent / "step-3"


@pytest.mark.parametrize("damage", ["weights", "manifest", "wiped"])
def test_a_damaged_checkpoint_of_a_lower_step_may_be_the_newest(saved: Path, damage: str) -> None:
    """After a rewind from step 20 to 11 the order of commits counts, not that of the steps."""
    tensors, root = example_tensors(), saved.parent
    for step in (20, 11):
        save_world(root, step, [whole_pieces(shapes_of(tensors))], tensors)
    newest = root / "step-11"
    assert latest(root) == newest
    file = newest / ("model/model.safetensors" if damage == "weights" else "manifest.json")
    file.write_bytes(b"{}" if damage == "wiped" else file.read_bytes()[:-40])
    with pytest.raises(InputError, match=re.escape(str(file))):
        latest(root)
    save_world(root, 12, [whole_pieces(shapes_of(tensors))], tensors)
    assert latest(root) == root / "step-12"


def _linked(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut weights": lambda step: os.truncate(step / "model" / "model.safetensors", 400),
    "no state": lambda step: (step / "state" / "rank-0.safetensors").unlink(),
    "no config": lambda step: (step / "model" / "config.json").unlink(),
    "a link": lambda step: _linked(step / "model" / "model.safetensors"),
    "cut manifest": lambda step: os.truncate(step / "manifest.json", 600),
    "no first line": lambda step: os.truncate(step / "manifest.json", 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whoever_meets_damage_hears_of_the_newest_intact_checkpoint(saved: Path, damage: str) -> None:
    tensors, root = example_tensors(), saved.parent
    names = {name: f"hf.{name}" for name in tensors if not name.startswith("optimizer.")}
    files = ModelFolder(names, {"config.json": b'{"a": 1}'})
    for step in (2, 3, 4):
        save_world(root, step, [whole_pieces(shapes_of(tensors))], tensors, model_files=files, keep=9)
    newest = root / "step-4"
    DAMAGE[damage](newest)
    changed = root / "step-3" / "model" / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\xff")
    readers: dict[str, Callable[[], object]] = {
        "latest": lambda: latest(root),
        "check": lambda: check(newest),
        "load": lambda: load(newest, everything()),
        "model": lambda: read_model_folder(newest / "model", names, everything()),
        "engine": lambda: find_model(newest),
    }
    for name, read in readers.items():
        with pytest.raises(InputError) as refused:
            read()
        assert [one.nearest for one in refused.value.problems] == [f"{root / 'step-2'} is intact"], name
    DAMAGE["cut weights"](root / "step-2")
    DAMAGE["cut weights"](saved)
    with pytest.raises(InputError) as refused:
        latest(root)
    assert "is intact" not in str(refused.value)


def test_tensors_that_nobody_reads_are_refused(saved: Path) -> None:
    tensors = everything()
    load(saved, tensors, complete=tensors.keys())
    some = {name: tensors[name] for name in list(tensors)[1:]}
    load(saved, some)
    with pytest.raises(InputError, match=f"holds tensor {next(iter(tensors))!r}, which this model does not have"):
        load(saved, some, complete=some.keys())


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_hashes_the_tiles_that_it_reads_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int
) -> None:
    """One process saves, four load: together they hash what the checkpoint has, not four times as much."""
    tensors = {"w": torch.arange(2048 * 2048, dtype=torch.float32).reshape(2048, 2048), "optimizer.w": torch.ones(9)}
    save_world(tmp_path, 1, [whole_pieces(shapes_of(tensors))], tensors)
    world = [{"w": Placement("w", Box.whole((2048, 2048)).split(dim, 4, rank), 1, True)} for rank in range(4)]
    hashed = []

    def counted(elements: np.ndarray) -> str:
        hashed.append(elements.nbytes)
        return digest_of(elements)

    monkeypatch.setattr("meshwright.checkpoint.reader.digest_of", counted)
    for pieces in world:
        got = held(tensors, pieces, fill=False)
        load(tmp_path / "step-1", got)
        assert torch.equal(got["w"][1], held(tensors, pieces)["w"][1])
    assert sum(hashed) == tensors["w"].nbytes

    file = tmp_path / "step-1" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for pieces in world[:3]:
        load(tmp_path / "step-1", held(tensors, pieces, fill=False))
    with pytest.raises(InputError, match=r"tensor 'w' \(from \[\d+, \d+\]\) do not have the manifest's digest"):
        load(tmp_path / "step-1", held(tensors, world[3], fill=False))
    with pytest.raises(InputError, match="do not have the manifest's digest"):
        check(tmp_path / "step-1")


def test_a_piece_of_version_1_is_one_tile(saved: Path) -> None:
    forge(saved, as_version_1)
    got = everything()
    load(saved, got)
    assert all(torch.equal(got[name][1], tensor) for name, tensor in example_tensors().items())
    test_flipped_byte_is_refused_naming_file_and_tensor(saved, "model")


@pytest.mark.parametrize("damage", ["changed", "cut short", "gone"])
def test_files_beside_the_weights_are_held_to_their_digests(saved: Path, damage: str) -> None:
    check_side_files(saved / "model")
    check(saved)
    side = saved / "model" / "config.json"
    if damage == "gone":
        side.unlink()
    else:
        side.write_bytes(b'{"a": 2}' if damage == "changed" else b'{"a"')
    for look in (lambda: check_side_files(saved / "model"), lambda: check(saved)):
        with pytest.raises(InputError, match=r"model/config\.json"):
            look()
    check_side_files(saved.parent)  # the folder of no checkpoint


def _rename_file(record: dict, name: str) -> None:
    record["files"][name] = record["files"].pop("model/model.safetensors")
    for tensor in record["tensors"].values():
        for piece in tensor["pieces"]:
            if piece["file"] == "model/model.safetensors":
                piece["file"] = name


def _first_piece(record: dict) -> dict:
    return record["tensors"]["blocks.embed.weight"]["pieces"][0]


HOSTILE = {
    "parent folder": lambda r: _rename_file(r, "model/../../secret"),
    "absolute": lambda r: _rename_file(r, "/etc/passwd"),
    "dot dot": lambda r: _rename_file(r, "model/.."),
    "nul": lambda r: _rename_file(r, "model/a\x00b"),
    "other folder": lambda r: _rename_file(r, "elsewhere/model.safetensors"),
    "unlisted file": lambda r: _first_piece(r).update(file="state/rank-9.safetensors"),
    "offset beyond the end": lambda r: _first_piece(r).update(offset=10**9),
    "negative offset": lambda r: _first_piece(r).update(offset=-8),
    "offset is a bool": lambda r: _first_piece(r).update(offset=True),
    "huge shape": lambda r: r["tensors"]["blocks.embed.weight"].update(global_shape=[2**52, 2**52]),
    "box outside": lambda r: _first_piece(r).update(start=[9, 0]),
    "fewer dimensions": lambda r: _first_piece(r).update(start=[0]),
    "piece left out": lambda r: r["tensors"]["blocks.embed.weight"]["pieces"].pop(),
    "piece twice": lambda r: r["tensors"]["blocks.embed.weight"]["pieces"].append(_first_piece(r)),
    "unknown dtype": lambda r: r["tensors"]["blocks.embed.weight"].update(dtype="PICKLE"),
    "wrong bytes": lambda r: _first_piece(r).update(bytes=1),
    "digest of another kind": lambda r: _first_piece(r).update(sha256=["0" * 63]),
    "digest is no list": lambda r: _first_piece(r).update(sha256="0" * 64),
    "a digest too many": lambda r: _first_piece(r)["sha256"].append("0" * 64),
    "tiles of no size": lambda r: _first_piece(r).update(tile=[0, 0]),
    "a tile in fewer dimensions": lambda r: _first_piece(r).update(tile=[10]),
    "version 1 with tiles": lambda r: r.update(version=1),
    "unknown key": lambda r: r.update(surprise=1),
    "unknown version": lambda r: r.update(version=99),
    "step is text": lambda r: r.update(step="1"),
    "tensors is a list": lambda r: r.update(tensors=[]),
    "file size negative": lambda r: r["files"]["model/config.json"].update(bytes=-1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifest_is_refused(saved: Path, name: str) -> None:
    forge(saved, HOSTILE[name])
    with pytest.raises(InputError, match=r"manifest\.json"):
        load(saved, everything())


def test_manifest_that_is_deep_huge_or_doubled_is_refused(saved: Path) -> None:
    path = saved / "manifest.json"

    def write(rest: bytes) -> None:
        path.write_bytes(b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest)

    for rest in (
        b'"version":1,"meta":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'"version":1,"version":1}',
        b'"version":NaN}',
        b'"version":' + b"9" * 10_000 + b"}",
        b'"version":1,"step":"\xff"}',
    ):
        write(rest)
        with pytest.raises(InputError, match=r"manifest\.json"):
            read_manifest(saved)
    with open(path, "wb") as stream:
        stream.truncate(MANIFEST_CAP_BYTES + 1)
    with pytest.raises(InputError, match="more than the"):
        read_manifest(saved)
