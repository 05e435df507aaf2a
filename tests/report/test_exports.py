"""A plan in other frameworks' words, read back by their own formats' parsers."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.families.decoder import DecoderShape
from meshwright.layout import SCHEDULES, Layout
from meshwright.plan.pipeline import TABLE
from meshwright.plan.pipeline.actions import schedule_problem
from meshwright.report.exports import EXPORTERS, Export
from meshwright.report.planfolder import RECORD, plan_files, write_plan
from meshwright.report.training_words import Recipe
from tests.report.plans import plan

DENSE = DecoderShape(16, 1024, 16, 4, 64, 2816, 32000, hf_type="llama")
MIXTURE = DecoderShape(
    16, 1024, 16, 16, 64, 2816, 32000, experts=8, top_k=2, expert_ffn=704, shared_ffn=704, first_dense_layers=1
)
RECIPE = Recipe(DENSE, seq_len=4096, steps=1000, lr=3e-4, devices_per_node=8, rope_theta=500000.0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout and its micro-batches, that can be."""
    schedule = draw(st.sampled_from(SCHEDULES))
    row = TABLE[schedule]
    pp, dp, cp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    vpp = draw(st.integers(row.least_vpp, min(row.most_vpp, 3))) if pp > 1 else 1
    schedule = schedule if pp > 1 else "1f1b"
    tp = draw(st.sampled_from([1, 2, 4]))
    micro_batches = draw(st.integers(1, 16))
    assume(schedule_problem(schedule, pp, micro_batches, vpp) is None)
    return Layout(
        dp=dp,
        shard=draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, 32) if (dp * cp) % n == 0])),
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=draw(st.sampled_from([n for n in (1, 2, 4, 8) if (dp * cp) % n == 0])),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        micro_batch=draw(st.integers(1, 4)),
        schedule=schedule,
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        offload=draw(st.booleans()),
    ), micro_batches


def titan(made: Export) -> dict[str, Any]:
    return tomllib.loads(made.files["torchtitan.toml"])


def megatron(made: Export) -> tuple[dict[str, str], dict[str, str]]:
    """(torchrun's options, pretrain_gpt.py's), read as a shell reads them."""
    text = made.files["megatron.sh"]
    start = text.index("torchrun")
    words = shlex.split(text[start:].replace("\\\n", " "))
    at = words.index("pretrain_gpt.py")
    return tuple(options(part) for part in (words[1:at], words[at + 1 :]))  # type: ignore[return-value]


def options(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            assert word not in found, f"{word} twice"
            following = words[index + 1] if index + 1 < len(words) else "--"
            found[word] = "" if following.startswith("--") else following
    return found


@given(layouts())
def test_torchtitan_degrees_multiply_and_batches_add_up(made: tuple[Layout, int]) -> None:
    layout, micro_batches = made
    whole = plan(layout, micro_batches)
    config = titan(EXPORTERS["torchtitan"](whole, RECIPE))
    degrees = config["parallelism"]
    product = 1
    for name in ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel"):
        product *= degrees[f"{name}_degree"]
    assert product * degrees["context_parallel_degree"] == layout.devices
    training = config["training"]
    # global batch = local batch x data-parallel ranks x accumulation; with a pipeline nothing is accumulated outside it
    ranks = degrees["data_parallel_replicate_degree"] * degrees["data_parallel_shard_degree"]
    accumulated = training["global_batch_size"] / (training["local_batch_size"] * ranks)
    assert training["global_batch_size"] == whole.global_batch
    assert accumulated == (1 if layout.pp > 1 else micro_batches)
    if layout.pp > 1:
        assert training["local_batch_size"] // degrees["pipeline_parallel_microbatch_size"] == micro_batches
        parts = degrees["module_fqns_per_model_part"]
        assert len(parts) == layout.pp * layout.vpp
        named = [name for part in parts for name in part]
        assert named == ["tok_embeddings", *(f"layers.{i}" for i in range(16)), "norm", "output"]
    if layout.shard % layout.cp == 0 and layout.shard > 1 and layout.shard % layout.ep == 0:
        assert degrees["data_parallel_shard_degree"] * layout.cp == layout.shard
    # its mesh for experts: those ranks x ep x etp are the ranks that shard weights x tp (parallel_dims.py, 0.2.2)
    assert degrees["data_parallel_shard_degree"] * layout.cp % layout.ep == 0
    assert degrees.get("expert_tensor_parallel_degree") == (layout.tp if layout.ep > 1 else None)


@given(layouts())
def test_megatron_degrees_multiply_and_batches_add_up(made: tuple[Layout, int]) -> None:
    layout, micro_batches = made
    whole = plan(layout, micro_batches)
    launch, words = megatron(EXPORTERS["megatron-lm"](whole, RECIPE))
    world = int(launch["--nnodes"]) * int(launch["--nproc_per_node"])
    assert world == layout.devices
    model = 1
    for name in ("tensor-model", "pipeline-model", "context"):
        model *= int(words[f"--{name}-parallel-size"])
    data = world // model  # Megatron works it out so
    assert data == layout.dp
    assert int(words["--global-batch-size"]) == data * int(words["--micro-batch-size"]) * micro_batches
    assert ("--sequence-parallel" in words) == layout.sequence_parallel
    if layout.pp > 1:
        stages = words["--pipeline-model-parallel-layout"].split("|")
        assert len(stages) == layout.pp * layout.vpp and "".join(stages) == "E" + "t" * 16 + "L"
    if "--num-distributed-optimizer-instances" in words:
        assert int(words["--num-distributed-optimizer-instances"]) * layout.shard == layout.dp * layout.cp
    # as its own checks have it (arguments.py, core 0.19.0)
    needs = {"--use-distributed-optimizer", "--overlap-grad-reduce"}
    assert "--overlap-param-gather" not in words or needs <= set(words)
    assert "--optimizer-cpu-offload" not in words or "--use-distributed-optimizer" in words
    script = EXPORTERS["megatron-lm"](whole, RECIPE).files["megatron.sh"]
    assert ("CUDA_DEVICE_MAX_CONNECTIONS=1" in script) == ("--use-megatron-fsdp" not in words)


@given(layouts())
def test_deepspeed_batches_add_up_and_launch_all_devices(made: tuple[Layout, int]) -> None:
    layout, micro_batches = made
    whole = plan(layout, micro_batches)
    written = EXPORTERS["deepspeed"](whole, RECIPE)
    config = json.loads(written.files["deepspeed.json"])
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * layout.dp
    assert batch == whole.global_batch
    assert config.get("train_batch_size") == (batch if layout.tp == 1 else None)  # its check counts tensor ranks too
    line = written.files["deepspeed.sh"].splitlines()[-1]
    launch = options(shlex.split(line))
    assert int(launch["--num_nodes"]) * int(launch["--num_gpus"]) == layout.devices
    zero = config["zero_optimization"]
    assert layout.pp == 1 or zero["stage"] <= 1  # DeepSpeed's pipeline refuses more
    assert (zero["stage"] == 3) == (layout.pp == 1 and layout.shard > 1)


@given(layouts(), st.sampled_from(list(EXPORTERS)))
def test_what_cannot_be_said_is_data_and_comment(made: tuple[Layout, int], name: str) -> None:
    written = EXPORTERS[name](plan(*made), RECIPE)
    text = "\n".join(written.files.values())
    assert all(f"# not said here: {' '.join(sentence.split())}" in text for sentence in written.omitted)
    assert written.version in text


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("torchtitan", Layout(pp=2, schedule="zb-h2"), "schedule zb-h2"),
        ("torchtitan", Layout(tp=2), "without sequence parallelism"),
        ("torchtitan", Layout(dp=2, tp=2), "whole weights beside other kinds of parallelism"),
        ("torchtitan", Layout(dp=2, cp=2), "shard=1 with cp=2"),
        ("torchtitan", Layout(offload=True), "offload of the optimizer alone"),
        ("megatron-lm", Layout(pp=2, schedule="gpipe"), "schedule gpipe"),
        ("megatron-lm", Layout(dp=4, shard=2), "part of the data-parallel ranks"),
        ("deepspeed", Layout(pp=3), "stages of 6, 6, 6 blocks"),
        ("deepspeed", Layout(pp=4), "stages of 5, 5, 4, 4 blocks"),
        ("deepspeed", Layout(pp=2, schedule="gpipe"), "not gpipe"),
        ("deepspeed", Layout(dp=4, shard=2), "MiCS_Init"),
        ("deepspeed", Layout(dp=2, ep=2), "expert parallelism"),
        ("deepspeed", Layout(cp=2), "Ulysses"),
        ("deepspeed", Layout(tp=2), "counts it 2 times over"),
        ("deepspeed", Layout(tp=2, pp=2), "tensor parallelism in a pipeline"),
        ("torchtitan", Layout(dp=4, ep=2), "shard=1 with ep=2"),
    ],
)
def test_what_a_framework_lacks_is_named(name: str, layout: Layout, expected: str) -> None:
    omitted = EXPORTERS[name](plan(layout, 4), RECIPE).omitted
    named = any(expected in sentence for sentence in omitted)
    assert named == (layout != Layout(pp=3)), omitted  # even stages need no word


def test_a_mixture_is_said_where_there_are_words_for_it() -> None:
    recipe = Recipe(MIXTURE, seq_len=2048, steps=10, lr=1e-4, devices_per_node=8)
    _, words = megatron(EXPORTERS["megatron-lm"](plan(Layout(dp=8, ep=8), 2), recipe))
    assert words["--num-experts"] == "8" and words["--expert-model-parallel-size"] == "8"
    assert json.loads(words["--moe-layer-freq"]) == [0, *[1] * 15]
    made = EXPORTERS["torchtitan"](plan(Layout(dp=8, shard=8, ep=8), 2), recipe)
    assert titan(made)["model"]["name"] == "deepseek_v3"
    assert any("8 experts of width 704, 2 to a token" in sentence for sentence in made.omitted)


def test_a_kind_that_torchtitan_lacks_is_not_called_another() -> None:
    mixtral = replace(MIXTURE, hf_type="mixtral")
    made = EXPORTERS["torchtitan"](plan(Layout(dp=8, shard=8, ep=8), 2), replace(RECIPE, shape=mixtral))
    assert titan(made)["model"]["name"] == "planned"
    assert any("torchtitan has no mixtral" in sentence for sentence in made.omitted)


def test_megatron_is_asked_for_the_overlap_that_was_predicted() -> None:
    for framework, overlaps in (("megatron-lm", False), ("megatron-bridge", True)):
        made = EXPORTERS["megatron-lm"](replace(plan(Layout(dp=8), 2), framework=framework), RECIPE)
        assert ("--overlap-grad-reduce" in megatron(made)[1]) == overlaps
        assert any("overlap, since" in sentence for sentence in made.omitted) != overlaps


def test_megatron_trains_what_was_planned() -> None:
    gemma = replace(DENSE, sliding_window=4096, hf_type="gemma")
    made = EXPORTERS["megatron-lm"](plan(Layout(), 2), replace(RECIPE, shape=gemma))
    words = megatron(made)[1]
    assert words["--attention-dropout"] == words["--hidden-dropout"] == "0"  # 0.1 unless it is said
    assert words["--window-size"] == "4095,0"  # tokens before a token, and after it
    assert any("what a gemma is beside its sizes" in sentence for sentence in made.omitted)
    bloom = replace(DENSE, gated=False, norm="layer", hf_type="bloom")
    assert megatron(EXPORTERS["megatron-lm"](plan(Layout(), 2), replace(RECIPE, shape=bloom)))[1][
        "--position-embedding-type"
    ] == ("none")
    plain = EXPORTERS["megatron-lm"](plan(Layout(), 2), RECIPE)
    assert not any("beside its sizes" in sentence for sentence in plain.omitted)


def test_precisions_and_odd_names_are_written_whole() -> None:
    whole = plan(Layout(), 2, precision="fp8")
    _, words = megatron(EXPORTERS["megatron-lm"](whole, RECIPE))
    assert "--bf16" in words and words["--fp8-format"] == "hybrid"
    assert (
        titan(EXPORTERS["torchtitan"](plan(Layout(), 2, precision="fp32"), RECIPE))["training"]["mixed_precision_param"]
        == "float32"
    )
    odd = Recipe(None, seq_len=1, steps=1, lr=1.0, devices_per_node=1)
    for name in EXPORTERS:
        assert any("the model" in sentence for sentence in EXPORTERS[name](whole, odd).omitted)


def test_a_shell_reads_megatrons_script(tmp_path: Path) -> None:
    """Run by a shell with torchrun replaced: what arrives is what was meant."""
    written = EXPORTERS["megatron-lm"](plan(Layout(dp=4, tp=2, pp=2, schedule="1f1b"), 8), RECIPE)
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "megatron.sh").write_text(written.files["megatron.sh"])
    ran = subprocess.run(
        ["/bin/sh", "megatron.sh"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    arrived = options(ran.stdout.splitlines()[ran.stdout.splitlines().index("pretrain_gpt.py") + 1 :])
    assert arrived == megatron(written)[1]


def test_the_folder_holds_all_and_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "plans" / "job"
    paths = write_plan(plan(Layout(dp=2, pp=2), 4), RECIPE, folder)
    names = {path.name for path in paths}
    assert names == set(plan_files(plan(Layout(dp=2, pp=2), 4), RECIPE))
    assert {"plan.json", "plan.html", "timeline.svg", "timeline.trace.json"} < names
    assert json.loads((folder / "plan.json").read_text())["chosen"]["layout"]["pp"] == 2
    write_plan(plan(Layout(dp=4), 4), RECIPE, folder)
    assert json.loads((folder / "plan.json").read_text())["chosen"]["layout"]["dp"] == 4
    assert set(json.loads((folder / RECORD).read_text())) | {RECORD} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["plan.json", "torchtitan.toml", RECORD])
def test_what_is_not_a_plans_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=re.escape(name)):
        write_plan(plan(Layout(), 1), RECIPE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_what_was_changed_since_is_left_alone(tmp_path: Path) -> None:
    write_plan(plan(Layout(), 1), RECIPE, tmp_path)
    (tmp_path / "megatron.sh").write_text("tuned by hand")
    with pytest.raises(InputError, match=r"megatron\.sh: was changed since"):
        write_plan(plan(Layout(dp=2), 1), RECIPE, tmp_path)
    assert (tmp_path / "megatron.sh").read_text() == "tuned by hand"
    assert json.loads((tmp_path / "plan.json").read_text())["chosen"]["layout"]["dp"] == 1


def test_a_record_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "plans", tmp_path / "mine"
    folder.mkdir()
    outside.write_text("")
    (folder / RECORD).write_text(
        json.dumps({"../mine": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"})
    )
    with pytest.raises(InputError, match="not a record"):
        write_plan(plan(Layout(), 1), RECIPE, folder)
    assert outside.exists()


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    write_plan(plan(Layout(dp=2), 4), RECIPE, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            write_plan(plan(Layout(dp=4), 4), RECIPE, folder)
    finally:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_plan(plan(Layout(dp=4), 4), RECIPE, folder)
    assert json.loads((folder / "plan.json").read_text())["chosen"]["layout"]["dp"] == 4


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_write_that_is_cut_off_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Killed between any two renames: what is there, old or new, is known to be a plan's."""
    folder = tmp_path / "plans"
    write_plan(plan(Layout(dp=2), 4), RECIPE, folder)
    real, calls = os.replace, []

    def replace_or_die(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > stop:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(KeyboardInterrupt):
        write_plan(plan(Layout(dp=4), 4), RECIPE, folder)
    monkeypatch.undo()
    write_plan(plan(Layout(dp=8), 4), RECIPE, folder)
    assert json.loads((folder / "plan.json").read_text())["chosen"]["layout"]["dp"] == 8
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    write_plan(plan(Layout(dp=2), 4), RECIPE, tmp_path)
    (tmp_path / ".plan-abc").mkdir()
    (tmp_path / ".plan-abc" / "plan.json").write_text("half")
    (tmp_path / ".written.json.77.tmp").write_text("half")
    write_plan(plan(Layout(dp=4), 4), RECIPE, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_record_that_nests_without_end_is_no_record(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not a record of a plan's files"):
        write_plan(plan(Layout(), 1), RECIPE, tmp_path)


def test_plans_that_are_written_at_once_both_arrive(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    with ThreadPoolExecutor(4) as pool:
        degrees = [2, 4, 8, 16] * 3
        list(pool.map(lambda dp: write_plan(plan(Layout(dp=dp), 4), RECIPE, folder), degrees))
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    dp = json.loads(texts["plan.json"])["chosen"]["layout"]["dp"]
    assert texts == {**plan_files(plan(Layout(dp=dp), 4), RECIPE), RECORD: texts[RECORD]}


def test_a_batch_that_groups_share_unevenly_has_no_configuration(tmp_path: Path) -> None:
    whole = plan(Layout(dp=4), 180)
    names = {path.name for path in write_plan(replace(whole, global_batch=512), RECIPE, tmp_path / "plans")}
    assert names == {"plan.json", "plan.html", "timeline.svg", "timeline.trace.json"}


@pytest.mark.parametrize("decay", ["cosine", "wsd", "constant"])
def test_how_it_trains_is_said_in_each_framework_s_words(decay: str) -> None:
    recipe = replace(
        RECIPE, warmup_steps=77, decay=decay, min_lr_ratio=0.05, decay_fraction=0.3, weight_decay=0.3,
        betas=(0.8, 0.85), eps=1e-6, clip=0.5, seed=42,
    )  # fmt: skip
    tables = titan(EXPORTERS["torchtitan"](plan(Layout(), 2), recipe))
    adam = {"beta1": 0.8, "beta2": 0.85, "eps": 1e-6, "weight_decay": 0.3}
    assert tables["optimizer"] == {"name": "AdamW", "lr": 3e-4, **adam}
    assert (tables["training"]["max_norm"], tables["debug"]["seed"]) == (0.5, 42)
    rate = tables["lr_scheduler"]
    assert rate["warmup_steps"] == 77
    assert rate.get("decay_ratio") == {"wsd": 0.3, "constant": 0.0}.get(decay)
    assert rate.get("decay_type", "none") == {"cosine": "cosine", "wsd": "linear"}.get(decay, "none")
    words = megatron(EXPORTERS["megatron-lm"](plan(Layout(), 2), recipe))[1]
    said = ("lr-warmup-iters", "weight-decay", "adam-beta1", "adam-beta2", "adam-eps", "clip-grad", "seed")
    assert [float(words[f"--{name}"]) for name in said] == [77, 0.3, 0.8, 0.85, 1e-6, 0.5, 42]
    assert words["--lr-decay-style"] == {"wsd": "WSD"}.get(decay, decay)
    assert words.get("--lr-wsd-decay-iters") == ("300" if decay == "wsd" else None)
    assert float(words["--min-lr"]) == (3e-4 if decay == "constant" else 1.5e-5)
    made = EXPORTERS["deepspeed"](plan(Layout(), 2), recipe)
    config = json.loads(made.files["deepspeed.json"])
    assert config["gradient_clipping"] == 0.5
    assert config["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.8, 0.85], "eps": 1e-6, "weight_decay": 0.3}
    assert config["scheduler"]["type"] == ("WarmupCosineLR" if decay == "cosine" else "WarmupLR")
    assert any("decay over the last 30%" in sentence for sentence in made.omitted) == (decay == "wsd")


def test_positions_that_are_scaled_are_said_or_named() -> None:
    llama3 = replace(RECIPE, rope_scaling={"rope_type": "llama3", "factor": 32.0})
    linear = replace(RECIPE, rope_scaling={"rope_type": "linear", "factor": 4.0})
    made = EXPORTERS["megatron-lm"](plan(Layout(), 2), llama3)
    assert megatron(made)[1]["--rope-scaling-factor"] == "32.0"
    other = EXPORTERS["megatron-lm"](plan(Layout(), 2), linear)
    assert any('"linear"' in sentence and "unscaled" in sentence for sentence in other.omitted)
    assert any('"linear"' in sentence for sentence in EXPORTERS["torchtitan"](plan(Layout(), 2), linear).omitted)
