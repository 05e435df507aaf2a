"""The placement table against the ranks together and against a naive twin that looks at one element at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.card import Block, Buffer, Card, Parameter
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import AXIS_RULES, Box, Layout, coordinates, split_dimension
from meshwright.placement import Placement, placements, regions, tensor_split

SHAPE = LlamaShape(layers=2, hidden=12, heads=6, kv_heads=2, head_dim=4, ffn=10, vocab=18)
TIED = LlamaShape(
    layers=2, hidden=12, heads=6, kv_heads=2, head_dim=4, ffn=10, vocab=18, tied=True, bias_of=("qkv", "out")
)
Stages = tuple[tuple[str, ...], ...]


def even(model: Card, pp: int) -> Stages:
    names = [block.name for block in model.blocks]
    cuts = [index * len(names) // pp for index in range(pp + 1)]
    return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(cuts))


def world(model: Card, layout: Layout) -> list[dict[str, Placement]]:
    """The rows of every rank."""
    stages = even(model, layout.pp)
    places = [coordinates(layout, rank) for rank in range(layout.devices)]
    return [placements(model, layout, at, stages[at.pp] if layout.pp > 1 else None) for at in places]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    replicate, shard, tp, pp, cp = (draw(st.integers(1, most)) for most in (2, 4, 3, 3, 2))
    dp = replicate * shard // math.gcd(replicate * shard, cp)  # so that shard divides dp x cp
    return Layout(dp=dp, shard=shard, tp=tp, pp=pp, cp=cp, sequence_parallel=tp > 1 and draw(st.booleans()))


@st.composite
def cards(draw: st.DrawFn) -> Card:
    """Blocks of parameters of any shapes and axes, scalars and empty tensors too; the first may be tied to the last."""
    axes = st.sampled_from([None, *AXIS_RULES])
    blocks = []
    for number in range(draw(st.integers(3, 5))):
        table = [
            Parameter(f"blocks.{number}.p{index}", shape, tuple(draw(axes) for _ in shape))
            for index, shape in enumerate(
                draw(st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), max_size=4))
            )
        ]
        blocks.append(Block(str(number), "layer", tuple(table)))
    first = blocks[0].parameters
    tied = ((first[0].name, f"blocks.{len(blocks) - 1}.alias"),) if first and draw(st.booleans()) else ()
    return Card("made up", tuple(blocks), tied=tied)


def elements(box: Box) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(start, start + size) for start, size in zip(box.start, box.shape, strict=True)))


@settings(max_examples=150)
@given(cards(), layouts())
def test_every_element_is_held_replicas_times_and_owned_once(model: Card, layout: Layout) -> None:
    rows = [row for rank in world(model, layout) for row in rank.values()]
    for parameter in model.parameters:
        mine = [row for row in rows if row.name == parameter.name]
        held: dict[tuple[int, ...], list[Placement]] = {}
        for row in mine:
            for element in elements(row.box):
                held.setdefault(element, []).append(row)
        assert set(held) == set(elements(Box.whole(parameter.shape)))
        for holders in held.values():
            assert {row.replicas for row in holders} == {len(holders)}
            assert len({row.box for row in holders}) == 1
            assert [row.owner for row in holders].count(True) == 1


@settings(max_examples=150)
@given(cards(), layouts())
def test_rows_equal_a_naive_twin(model: Card, layout: Layout) -> None:
    """The twin asks of each element which rank has it, dimension by dimension, in torch.chunk's way."""
    for rank, rows in enumerate(world(model, layout)):
        at = coordinates(layout, rank)
        stage = even(model, layout.pp)[at.pp]
        assert {row.name for row in rows.values()} == {
            name
            for name in (p.name for p in model.parameters)
            if any(other.split(".")[1] in stage for other in (name, *(a for n, a in model.tied if n == name)))
        }
        for row in rows.values():
            parameter = next(p for p in model.parameters if p.name == row.name)
            kept = [list(range(size)) for size in parameter.shape]
            for axis, dim in row.split:
                parts, index = {"tp": (layout.tp, at.tp), "shard": (layout.shard, at.shard)}[axis]
                step = -(-len(kept[dim]) // parts)
                kept[dim] = kept[dim][index * step : (index + 1) * step]
            assert row.box.shape == tuple(map(len, kept))
            assert all(values[0] == start for values, start in zip(kept, row.box.start, strict=True) if values)
            cut = dict(row.split)
            tensor_axes = [dim for dim, axis in enumerate(parameter.axes) if axis and AXIS_RULES[axis] == "tp"]
            assert cut.get("tp") == (tensor_axes[0] if tensor_axes and layout.tp > 1 else None)
            assert cut.get("shard") == (0 if parameter.shape and layout.shard > 1 else None)


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["plain", "tied"])
def test_owners_are_spread_over_replicas(shape: LlamaShape) -> None:
    model = card(shape, 8)
    for rank, rows in enumerate(world(model, Layout(dp=3, tp=2))):
        at = coordinates(Layout(dp=3, tp=2), rank)
        for index, row in enumerate(rows.values()):
            whole = row.box == Box.whole(row.box.global_shape)
            replicas, replica = (6, at.replicate * 2 + at.tp) if whole else (3, at.replicate)
            assert (row.replicas, row.owner) == (replicas, index % replicas == replica)


def test_partial_gradients_over_tensor_parallel_ranks() -> None:
    """Without sequence parallelism only what acts inside a region is partial: norms of heads, not the residual's."""
    model = card(LlamaShape(2, 12, 6, 2, 4, 10, 18, qk_norm=True, bias_of=("qkv", "out")), 8)
    apart = world(model, Layout(tp=2))[0]
    assert {name for name, row in apart.items() if row.partial} == {
        f"blocks.{layer}.attn.{norm}.weight" for layer in range(2) for norm in ("q_norm", "k_norm")
    }
    along = world(model, Layout(tp=2, sequence_parallel=True))[0]
    assert {name for name, row in along.items() if row.partial} == set(model_names(model)) - set(tensor_split(model))
    assert not any(row.partial for row in world(model, Layout(dp=4, shard=2))[0].values())
    assert regions(tensor_split(model)) == {f"blocks.{layer}.{part}" for layer in range(2) for part in ("attn", "ffn")}


def model_names(model: Card) -> list[str]:
    return [parameter.name for parameter in model.parameters]


def test_a_tied_weight_on_both_ends_has_two_copies_and_one_owner() -> None:
    first, _, last, _ = world(card(TIED, 8), Layout(pp=2, dp=2))
    embed, head = first["blocks.embed.weight"], last["blocks.head.out.weight"]
    assert (embed.name, embed.replicas, embed.owner, embed.partial) == ("blocks.embed.weight", 4, True, ("ends",))
    assert (head.name, head.replicas, head.owner, head.partial) == ("blocks.embed.weight", 4, False, ("ends",))
    assert list(last)[-1] == "blocks.head.out.weight"
    whole = world(card(TIED, 8), Layout())[0]
    assert "blocks.head.out.weight" not in whole and not any(row.partial for row in whole.values())


@pytest.mark.parametrize(
    "layout", [Layout(dp=4, shard=2, tp=2), Layout(pp=2, tp=3), Layout(dp=2, cp=2, shard=4)], ids=str
)
def test_buffers_are_whole_on_every_rank_of_their_stage_and_owned_by_its_first(layout: Layout) -> None:
    kept, lost = Buffer("blocks.b.mean", (3,), 4), Buffer("blocks.b.mask", (9,), 1, persistent=False)
    weight = Parameter("blocks.a.w", (8, 8), (None, None))
    model = Card("normed", (Block("a", "layer", (weight,)), Block("b", "norm", (), buffers=(kept, lost))))
    rows = [rank.get("blocks.b.mean") for rank in world(model, layout)]
    column = layout.devices // layout.pp
    first = column if layout.pp > 1 else 0  # block b is in the last stage
    expected = {
        rank: Placement("blocks.b.mean", Box.whole((3,)), column, rank == first)
        for rank in range(first, first + column)
    }
    assert {rank: row for rank, row in enumerate(rows) if row} == expected
    assert not any("blocks.b.mask" in rank for rank in world(model, layout))


def test_an_axis_is_split_as_the_rules_say() -> None:
    assert split_dimension(("embed", "ffn")) == 1
    assert split_dimension(("expert", "expert_ffn", "embed")) == 1  # experts are not split along tensor-parallel ranks
    assert split_dimension(("embed", None)) is None and split_dimension(()) is None
