"""Advice for a team: what suits, what does not, and that each verdict follows from the facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import named_cluster
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import Layout
from meshwright.plan.advice import EXPERIENCE, TOOLS, Situation, advise, situation

SMALL = Situation(
    parameters=25_000_000,
    state_bytes=400_000_000,
    device_bytes=12 * 10**9,
    devices=2,
    nodes=1,
    device_kind="cpu",
    intra_bytes_per_second=1e9,
    inter_bytes_per_second=1e9,
    language_model=True,
    built_in=True,
    experts=False,
    needs=frozenset({"dp"}),
    experience="new",
)


def suiting(facts: Situation) -> set[str]:
    return {verdict.tool for verdict in advise(facts).tools if verdict.suits}


def test_a_beginner_with_a_small_model_copies_it() -> None:
    found = advise(SMALL)
    assert found.strategies[0].strategy == "replicated data parallel"
    assert suiting(SMALL) == {"Meshwright", "PyTorch DDP"}


def test_a_model_too_large_for_a_device_is_sharded() -> None:
    shape = LlamaShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
    cluster = named_cluster("h100-sxm-80gb", 64)
    facts = situation(card(shape, 8192), cluster, Layout(dp=64, shard=64), built_in=True, experience="some")
    found = advise(facts)
    names = [reason.strategy for reason in found.strategies]
    assert names[0] == "sharded data parallel (FSDP, ZeRO)"
    assert "128 GB" in found.strategies[0].why and "2.01 GB each" in found.strategies[0].why
    assert {"PyTorch FSDP2 (torchtitan)", "DeepSpeed", "Meshwright"} <= suiting(facts)
    assert "Megatron-LM, Megatron Bridge" not in suiting(facts), "it asks for more experience"
    assert "PyTorch DDP" not in suiting(facts)


def test_four_dimensions_and_experts_leave_the_experts_tools() -> None:
    facts = replace(
        SMALL,
        device_kind="cuda",
        nodes=128,
        devices=1024,
        experts=True,
        needs=frozenset({"dp", "tp", "pp", "vpp", "ep"}),
        experience="expert",
        state_bytes=10**13,
        device_bytes=80 * 10**9,
        intra_bytes_per_second=450e9,
        inter_bytes_per_second=50e9,
    )
    assert suiting(facts) == {"Megatron-LM, Megatron Bridge"}
    words = " ".join(reason.why for reason in advise(facts).strategies)
    assert "9 times the network's speed" in words and "tokens travel" in words


def test_what_is_not_kept_is_never_suggested_and_says_since_when() -> None:
    for verdict in advise(SMALL).tools:
        if verdict.tool == "TorchServe":
            assert not verdict.suits and "ended in 2025" in verdict.why


def test_a_tpu_is_not_a_gpu() -> None:
    facts = replace(SMALL, device_kind="tpu", experience="expert", needs=frozenset({"dp", "shard"}))
    assert suiting(facts) == {"JAX with MaxText"}


def test_unknown_experience() -> None:
    with pytest.raises(ValueError, match="none of new, some, expert"):
        advise(replace(SMALL, experience="guru"))


@given(
    needs=st.frozensets(st.sampled_from(("dp", "shard", "tp", "pp", "vpp", "cp", "ep", "offload"))),
    kind=st.sampled_from(("cpu", "cuda", "tpu")),
    experience=st.sampled_from(EXPERIENCE),
    language=st.booleans(),
)
def test_a_tool_that_suits_can_do_all_that_the_plan_needs(
    needs: frozenset[str], kind: str, experience: str, language: bool
) -> None:
    facts = replace(SMALL, needs=needs, device_kind=kind, experience=experience, language_model=language)
    found = advise(facts)
    assert len(found.tools) == len(TOOLS)
    for verdict in found.tools:
        tool = next(tool for tool in TOOLS if tool.name == verdict.tool)
        if verdict.suits:
            assert needs <= tool.splits and kind in tool.kinds and not tool.ended
            assert EXPERIENCE.index(tool.least_experience) <= EXPERIENCE.index(experience)
        else:
            assert verdict.why
    more = advise(replace(facts, experience="expert"))
    assert {v.tool for v in found.tools if v.suits} <= {v.tool for v in more.tools if v.suits}
