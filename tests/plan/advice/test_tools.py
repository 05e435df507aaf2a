"""Advice for a team: each verdict follows from the plans and the facts of the job."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import verbs
from meshwright.cluster import named_cluster
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.job import SMALL_JOB, Job, load_job
from meshwright.layout import Layout
from meshwright.plan.advice import Advice, DataVolume, FrameworkPlan, advise, frameworks
from meshwright.plan.advice.strategies import Situation
from meshwright.plan.advice.tools import EXPERIENCE, TOOLS, Verdict
from meshwright.plan.rules import FRAMEWORKS

TITAN, MEGATRON = "PyTorch FSDP2 (torchtitan)", "Megatron-LM, Megatron Bridge"
READING = DataVolume("corpus/", "tokens", 2**20, 1000, 3_400_000_000, 4, 4)
NODE = Situation(
    cluster=named_cluster("h100-sxm-80gb", 8),
    parameters=8_000_000_000,
    language_model=True,
    built_in=True,
    experts=False,
    reading=READING,
    experience="expert",
    margin=1.25,
)
NODES = replace(NODE, cluster=named_cluster("h100-sxm-80gb", 64))
SHARDED = Layout(dp=8, shard=8)
MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 16,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}


def plans(facts: Situation, layout: Layout = SHARDED, **seconds: float) -> dict[str, FrameworkPlan | CannotWork]:
    """The same layout for every framework to plan; a step of 10 s where `seconds` has no other."""
    return {row: FrameworkPlan(row, seconds.get(row.partition("-")[0], 10.0), layout) for row in frameworks(facts)}


def verdict(advice: Advice, tool: str) -> Verdict:
    return next(one for one in advice.tools if one.tool == tool)


def suiting(advice: Advice) -> list[str]:
    return [one.tool for one in advice.tools if one.suits]


def why(advice: Advice, strategy: str) -> str:
    return next((one.why for one in advice.strategies if one.strategy.startswith(strategy)), "")


def job(shape: dict[str, Any], devices: int, seq_len: int, batch: int, **sections: dict[str, Any]) -> Job:
    return Job(
        model=shape,
        data={"source": "stdlib", "seq_len": seq_len, "tokenizer": "bytes"},
        train={"steps": 10, "lr": 1e-3, "global_batch": batch},
        cluster={"named": "h100-sxm-80gb", "devices": devices},
        data_must_exist=False,
        **sections,
    )


def mixtral(folder: Path, devices: int, **sections: dict[str, Any]) -> Job:
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    return job({"hf": str(folder)}, devices, 4096, 64, **sections)


LLAMA = {"family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256}


def test_what_a_tool_splits_by_is_what_its_framework_offers() -> None:
    rows = [tool for tool in TOOLS if tool.framework]
    assert [tool.framework for tool in rows] == ["meshwright", "torchtitan", "megatron-bridge", "deepspeed"]
    for tool in rows:
        offers = FRAMEWORKS[tool.framework].offers
        assert tool.splits == offers.fields | ({"offload"} if offers.offload else set()) and not tool.own_splits


def test_the_quickest_comes_first_when_the_margin_tells_them_apart() -> None:
    advice = advise(NODE, plans(NODE, megatron=5.0))
    assert suiting(advice)[:4] == [MEGATRON, "Meshwright", TITAN, "DeepSpeed"]
    assert "predicted 5 s a step as dp8 shard8 micro1, the shortest of those that suit" in advice.tools[0].why
    assert "predicted 10 s a step as dp8 shard8 micro1, 100% more than Megatron-LM's 5 s" in advice.tools[1].why


def test_of_those_that_are_level_the_least_experience_comes_first() -> None:
    advice = advise(NODE, plans(NODE, megatron=9.0, torchtitan=20.0))
    assert suiting(advice)[:4] == ["Meshwright", "DeepSpeed", MEGATRON, TITAN]
    assert "level with Megatron-LM's 9 s: 11% more is within the plan's margin of 25%" in advice.tools[0].why
    assert (advice.tools[2].step_seconds, advice.tools[2].layout) == (9.0, SHARDED)
    assert "as long as" in advise(NODE, plans(NODE, megatron=9.99)).tools[0].why


def test_what_asks_for_more_experience_says_what_it_would_bring() -> None:
    facts = replace(NODE, experience="new")
    advice = advise(facts, plans(facts, megatron=5.0))
    assert suiting(advice) == ["Meshwright"]
    against = verdict(advice, MEGATRON).why
    assert against.startswith("asks for more experience (expert) than the team's (new); predicted 5 s a step")
    assert against.endswith("50% less than Meshwright's 10 s")


def test_where_none_suits_the_nearest_is_named() -> None:
    facts = replace(NODES, experience="new", untrained="trained are llama")
    advice = advise(facts, plans(facts, Layout(dp=64, shard=64), torchtitan=8.0, megatron=4.0))
    assert suiting(advice) == [] and advice.strategies[0].strategy == "no tool suits"
    assert "torchtitan is the closest, but needs more experience (some)" in advice.strategies[0].why


def test_a_model_that_train_does_not_build_speaks_against_meshwright() -> None:
    facts = replace(NODE, untrained="trained are llama")
    assert "meshwright" not in frameworks(facts)
    against = verdict(advise(facts, plans(facts)), "Meshwright")
    assert not against.suits and against.why == "plans this model, does not train it yet (trained are llama)"


def test_meshwright_is_planned_for_and_suits_on_many_machines_too() -> None:
    assert NODES.cluster.nodes == 8 and "meshwright" in frameworks(NODES)
    assert verdict(advise(NODES, plans(NODES)), "Meshwright").suits


def test_a_framework_that_has_no_layout_says_why() -> None:
    nothing = CannotWork([Problem("model", "the model does not fit", "more devices"), Problem("", "another")])
    advice = advise(NODE, {**plans(NODE), "torchtitan": nothing})
    assert (verdict(advice, TITAN).suits, verdict(advice, TITAN).why) == (False, "the model does not fit")
    with pytest.raises(CannotWork, match="under deepspeed: the model does not fit") as caught:
        advise(NODE, dict.fromkeys(frameworks(NODE), nothing))
    assert len(caught.value.problems) == 8


def test_tools_without_a_row_are_judged_by_the_layout_advised() -> None:
    copies = advise(NODE, plans(replace(NODE, parameters=10**8), Layout(dp=8)))
    assert {"PyTorch DDP", "Ray Train", "JAX with MaxText"} <= set(suiting(copies))
    against = verdict(advise(NODE, plans(NODE)), "PyTorch DDP").why
    assert against == "does not split by shard, as the layout advised does"
    # DeepSpeed keeps whole weights here, and what makes them fit is that it spreads the optimizer's state
    spread = advise(NODE, {"deepspeed": FrameworkPlan("deepspeed", 1.0, Layout(dp=8))})
    assert "PyTorch DDP" not in suiting(spread)
    assert "96 GB, is spread over the 8 of them" in why(spread, "data parallel with a distributed optimizer")


def test_what_is_not_kept_is_never_suggested_and_says_since_when() -> None:
    assert verdict(advise(NODE, plans(NODE)), "TorchServe").why == "not kept any more: ended in 2025"


def test_a_tpu_is_not_a_gpu() -> None:
    facts = replace(NODE, cluster=named_cluster("tpu-v5p", 4))
    assert frameworks(facts) == ("meshwright",), "there must be a layout"
    advice = advise(facts, plans(facts))
    assert suiting(advice) == ["JAX with MaxText"]
    assert verdict(advice, "Meshwright").why == "does not run on TPUs"
    assert "see that the order of samples" in why(advice, "data")


def test_a_pipeline_names_the_link_that_it_uses() -> None:
    pipeline = Layout(dp=2, pp=4, shard=2)
    one = why(advise(NODE, plans(NODE, pipeline)), "pipeline")
    assert "here over NVLink4 (450 GB/s a device)" in one and "network" not in one
    several = advise(NODES, plans(NODES, replace(pipeline, dp=2, tp=8)))
    assert "here over the network (InfiniBand, 50 GB/s a device)" in why(several, "pipeline")
    assert "stays inside a node, on NVLink4 (450 GB/s a device), 9 times the network's" in why(several, "tensor")
    assert "over 16 devices it has to cross the network" in why(advise(NODES, plans(NODES, Layout(tp=16))), "tensor")


def test_what_is_kept_elsewhere_or_computed_again_is_said() -> None:
    advice = advise(NODE, plans(NODE, replace(SHARDED, recompute="full", offload=True)))
    assert "4 GB each without the optimizer" in why(advice, "sharded")
    assert "computed again" in why(advice, "saving memory")
    assert "optimizer's 96 GB stay in the hosts' memory" in why(advice, "saving memory")


@pytest.mark.parametrize(
    ("device", "layout", "words"),
    [
        ("h100-sxm-80gb", Layout(offload=True), "of 128 GB are more than its 85.5 GB: it works as offload micro1"),
        ("h200-sxm", Layout(recompute="full"), "of 128 GB barely leave room in its 151 GB"),
        ("b300-sxm", Layout(), "of 128 GB fit its 288 GB"),
    ],
)
def test_one_device(device: str, layout: Layout, words: str) -> None:
    facts = replace(NODE, cluster=named_cluster(device, 1))
    assert words in why(advise(facts, plans(facts, layout)), "one device")


def test_data_says_how_much_is_read_and_where_to_keep_it() -> None:
    layout = Layout(dp=64, shard=64)
    words = why(advise(NODES, plans(NODES, layout)), "data")
    for figure in ("1.05 billion tokens", "1.2 passes", "3.4 GB of corpus/", "104,858 a second", "52.4 kB/s a node"):
        assert figure in words
    assert "storage that the 8 nodes share is enough" in words
    images = replace(NODES, reading=DataVolume("images/", "samples", 10_000, 5, 10**9, 0, 600_000))
    words = why(advise(images, plans(images, layout)), "data")
    assert "50,000 samples of the 1 GB of images/, 1,000 a second or 75 MB/s a node: storage that the 8" in words
    quick = why(advise(images, plans(images, layout, torchtitan=5.0, megatron=5.0, deepspeed=5.0)), "data")
    assert "150 MB/s a node: put a copy near each of 8 nodes: it is more than the 100 MB/s of a gigabit link" in quick
    # two copies of the model: half of the nodes read the same
    spanning = why(advise(NODES, plans(NODES, Layout(dp=2, tp=8, pp=4))), "data")
    assert "or 210 kB/s a node" in spanning
    assert "order of samples does not depend" in why(advise(NODE, plans(NODE)), "data")


def test_data_without_a_size() -> None:
    facts = replace(NODES, reading=DataVolume("away/", "samples", 100, 10))
    assert "a run reads 1,000 samples, 10 a second: put a copy near each" in why(advise(facts, plans(facts)), "data")


def test_unknown_experience() -> None:
    with pytest.raises(InputError, match="experience 'guru' is not known; known: expert, new, some"):
        replace(NODE, experience="guru")


@given(
    layout=st.builds(
        Layout,
        dp=st.sampled_from((1, 2)),
        shard=st.sampled_from((1, 2)),
        tp=st.sampled_from((1, 2)),
        pp=st.sampled_from((1, 2)),
        cp=st.sampled_from((1, 2)),
        ep=st.sampled_from((1, 2)),
        offload=st.booleans(),
    ),
    device=st.sampled_from(("h100-sxm-80gb", "mi300x", "tpu-v5p", "gaudi3", "trainium2")),
    experience=st.sampled_from(EXPERIENCE),
    language=st.booleans(),
)
def test_a_tool_that_suits_can_do_all_that_it_is_advised_for(
    layout: Layout, device: str, experience: str, language: bool
) -> None:
    facts = replace(NODE, cluster=named_cluster(device, 8), experience=experience, language_model=language)
    advice = advise(facts, plans(facts, layout))
    assert sorted(one.tool for one in advice.tools) == sorted(tool.name for tool in TOOLS)
    assert [one.suits for one in advice.tools] == sorted((one.suits for one in advice.tools), reverse=True)
    for one in advice.tools:
        tool = next(tool for tool in TOOLS if tool.name == one.tool)
        assert one.why and (one.step_seconds is None) == (one.layout is None)
        if one.suits:
            assert facts.kind in tool.kinds and not tool.ended and (language or tool.models == "any")
            assert EXPERIENCE.index(tool.least_experience) <= EXPERIENCE.index(experience)
            if not tool.framework:
                assert {name for name in ("dp", "tp", "pp", "cp", "ep") if getattr(layout, name) > 1} <= tool.splits
    more = advise(replace(facts, experience="expert"), plans(facts, layout))
    assert set(suiting(advice)) <= set(suiting(more))


def test_experts_are_spread_where_that_wins(tmp_path: Path) -> None:
    advice = verbs.advice(mixtral(tmp_path, 16), experience="expert")
    against = verdict(advice, "Meshwright")
    assert not against.suits and "plans this model, does not train it yet (trained are llama" in against.why
    spread = [one for one in advice.tools if one.layout and one.layout.ep > 1]
    best = advice.tools[0]
    assert best.suits and best.layout is not None
    words = why(advice, "expert parallel")
    if best.layout.ep > 1:
        assert f"spread over {best.layout.ep} devices, and tokens travel to them over" in words
    else:
        assert words.startswith("the experts of a layer stay together")
        for one in spread:
            assert f"spreads them over {one.layout.ep if one.layout else 0} devices" in words


@pytest.mark.parametrize(
    ("rows", "experience", "words"),
    [
        ({"torchtitan": 1, "megatron-bridge": 1, "deepspeed": 1}, "some", "no layout of torchtitan that spreads them"),
        ({"megatron-bridge": 1, "deepspeed": 1}, "some", "Megatron-LM can, and the best layout of it does without"),
        ({"torchtitan": 4, "deepspeed": 1}, "some", "torchtitan spreads them over 4 devices, for 20 s a step against"),
        ({"deepspeed": 1}, "some", "of the tools that do (torchtitan, Megatron-LM and JAX with MaxText) none suits"),
        ({"deepspeed": 1}, "expert", "DeepSpeed does not spread them; JAX with MaxText can"),
        ({"torchtitan": 8}, "some", "spread over 8 devices, and tokens travel to them over NVLink4 (450 GB/s"),
        ({"torchtitan": 16}, "some", "tokens travel to them over the network (InfiniBand, 50 GB/s a device)"),
    ],
)
def test_why_experts_stay_together(rows: dict[str, int], experience: str, words: str) -> None:
    facts = replace(NODES, experts=True, experience=experience, untrained="trained are llama")
    nothing = CannotWork(Problem("model", "the model does not fit"))
    layouts = {row: Layout(dp=64, shard=64, ep=ep) for row, ep in rows.items()}
    times = {"deepspeed": 10.0}
    results: dict[str, FrameworkPlan | CannotWork] = dict.fromkeys(frameworks(facts), nothing)
    for row, layout in layouts.items():
        results[row] = FrameworkPlan(row, times.get(row, 20.0 if layout.ep > 1 else 9.0), layout)
    assert words in why(advise(facts, results), "expert parallel")


def test_experts_that_the_job_pins_together(tmp_path: Path) -> None:
    advice = verbs.advice(mixtral(tmp_path, 16, layout={"ep": 1}), experience="expert")
    assert why(advice, "expert parallel") == "the experts of a layer stay together: the job pins ep=1"


def test_long_sequences_are_split_where_a_tool_within_reach_does() -> None:
    long = job(LLAMA, 8, 131072, 8)
    expert = verbs.advice(long, experience="expert")
    best = expert.tools[0]
    assert best.layout is not None and best.layout.cp > 1
    assert f"each sequence is split over {best.layout.cp} devices" in why(expert, "context")
    assert "over NVLink4" in why(expert, "context")
    new = verbs.advice(long, experience="new")
    assert suiting(new) == ["Meshwright"]
    assert why(new, "context").startswith("Meshwright does not offer it; Megatron-LM, which does not suit here, splits")


def test_the_demo_is_for_beginners(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(SMALL_JOB)
    advice = verbs.advice(load_job(path, ["cluster.devices=2"]), experience="new")
    assert suiting(advice) == ["Meshwright", "PyTorch DDP"]
    assert "MB of Python's standard library, at 4 bytes a token" in why(advice, "data")
    for tool in (TITAN, MEGATRON):
        assert verdict(advice, tool).why.startswith("does not run on CPUs") and verdict(advice, tool).layout is None
    first = advice.as_dict()["tools"][0]
    assert first["layout"]["dp"] == 2 and first["step_seconds"] == advice.tools[0].step_seconds


def test_what_no_framework_offers_is_refused_with_every_reason() -> None:
    with pytest.raises(CannotWork) as caught:
        verbs.advice(job(LLAMA, 8, 4096, 8, layout={"ep": 2}), experience="expert")
    assert {problem.what.split(":")[0] for problem in caught.value.problems} == {
        f"under {tool.framework}" for tool in TOOLS if tool.framework
    }


def test_a_folder_of_text_is_measured_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "corpus" / name).write_bytes(b"x" * 40_960)
    sources = {"source": str(tmp_path / "corpus"), "seq_len": 4096, "tokenizer": "bytes"}
    base = job(LLAMA, 8, 4096, 8)
    advice = verbs.advice(Job(**{**base.as_dict(), "data": sources}), experience="new")
    assert "327,680 tokens (about 4 passes over the 81.9 kB of corpus/, at 1 byte a token)" in why(advice, "data")
    monkeypatch.setattr(import_module("meshwright.verbs.advice"), "MOST_FILES", 1)
    advice = verbs.advice(Job(**{**base.as_dict(), "data": sources}), experience="new")
    assert "a run reads 327,680 tokens, " in why(advice, "data")
