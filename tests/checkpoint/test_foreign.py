from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meshwright.checkpoint import ModelFolder, read_model_folder
from meshwright.errors import InputError
from meshwright.layout import Box, Layout
from meshwright.placement import Placement
from tests.checkpoint.pickles import assert_no_pickles
from tests.checkpoint.simulate import held, save_world, shapes_of, whole_pieces, world_pieces

transformers = pytest.importorskip("transformers")


def tiny_llama(*, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def state_of(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's parameters by made-up names of ours, and the map to the file's names; aliases left out."""
    tensors = {f"blocks.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    return tensors, {name: name.removeprefix("blocks.") for name in tensors}


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_was_saved_sharded(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    tensors, names = state_of(model)
    side_files = {"config.json": model.config.to_json_string().encode()}
    files = ModelFolder(names, side_files, max_shard_bytes=6000)
    layout = Layout(dp=2, shard=2, tp=2, pp=2)
    save_world(tmp_path, 1, world_pieces(layout, shapes_of(tensors)), tensors, model_files=files)
    folder = tmp_path / "step-1" / "model"
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_no_pickles(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    token_ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(again.eval()(token_ids).logits, model(token_ids).logits)


def test_a_checkpoint_of_ours_is_held_to_its_digests(tmp_path: Path) -> None:
    tensors, names = state_of(tiny_llama())
    layout = Layout(dp=2, shard=2, tp=2)
    files = ModelFolder(names, {"config.json": b'{"rope_theta": 5}'})
    for step in (1, 2):
        save_world(tmp_path, step, world_pieces(layout, shapes_of(tensors)), tensors, model_files=files)
    folder = tmp_path / "step-2" / "model"
    pieces = world_pieces(Layout(tp=2), shapes_of(tensors))[1]
    as_bf16 = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    got = held(as_bf16, pieces, fill=False)
    read_model_folder(folder, names, got)
    for name, (_, expected) in held(as_bf16, pieces).items():
        assert torch.equal(got[name][1], expected)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"do not have the manifest's digest; .*step-1 is intact"):
        read_model_folder(folder, names, held(tensors, whole_pieces(shapes_of(tensors)), fill=False))
    file.write_bytes(content[:-1000] + bytes([content[-1000] ^ 0x10]) + content[-999:])
    read_model_folder(folder, names, got)
    (folder / "config.json").write_text('{"rope_theta": 7}')
    with pytest.raises(InputError, match=r"config\.json: .*; .*step-1 is intact"):
        read_model_folder(folder, names, got)
    elsewhere = tmp_path / "copy" / "model"
    shutil.copytree(folder, elsewhere)  # without its manifest it is a folder like any other
    read_model_folder(elsewhere, names, held(tensors, whole_pieces(shapes_of(tensors)), fill=False))


@pytest.mark.parametrize("shard_bytes", ["5GB", "5KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_folder_of_transformers_fills_any_layout(tmp_path: Path, shard_bytes: str, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    tensors, names = state_of(model)
    for pieces in world_pieces(Layout(dp=2, shard=2, tp=2, pp=2), shapes_of(tensors)):
        got = held(tensors, pieces, fill=False)
        read_model_folder(tmp_path, names, got)
        for name, (_, expected) in held(tensors, pieces).items():
            assert torch.equal(got[name][1], expected)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Placement, torch.Tensor]]:
    """Saves a single file; returns what to fill, by the same names."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return held(tensors, whole_pieces(shapes_of(tensors)), fill=False)


def test_casts_floats_to_what_is_wanted_and_nothing_else(tmp_path: Path) -> None:
    wanted = write(tmp_path, {"w": torch.randn(3, 2).to(torch.float16)})
    piece, _ = wanted["w"]
    target = torch.zeros(3, 2)
    read_model_folder(tmp_path, {"w": "w"}, {"w": (piece, target)})
    assert target.abs().sum() > 0
    with pytest.raises(InputError, match=r"tensor 'w' is F16, which does not turn into torch\.int64"):
        read_model_folder(tmp_path, {"w": "w"}, {"w": (piece, torch.zeros(3, 2, dtype=torch.int64))})


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    wanted = write(tmp_path, {"w": torch.zeros(3), "lm_head.weight": torch.zeros(2), "rotary.inv_freq": torch.zeros(2)})
    names = {"w": "w", "v": "model.v"}
    wrong = whole_pieces({"w": (4,)})["w"]
    with pytest.raises(InputError) as caught:
        read_model_folder(tmp_path, names, {"w": (wrong, torch.zeros(4))}, ignored=["*.inv_freq"])
    text = str(caught.value)
    assert "has no tensor 'model.v' (our 'v')" in text
    assert "holds tensor 'lm_head.weight', which this model does not have" in text
    assert "tensor 'w' has shape [3], wanted [4]" in text
    assert "inv_freq" not in text
    tied = {"lm_head.weight": "w"}
    with pytest.raises(InputError, match=r"'lm_head.weight' is not equal to 'w'"):
        read_model_folder(tmp_path, {"w": "w"}, {"w": wanted["w"]}, ignored=["*.inv_freq"], tied=tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_alias_is_equal_to_its_weight_or_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(700, 600)
    write(tmp_path, {"embed": weight.to(dtype), "head": weight.to(dtype).clone()})
    halves = [Placement("embed", Box.whole((700, 600)).split(0, 2, part), 1, True) for part in range(2)]
    first, second = ({"embed": (half, torch.zeros(350, 600))} for half in halves)
    more = {"names": {"embed": "embed"}, "tied": {"head": "embed"}}
    read_model_folder(tmp_path, tensors=first, **more)
    head = weight.to(dtype).clone()
    head[699, 599] += 1
    write(tmp_path, {"embed": weight.to(dtype), "head": head})
    read_model_folder(tmp_path, tensors=first, **more)  # of the other rank's half
    with pytest.raises(InputError) as refused:
        read_model_folder(tmp_path, tensors=second, **more)
    assert "tensor 'head' is not equal to 'embed', which the config says it is" in str(refused.value)
    assert not second["embed"][1].any(), "nothing is filled"
    write(tmp_path, {"embed": weight.to(dtype), "head": torch.randn(5, 600)})
    with pytest.raises(InputError, match="'head' is not equal"):
        read_model_folder(tmp_path, tensors=first, **more)
    write(tmp_path, {"embed": weight, "head": weight.to(torch.float64)})
    read_model_folder(tmp_path, tensors=first, **more)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_a_stored_alias_of_whole_numbers_is_no_rounded_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    more = {"names": {"embed": "embed"}, "tied": {"head": "embed"}}
    weight = torch.tensor([[0.25, 1.0], [0.0, 0.5]])
    wanted = write(tmp_path, {"embed": weight, "head": weight.to(dtype)})
    with pytest.raises(InputError, match="'head' is not equal to 'embed'"):
        read_model_folder(tmp_path, tensors={"embed": wanted["embed"]}, **more)
    wanted = write(tmp_path, {"embed": weight.round(), "head": weight.round().to(dtype)})
    read_model_folder(tmp_path, tensors={"embed": wanted["embed"]}, **more)


def test_a_folder_of_pickles_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*safetensors is needed"):
        read_model_folder(tmp_path, {}, {})
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="has no weights"):
        read_model_folder(tmp_path, {}, {})
    with pytest.raises(InputError, match="is not a folder"):
        read_model_folder(tmp_path / "none", {}, {})


def test_cache_of_links_is_followed(tmp_path: Path) -> None:
    wanted = write(tmp_path / "blobs", {"w": torch.ones(3)})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/model.safetensors")
    read_model_folder(tmp_path / "snapshot", {"w": "w"}, wanted)
    assert torch.equal(wanted["w"][1], torch.ones(3))


def header(record: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_HEADERS = {
    "empty file": b"",
    "header longer than the file": header({}, length=2**40),
    "header longer than allowed": header({}, length=2**63),
    "not JSON": header(b"\x80\x04\x95" * 5),
    "not an object": header([1, 2]),
    "deep": header(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "name twice": header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{}}', b"1234"),
    "unknown dtype": header({"w": entry("OBJECT")}, b"1234"),
    "dtype is a list": header({"w": entry(["F32"])}, b"1234"),
    "negative size": header({"w": entry(shape=[-1])}, b"1234"),
    "size is a bool": header({"w": entry(shape=[True])}, b"1234"),
    "sizes overflow": header({"w": entry(shape=[2**40, 2**40])}, b"1234"),
    "offsets beyond the end": header({"w": entry(shape=[2], offsets=[0, 8])}, b"1234"),
    "offsets do not fit the shape": header({"w": entry(shape=[1], offsets=[0, 3])}, b"123"),
    "overlap": header({"w": entry(), "v": entry()}, b"1234"),
    "hole": header({"w": entry(offsets=[4, 8])}, b"12345678"),
    "padded": header({"w": entry()}, b"12345678"),
    "unknown key": header({"w": entry() | {"code": "x"}}, b"1234"),
    "control characters": header({"w\x1b[2J": entry()}, b"1234"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_header_is_refused_naming_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HOSTILE_HEADERS[name])
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        read_model_folder(tmp_path, {"w": "w"}, {})
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"w": "../model.safetensors"}},
        {"weight_map": {"w": "/etc/passwd"}},
        {"weight_map": {"w": "weights.bin"}},
        {"weight_map": {"w": 3}},
        {"weight_map": []},
        {"weight_map": {"w": "absent.safetensors"}},
        {"weight_map": {"v": "model.safetensors"}},
        {"weight_map": {"w": "model.safetensors", "v": "model.safetensors"}},
        [],
    ],
)
def test_hostile_index_is_refused(tmp_path: Path, index: object) -> None:
    wanted = write(tmp_path, {"w": torch.ones(3)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        read_model_folder(tmp_path, {"w": "w"}, wanted)


def test_a_folder_with_its_weights_twice_is_refused_by_name(tmp_path: Path) -> None:
    wanted = write(tmp_path, {"w": torch.ones(3)})
    save_file({"w": torch.zeros(3)}, tmp_path / "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(InputError, match=r"twice: model\.safetensors, and .*index\.json with model-00001-of.*; remove"):
        read_model_folder(tmp_path, {"w": "w"}, wanted)
    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    read_model_folder(tmp_path, {"w": "w"}, wanted)
    assert wanted["w"][1].tolist() == [1, 1, 1]
