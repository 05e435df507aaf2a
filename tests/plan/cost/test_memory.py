"""Memory against figures worked out by hand, other people's formulas, and what autograd really keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meshwright import checkpoint
from meshwright.card import Activation, Block, Buffer, Card, Parameter
from meshwright.cluster import Cluster, cpu_cluster, named_cluster
from meshwright.errors import CannotWork
from meshwright.families.decoder import DecoderShape
from meshwright.families.decoder import card as decoder_card
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import Coordinates, Layout
from meshwright.placement import placements
from meshwright.plan import PlanRequest, Workload, make_plan
from meshwright.plan.cost import MemoryModel, StageMemory, usable_bytes
from meshwright.plan.cost.block_memory import local_size
from meshwright.plan.cost.memory import PROCESS_BYTES, memory_interval, slack_bytes
from meshwright.plan.rules import FRAMEWORKS, Framework

H100 = named_cluster("h100-sxm-80gb", 8)
OURS = FRAMEWORKS["meshwright"]
MEGATRON = replace(FRAMEWORKS["megatron-lm"], workspace_bytes=0, dummy_gradients=False, vocab_multiple=1)
LLAMA_8B = LlamaShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
GPT = DecoderShape(
    layers=4, hidden=1024, heads=16, kv_heads=16, head_dim=64, ffn=4096, vocab=512, gated=False, norm="layer", tied=True
)


def stages(
    model: Card,
    layout: Layout,
    micro_batches: int,
    precision: str,
    *,
    cluster: Cluster = H100,
    framework: Framework = OURS,
    firsts: Sequence[int] | None = None,
) -> tuple[StageMemory, ...]:
    """Memory of each rank, with blocks cut into equal counts."""
    parts = layout.pp * layout.vpp
    cut = [len(model.blocks) * i // parts for i in range(parts)] if firsts is None else firsts
    return MemoryModel(Workload(model, cluster, 1, precision, framework)).stages(layout, cut, micro_batches)


def toy(blocks: int = 4, parameters: int = 1000, saved: int = 500) -> Card:
    """Blocks of one vector parameter, each keeping `saved` elements a sample and handing on 10."""
    return Card(
        "toy",
        tuple(
            Block(
                str(i),
                "block",
                (Parameter(f"blocks.{i}.w", (parameters,), (None,)),),
                saved=(Activation("x", saved),),
                output_elements=10,
            )
            for i in range(blocks)
        ),
        splittable=frozenset({"pp"}),
    )


def test_llama_8b_has_the_parameters_that_its_authors_state() -> None:
    # Llama 3 (arXiv 2407.21783): 8.03 B. By hand: embeddings twice, 32 layers, the last norm.
    by_hand = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096
    assert card(LLAMA_8B, 8192).parameter_elements == by_hand == 8_030_261_248


def test_states_of_one_device_take_eighteen_bytes_a_parameter_in_bf16() -> None:
    memory = stages(card(LLAMA_8B, 128), Layout(), 2, "bf16")[0]
    n = 8_030_261_248
    assert memory.weights == (4 + 2) * n  # masters and the copy to compute with
    assert memory.gradients == 4 * n
    assert memory.optimizer == 8 * n


def test_the_same_states_as_megatron_holds_them() -> None:
    # bf16 weights, fp32 gradients; masters and two moments in fp32, whole or over the data-parallel ranks.
    model, n = toy(), 4000
    whole = stages(model, Layout(dp=8), 2, "bf16", framework=MEGATRON)[0]
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * n, 4 * n, 12 * n)
    spread = stages(model, Layout(dp=8), 2, "bf16", framework=replace(MEGATRON, optimizer_shard="dp"))[0]
    assert (spread.weights, spread.gradients, spread.optimizer) == (2 * n, 4 * n, 12 * n // 8)
    everything = stages(model, Layout(dp=8, shard=8), 2, "bf16", framework=MEGATRON)[0]  # ZeRO 3
    assert everything.weights + everything.gradients + everything.optimizer == 18 * n // 8
    assert stages(model, Layout(dp=8, offload=True), 2, "bf16", framework=MEGATRON)[0].optimizer == 0


def test_sharding_divides_masters_moments_and_gradients() -> None:
    model = toy(saved=0)
    one, eight = (stages(model, Layout(dp=8, shard=shard), 1, "bf16")[0] for shard in (1, 8))
    assert one.optimizer == 8 * 4000 and eight.optimizer == 8 * 500
    assert one.gradients == 4 * 4000 and eight.gradients == 4 * 500
    assert eight.weights == 4 * 500 + 2 * 2000  # two blocks are gathered at a time


def test_gradients_are_whole_while_micro_batches_accumulate_but_where_each_is_reduced() -> None:
    layout = Layout(dp=8, shard=8)
    assert stages(toy(), layout, 2, "fp32")[0].gradients == 4 * 4000
    assert stages(toy(), layout, 2, "fp32", framework=FRAMEWORKS["torchtitan"])[0].gradients == 4 * 500


def test_1f1b_keeps_fewer_activations_the_later_the_stage_and_gpipe_keeps_all() -> None:
    layout, sample = Layout(pp=4, micro_batch=2), 2 * 500 * 4

    def kept(layout: Layout, micro_batches: int) -> list[int]:
        return [m.activations for m in stages(toy(), layout, micro_batches, "fp32", framework=MEGATRON)]

    assert kept(layout, 8) == [4 * sample, 3 * sample, 2 * sample, sample]
    assert kept(replace(layout, schedule="gpipe"), 8) == [8 * sample] * 4
    assert kept(layout, 2) == [2 * sample] * 3 + [sample]  # no more are in flight than there are
    # Interleaved, a rank of 4 with 2 virtual stages starts 2 x 3 + 4 passes before its first backward, and one more.
    interleaved = replace(layout, schedule="interleaved", vpp=2)
    assert stages(toy(8), interleaved, 8, "fp32", framework=MEGATRON)[0].activations == 11 * sample


def test_a_pipeline_of_torch_holds_a_buffer_for_every_micro_batch_from_each_neighbour() -> None:
    layout, buffer = Layout(pp=4), 10 * 4
    found = stages(toy(), layout, 8, "fp32")
    bare = stages(toy(), layout, 8, "fp32", framework=replace(OURS, torch_pipeline=False))
    more = [a.activations - b.activations for a, b in zip(found, bare, strict=True)]
    assert more == [8 * buffer, 16 * buffer, 16 * buffer, 8 * buffer]


def test_full_recompute_keeps_only_what_each_block_was_given() -> None:
    memory = stages(toy(blocks=4), Layout(micro_batch=4, recompute="full"), 2, "fp32", framework=MEGATRON)[0]
    assert memory.activations == 4 * 4 * 10 * 4


def test_activations_of_megatron_follow_korthikanti() -> None:
    # Korthikanti et al. 2022, equations 1 to 4: bytes of a layer of s tokens, b samples, with dropout, unfused. We add
    # each norm's mean and scale: 2 norms x 2 x 4 bytes a token.
    s, b, h, a = 2048, 4, 1024, 16
    model = decoder_card(GPT, s, "megatron-legacy")
    statistics = 16 * s * b

    def layer(tp: int, sequence: bool, recompute: str) -> int:
        layout = Layout(tp=tp, sequence_parallel=sequence, micro_batch=b, recompute=recompute)
        four, three = (
            stages(replace(model, blocks=model.blocks[:n]), layout, 1, "bf16", framework=MEGATRON)[0].activations
            for n in (5, 4)
        )
        return four - three

    scores = 5 * a * s / h
    assert layer(1, False, "none") == s * b * h * (34 + scores) + statistics
    assert layer(8, False, "none") == s * b * h * (10 + (24 + scores) / 8) + statistics
    assert layer(8, True, "none") == s * b * h * (34 + scores) / 8 + statistics // 8
    assert layer(8, True, "selective") == s * b * h * 34 / 8 + statistics // 8
    assert layer(8, False, "full") == 2 * s * b * h


def test_context_parallelism_divides_activations_and_experts_are_divided_by_theirs() -> None:
    model = decoder_card(GPT, 2048, "megatron")
    whole, part = (stages(model, Layout(cp=cp), 1, "bf16", framework=MEGATRON)[0].activations for cp in (1, 4))
    assert part == whole // 4
    shape = replace(GPT, experts=8, top_k=2)
    mixed = decoder_card(shape, 256, "megatron")
    one, four = (stages(mixed, Layout(dp=4, ep=ep), 1, "bf16", framework=MEGATRON)[0].weights for ep in (1, 4))
    assert one - four == 2 * 4 * (8 - 2) * 2 * 1024 * 4096  # layers x experts that are elsewhere x two matrices
    # Their optimizer is spread over the ranks that hold equal ones: one here.
    spread = stages(mixed, Layout(dp=4, ep=4), 1, "bf16", framework=replace(MEGATRON, optimizer_shard="dp"))[0]
    assert spread.optimizer > 12 * 4 * 2 * 2 * 1024 * 4096


@pytest.mark.parametrize("name", ["torchtitan", "megatron-lm"])
def test_experts_that_are_elsewhere_are_not_sharded_away_once_more(name: str) -> None:
    """Eight ranks hold every fp32 moment once between them, whether experts are split by ep, by shard, or by both."""
    mixed = decoder_card(replace(GPT, experts=8, top_k=2), 256, "megatron")
    for ep in (1, 2, 4, 8):
        (own,) = stages(mixed, Layout(dp=8, shard=8, ep=ep), 1, "bf16", framework=FRAMEWORKS[name])
        moments = own.optimizer * 8 / (8 if name == "torchtitan" else 12)
        assert moments == pytest.approx(mixed.parameter_elements, rel=1e-3)


def test_activations_in_host_memory_leave_two_blocks_of_them() -> None:
    layout, framework = Layout(pp=2), replace(MEGATRON, activation_offload=True)
    found = stages(toy(8), layout, 8, "fp32", framework=framework)
    assert [stage.activations for stage in found] == [2 * 500 * 4] * 2


def test_a_vocabulary_is_padded_before_it_is_split() -> None:
    table = Parameter("blocks.embed.weight", (50257, 512), ("vocab", "embed"))
    assert local_size(table, 1, 1, 128) == 50304 * 512
    assert local_size(table, 8, 1, 128) == 51200 * 512 // 8
    assert local_size(table, 1, 1, 1) == 50257 * 512


def test_sequence_parallel_divides_what_tensor_parallel_does_not() -> None:
    model = card(LLAMA_8B, 8192)
    plain = stages(model, Layout(tp=8), 1, "bf16")[0].activations
    split = stages(model, Layout(tp=8, sequence_parallel=True), 1, "bf16")[0].activations
    assert split < plain


def test_the_last_stage_holds_a_copy_of_tied_embeddings() -> None:
    shape = LlamaShape(layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=512, tied=True)
    last = stages(card(shape, 32), Layout(pp=4), 4, "fp32")[-1]
    assert last.optimizer == 8 * (64 + 512 * 64)  # the norm and the alias


def test_every_rank_holds_the_buffers_of_its_stage_whole() -> None:
    plain = toy(blocks=2)
    kept, lost = Buffer("blocks.1.mean", (100,), 4), Buffer("blocks.1.mask", (1000,), 1, persistent=False)
    model = replace(plain, blocks=(plain.blocks[0], replace(plain.blocks[1], buffers=(kept, lost))))
    for framework in (OURS, MEGATRON):
        for layout, more in ((Layout(dp=2, shard=2), [1400]), (Layout(pp=2, schedule="gpipe"), [0, 1400])):
            with_them, without = (stages(m, layout, 2, "fp32", framework=framework) for m in (model, plain))
            assert [a.weights - b.weights for a, b in zip(with_them, without, strict=True)] == more
    workload = Workload(model, cpu_cluster(2), 2, "fp32", asynchronous=True)
    saved = MemoryModel(workload).stages(Layout(dp=2, shard=2), [0], 1)[0].checkpoint
    assert saved == 12 * 1000 + 400


def test_a_model_that_every_process_builds_whole_needs_room_for_that() -> None:
    """Eight ranks keep an eighth each: 2.25 bytes a parameter for masters, moments and gradients."""
    model, cluster = toy(blocks=8, parameters=10**8), cpu_cluster(8)
    built, drawn = (
        stages(one, Layout(dp=8, shard=8), 1, "fp32", cluster=cluster)[0]
        for one in (replace(model, built_whole=True), model)
    )
    start = PROCESS_BYTES["cpu"] + 4 * 8 * 10**8 + 4 * 10**8
    assert drawn.start == 0 and built.total == max(start, drawn.total) and start > drawn.total - drawn.slack
    assert replace(built, start=0) == drawn
    whole = stages(replace(model, built_whole=True), Layout(), 1, "fp32", cluster=cpu_cluster(1))[0]
    assert whole.start == 0, "a step needs more"
    assert stages(replace(model, built_whole=True), Layout(dp=8, shard=8), 1, "fp32")[0].start == 0, "on GPUs"


def test_the_total_is_the_sum_of_its_parts() -> None:
    memory = StageMemory(1, 2, 3, 4, 5, 6, 7)
    assert (memory.allocated, memory.reserved, memory.other) == (15, 21, 18)
    assert memory.total == sum(memory.as_dict().values()) == 28
    assert stages(toy(), Layout(), 1, "fp32")[0].process == PROCESS_BYTES["cuda"]
    assert 0.9 * H100.device.memory_bytes < usable_bytes(H100.device) < H100.device.memory_bytes


def test_peak_of_a_run_that_nobody_here_made() -> None:
    # torch.cuda.max_memory_allocated of Megatron-LM 0.14 on 8 B200: Llama 3 70B cut to 12 layers, tp 4, dp 2, bf16,
    # distributed optimizer, fused cross-entropy: 39.07 GiB (MooreThreads/SimuMax, b200_release_v1.2).
    shape = DecoderShape(12, 8192, 64, 8, 128, 28672, 128256)
    layout = Layout(dp=2, tp=4, sequence_parallel=True)
    framework = replace(FRAMEWORKS["megatron-lm"], optimizer_shard="dp")
    found = stages(decoder_card(shape, 4096, "megatron+fused_loss"), layout, 4, "bf16", framework=framework)[0]
    assert found.allocated / 2**30 == pytest.approx(39.07, rel=0.01)
    assert found.reserved / 2**30 == pytest.approx(40.18, rel=0.03)


def test_torchtitan_recomputes_every_second_product_and_turns_logits_into_fp32() -> None:
    # Llama 3 8B of 8,192 tokens a sample on 128 devices: torchtitan printed 67.0 GiB reserved for 2 samples, eager.
    shape, t = DecoderShape(32, 4096, 32, 8, 128, 14336, 128256), 8192
    model, titan = decoder_card(shape, t, "titan"), FRAMEWORKS["torchtitan"]
    layout = Layout(dp=128, shard=128, micro_batch=2, recompute="selective")
    found = stages(model, layout, 1, "bf16", framework=titan)[0]
    q, v, gate, output, last, given, scale = 4096, 1024, 14336, 4096, 4096, 4096, 4 * 32 / 2
    layers = 32 * 2 * (q + v + gate + output + last + given + scale)
    log_softmax_and_two_gradients = 3 * 4 * 128256
    rest = found.activations - 2 * t * (layers + log_softmax_and_two_gradients)
    assert 0 < rest < 0.02 * found.activations  # norms' scales, the head's input
    assert found.reserved / 2**30 == pytest.approx(67.0, rel=0.12)


def test_a_layer_of_two_that_is_recomputed_leaves_half() -> None:
    every_other = replace(MEGATRON, selective="block")
    none, half, full = (
        stages(toy(), Layout(recompute=word), 1, "fp32", framework=every_other)[0].activations
        for word in ("none", "selective", "full")
    )
    assert half == (none + full) / 2 and full < none


def test_the_interval_of_our_peak_is_as_wide_as_what_it_was_measured_on() -> None:
    """Our runs on CPUs say nothing of GPUs: there the interval is that of the only runs on GPUs, Megatron-LM's."""
    assert memory_interval("meshwright", "cpu") == (0.8, 1.15)
    assert memory_interval("meshwright", "cuda") == memory_interval("megatron-lm", "cuda") == (0.96, 1.4)
    chosen = make_plan(card(SMALL, 32), H100, PlanRequest(8, "bf16"), what_if=False).chosen.predicted
    low, high = chosen.intervals["peak_bytes"]
    assert (low, high) == (pytest.approx(0.96 * chosen.peak_bytes), pytest.approx(1.4 * chosen.peak_bytes))


def test_the_allocators_slack_is_bounded_by_what_is_allocated() -> None:
    gpu, cpu = H100.device, cpu_cluster(1).device
    assert slack_bytes(gpu, 100, 10_000) == 30
    assert slack_bytes(gpu, 9_000, 10_000) == 600
    assert slack_bytes(cpu, 100, 10_000) == 100
    assert slack_bytes(cpu, 9_000, 10_000) == 3_000


def test_a_process_returns_what_it_frees_where_keeping_it_could_be_too_much() -> None:
    """The slack never makes a layout too large, and a plan without room for it has none."""
    device = cpu_cluster(1).device
    room = usable_bytes(device) - PROCESS_BYTES["cpu"]
    for needed in range(room // 100, room + 1, room // 100):
        slack = slack_bytes(device, needed, needed)
        assert (slack > 0) == (3 * needed <= room) and needed + slack <= room
    for memory_bytes, keeps in ((64 << 30, True), (PROCESS_BYTES["cpu"] + (64 << 20), False)):
        cluster = cpu_cluster(1)
        cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))
        plan = make_plan(card(SMALL, 32), cluster, PlanRequest(8, "fp32"), what_if=False)
        assert plan.chosen.keeps_freed_memory == keeps


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zbv", "dualpipev", "gpipe"])
def test_every_schedule_has_its_memory(schedule: str, recompute: str) -> None:
    vpp = 2 if schedule in ("interleaved", "zbv", "dualpipev") else 1
    layout = Layout(pp=2, vpp=vpp, schedule=schedule, recompute=recompute)
    cpu = cpu_cluster(1)
    for framework in (OURS, MEGATRON):
        found = stages(toy(8), layout, 8, "fp32", cluster=cpu, framework=framework)
        assert len(found) == 2
        assert all(min(stage.as_dict().values()) >= 0 and stage.allocated > 0 for stage in found)


SMALL = LlamaShape(layers=4, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=512)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dp=4), Layout(dp=4, shard=4), Layout(dp=4, shard=2), Layout(dp=2, tp=2), Layout(dp=2, pp=2)],
    ids=str,
)
def test_a_checkpoint_beside_training_copies_what_the_ranks_own(layout: Layout) -> None:
    """Every element has one owner, and the writer copies twelve bytes of each: weight and two moments."""
    model, cut = card(SMALL, 32), [0, 3][: layout.pp]
    workload = Workload(model, cpu_cluster(layout.devices), 8, "bf16", asynchronous=True)
    found = MemoryModel(workload).stages(layout, cut, 2)
    copied = sum(stage.checkpoint for stage in found) * layout.devices // layout.pp
    assert copied == pytest.approx(12 * model.parameter_elements, rel=0.02)
    for other in (replace(workload, asynchronous=False), replace(workload, cluster=H100)):
        without = MemoryModel(other).stages(layout, cut, 2)
        assert [stage.checkpoint for stage in without] == [0] * layout.pp
    without = MemoryModel(replace(workload, asynchronous=False)).stages(layout, cut, 2)
    assert found[0].allocated == without[0].allocated and found[0].slack >= without[0].slack


def test_the_writer_keeps_the_copy_that_the_plan_counts(tmp_path: Path) -> None:
    model = card(SMALL, 32)
    table = placements(model, Layout(), Coordinates(0, 0, 0, 0, 0))
    weights = {name: (row, torch.zeros(row.box.shape)) for name, row in table.items()}
    state = {
        f"{moment}.{name}": (replace(row, name=f"{moment}.{name}"), torch.zeros(row.box.shape))
        for name, row in table.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    writer = checkpoint.Writer(tmp_path, 0, 1)
    writer.save(1, weights, state, {}, checkpoint.ModelFolder({name: name for name in weights}, {}))
    kept = sum(buffer.nbytes for buffer in writer._buffers.values())
    writer.wait()
    workload = Workload(model, cpu_cluster(1), 1, "fp32", asynchronous=True)
    assert MemoryModel(workload).stages(Layout(), [0], 1)[0].checkpoint == kept


def test_a_job_that_would_end_at_its_first_checkpoint_does_not_fit() -> None:
    model, cluster = card(SMALL, 32), cpu_cluster(1)
    beside, alone = PlanRequest(8, "fp32"), PlanRequest(8, "fp32", asynchronous=False)
    found = [make_plan(model, cluster, request, what_if=False).chosen.memory[0] for request in (alone, beside)]
    need = [stage.total - stage.slack for stage in found]
    assert need[1] - need[0] == 12 * model.parameter_elements
    between = replace(cluster, device=replace(cluster.device, memory_bytes=int((need[0] + need[1]) / 2 / 0.9)))
    make_plan(model, between, replace(alone, pins={"micro_batch": 8, "recompute": "none"}), what_if=False)
    with pytest.raises(CannotWork, match="does not fit"):
        make_plan(model, between, replace(beside, pins={"micro_batch": 8, "recompute": "none"}), what_if=False)
