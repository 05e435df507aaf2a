"""The serving plan: its physics against hand counts and a simulation, its choices, and its errors."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.cluster import Cluster, Device, Link, named_cluster
from meshwright.errors import CannotWork
from meshwright.families.decoder_shape import DecoderShape
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.serving import SERVERS, ServingPins, ServingPlan, ServingQuery, Target, make_serving_plan
from meshwright.plan.serving.load import Replica
from meshwright.plan.serving.memory import serving_memory
from meshwright.plan.serving.time import Server, Step, StepModel
from meshwright.plan.serving.work import parameter_count

LLAMA_8B = DecoderShape(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = DecoderShape(80, 8192, 64, 8, 128, 28672, 128256)
MIXTURE = DecoderShape(48, 2048, 32, 4, 128, 6144, 151936, experts=128, top_k=8, expert_ffn=768)
LATENT = DecoderShape(
    61, 7168, 128, 128, 128, 18432, 129280, experts=256, top_k=8, expert_ffn=2048, shared_ffn=2048,
    first_dense_layers=3, q_lora=1536, kv_lora=512, rope_head_dim=64, v_head_dim=128,
)  # fmt: skip
PAGED, OURS = SERVERS["paged"], SERVERS["meshwright"]
#: A profile without losses: every share 1, every start free, reading and arithmetic fully overlapped.
IDEAL = DATASHEET.changed(
    {
        **{name: 1.0 for name in DATASHEET.constants if name.startswith("serving.cuda.") and name.endswith(".share")},
        "serving.cuda.roofline": 1000.0,
        **{f"serving.cuda.{name}_seconds": 1e-30 for name in ("kernel", "reduce", "step", "row")},
    }
)


def device(**changes: object) -> Device:
    """A GPU of round numbers: 1 Pflop/s, 1 TB/s, 100 GB."""
    whole = {"name": "round", "kind": "cuda", "memory_bytes": 100 * 10**9, "flops": {"bf16": 1e15, "fp32": 1e14}}
    return Device(**{**whole, "memory_bytes_per_second": 1e12, "launch_seconds": 0.0, **changes})  # type: ignore[arg-type]


def cluster(devices: int = 8, **changes: object) -> Cluster:
    link = Link("wire", 400e9, 1e-6)
    return Cluster(device(**changes), devices, min(devices, 8), link, link)


def query_for(shape: DecoderShape = LLAMA_8B, at: Cluster | None = None, **changes: object) -> ServingQuery:
    at = at or named_cluster("h100-sxm-80gb", 8)
    whole: dict[str, object] = {
        "shape": shape, "cluster_of": lambda _: at, "devices": at.devices, "server": PAGED, "profile": DATASHEET,
        "target": Target(), "pins": ServingPins(), "precision": "bf16", "longest": 131072,
    }  # fmt: skip
    return ServingQuery(**{**whole, **changes})  # type: ignore[arg-type]


def ideal(shape: DecoderShape, **changes: object) -> StepModel:
    return StepModel(shape, cluster(), PAGED, IDEAL, **changes)  # type: ignore[arg-type]


# ---- physics, counted by hand


@pytest.mark.parametrize(
    ("shape", "billions"), [(LLAMA_8B, 8.03), (LLAMA_70B, 70.55), (MIXTURE, 30.5), (LATENT, 671.0)]
)
def test_parameters_are_those_the_models_are_known_for(shape: DecoderShape, billions: float) -> None:
    assert parameter_count(shape) / 1e9 == pytest.approx(billions, rel=0.002)


def test_cache_of_a_token() -> None:
    """Grouped heads: 32 layers x 2 x 8 x 128 in bf16. Latent: 61 layers x (512 + 64), the same on every rank."""
    assert ideal(LLAMA_8B).cache_token_bytes == 32 * 2 * 8 * 128 * 2
    assert ideal(LLAMA_8B, tp=8).cache_token_bytes == 32 * 2 * 1 * 128 * 2
    assert ideal(LATENT).cache_token_bytes == ideal(LATENT, tp=8).cache_token_bytes == 61 * (512 + 64) * 2
    assert ideal(LLAMA_8B, pp=2).cache_token_bytes == 16 * 2 * 8 * 128 * 2


def test_one_row_reads_every_weight_and_its_cache() -> None:
    """8.03e9 weights less the token table, in bf16 at 1 TB/s; 1,000 tokens of 131,072 bytes of keys and values."""
    parts = ideal(LLAMA_8B).step(Step(rows=1, context=1000)).parts
    weights = (32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256) * 2
    assert parts["weights"] == pytest.approx(weights / 1e12, rel=1e-3)
    assert parts["cache"] == pytest.approx(1000 * 131072 / 1e12, rel=1e-3)
    assert parts["collectives"] == 0.0


def test_a_prompt_computes() -> None:
    """2 flops per weight and token, and causal attention: 4 x heads x width x half of the length, at 1 Pflop/s."""
    tokens = 4096
    parts = ideal(LLAMA_8B).step(Step(rows=0, context=0, prompt=tokens, prompt_context=tokens / 2, sampled=0)).parts
    products = 2 * tokens * 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) / 1e15
    attention = 32 * tokens * (tokens / 2) * 4 * 32 * 128 / 1e15
    moved = 32 * tokens * 2 * (8 * 4096 + 2 * (4096 + 2 * 2 * 1024) + 3 * 14336) / 1e12  # norms, rotary, gate
    assert parts["compute"] == pytest.approx(products + attention + moved, rel=0.02)
    assert parts["cache"] == 0.0


@pytest.mark.parametrize("rows", [1, 4, 16, 256])
def test_a_mixture_reads_the_experts_that_rows_choose(rows: int) -> None:
    """Against random draws: each row takes 8 of 128 experts; an expert is read once per step."""
    draw = random.Random(rows)
    touched = sum(len({e for _ in range(rows) for e in draw.sample(range(128), 8)}) for _ in range(60)) / 60
    dense = replace(MIXTURE, experts=0, top_k=0, expert_ffn=0, ffn=1)
    both = [ideal(shape).step(Step(rows=rows, context=1)).parts["weights"] for shape in (MIXTURE, dense)]
    expert = 3 * 2048 * 768 * 2 * 48 / 1e12
    assert both[0] - both[1] == pytest.approx(touched * expert, rel=0.05)


def test_latent_attention_decodes_on_the_compressed_cache() -> None:
    """Absorbed: 128 heads, 512 + 64 numbers for scores and 512 for values; reads 1,152 bytes per token and layer."""
    model = ideal(replace(LATENT, experts=0, top_k=0, expert_ffn=0, shared_ffn=0))
    few, many = (model.step(Step(rows=1, context=c)).parts for c in (0, 1000))
    reading, arithmetic = 61 * 1000 * 576 * 2 / 1e12, 61 * 1000 * 128 * 2 * (576 + 512) / 1e15
    assert many["cache"] - few["cache"] == pytest.approx(max(reading, arithmetic), rel=1e-3)


def test_tensor_parallel_divides_the_work_and_adds_all_reduces() -> None:
    alone, eight = (StepModel(LLAMA_8B, cluster(), PAGED, DATASHEET, tp=tp).step(Step(1, 500)).parts for tp in (1, 8))
    assert eight["weights"] == pytest.approx(alone["weights"] / 8, rel=0.01)
    assert eight["cache"] == pytest.approx(alone["cache"] / 8, rel=0.01)
    assert alone["collectives"] == 0 and eight["collectives"] >= 64 * 1e-6


def test_ranks_with_sequences_of_their_own() -> None:
    """Each rank has whole attention for an eighth of the rows; experts are split as before; no cache is repeated."""
    heads, rows = (StepModel(LATENT, cluster(), PAGED, DATASHEET, tp=8, attention_dp=dp) for dp in (False, True))
    assert rows.cache_token_bytes == heads.cache_token_bytes / 8
    assert rows.rank_weight_bytes > heads.rank_weight_bytes
    busy = Step(rows=512, context=4000)
    assert rows.step(busy).parts["cache"] == pytest.approx(heads.step(busy).parts["cache"] / 8, rel=0.3)
    assert rows.step(busy).parts["collectives"] < 0.6 * heads.step(busy).parts["collectives"]
    alone = Step(rows=1, context=4000)
    assert rows.step(alone).total > heads.step(alone).total


def test_a_pipeline_does_not_make_one_sequence_quicker() -> None:
    """One sequence passes every layer in turn; many sequences keep all stages busy."""
    one = [Replica(StepModel(LLAMA_8B, cluster(), PAGED, DATASHEET, pp=pp), 512, 128, 1).closed() for pp in (1, 4)]
    assert one[1].tpot_seconds > one[0].tpot_seconds
    many = [Replica(StepModel(LLAMA_8B, cluster(), PAGED, DATASHEET, pp=pp), 512, 128, 256).closed() for pp in (1, 4)]
    assert 2 * many[0].requests_per_second < many[1].requests_per_second < 4 * many[0].requests_per_second


# ---- queues, against a simulation of the engine


def simulate(replica: Replica, rate: float | None, clients: int, seconds: float, seed: int) -> tuple[float, float]:
    """(mean time to first token, mean time between tokens) of an engine, step by step: each step reads up to a chunk of
    the waiting prompts beside all rows that decode. `rate` None: `clients` that each ask again once answered."""
    draw = random.Random(seed)
    now, next_arrival = 0.0, 0.0
    waiting: list[list[float]] = []  # [came, tokens left to read]
    running: list[list[float]] = []  # [first token at, tokens left to give]
    firsts, betweens = [], []
    if rate is None:
        waiting = [[-draw.random(), float(replica.prompt)] for _ in range(clients)]
        next_arrival = math.inf
    while now < seconds:
        while rate is not None and next_arrival <= now:
            waiting.append([next_arrival, float(replica.prompt)])
            next_arrival += draw.expovariate(rate)
        if not waiting and not running:
            now = next_arrival
            continue
        room, read = float(replica.chunk), 0.0
        done = []
        for one in waiting[: max(0, replica.batch - len(running))]:
            taken = min(room, one[1])
            one[1], room, read = one[1] - taken, room - taken, read + taken
            if one[1] <= 0:
                done.append(one)
        rows = len(running)
        step = replica.model.step(
            Step(rows, replica.prompt + replica.output / 2, read, replica.prompt / 2, rows + len(done))
        )
        now += step.total + replica.model.host_seconds(rows)
        ended = 0
        for other in running:
            other[1] -= 1
            if other[1] <= 0:
                betweens.append((now - other[0]) / replica.output)
                ended += 1
        running = [other for other in running if other[1] > 0]
        for one in done:
            waiting.remove(one)
            firsts.append(now - max(0.0, one[0]))
            length = replica.output if rate is not None else replica.output * (0.8 + 0.4 * draw.random())
            running.append([now, float(round(length))])
        if rate is None:
            waiting += [[now, float(replica.prompt)] for _ in range(ended)]
    warm = len(firsts) // 5
    return sum(firsts[warm:]) / len(firsts[warm:]), sum(betweens[warm:]) / len(betweens[warm:])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_random_requests_against_a_simulation(share: float) -> None:
    model = StepModel(LLAMA_8B, named_cluster("h100-sxm-80gb", 1), PAGED, DATASHEET)
    replica = Replica(model, 512, 128, 128)
    rate = share * replica.capacity()
    load = replica.open(rate)
    assert load is not None
    first, between = simulate(replica, rate, 0, 60.0, seed=1)
    assert load.tpot_seconds == pytest.approx(between, rel=0.12)
    assert load.ttft_seconds - model.request_seconds == pytest.approx(first, rel=0.4)
    assert load.sequences == pytest.approx(rate * 128 * load.tpot_seconds, rel=0.01)


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_a_fixed_number_of_clients_against_a_simulation(clients: int) -> None:
    model = StepModel(LLAMA_8B, named_cluster("h100-sxm-80gb", 1), PAGED, DATASHEET)
    replica = Replica(model, 1024, 256, clients)
    load = replica.closed()
    _, between = simulate(replica, None, clients, 60.0, seed=2)
    assert load.tpot_seconds == pytest.approx(between, rel=0.12)


# ---- what must hold whatever the numbers

SHAPES = st.sampled_from([LLAMA_8B, MIXTURE, LATENT])
quick = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(SHAPES, st.integers(1, 512), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(16, 8192))
def test_faster_memory_and_arithmetic_are_never_worse(
    shape: DecoderShape, batch: int, tp: int, pp: int, prompt: int
) -> None:
    slow = Replica(StepModel(shape, cluster(), PAGED, DATASHEET, tp=tp, pp=pp), prompt, 128, batch).closed()
    for changes in ({"memory_bytes_per_second": 1.5e12}, {"flops": {"bf16": 2e15, "fp32": 2e14}}):
        fast = Replica(StepModel(shape, cluster(**changes), PAGED, DATASHEET, tp=tp, pp=pp), prompt, 128, batch)
        assert fast.closed().tpot_seconds <= slow.tpot_seconds
        assert fast.closed().ttft_seconds <= slow.ttft_seconds * 1.0001
        assert fast.capacity() >= slow.requests_per_second


@quick
@given(SHAPES, st.integers(1, 256), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 4]), st.integers(64, 4096))
def test_a_larger_batch_gives_more_and_each_of_it_slower(
    shape: DecoderShape, batch: int, tp: int, pp: int, prompt: int
) -> None:
    model = StepModel(shape, cluster(), PAGED, DATASHEET, tp=tp, pp=pp)
    small, large = (Replica(model, prompt, 128, b).closed() for b in (batch, 2 * batch))
    assert large.tpot_seconds >= small.tpot_seconds * 0.9999
    assert large.requests_per_second >= small.requests_per_second * 0.98


@quick
@given(st.floats(0.05, 0.9), st.floats(1.01, 2.0))
def test_more_requests_never_make_anyone_wait_less(share: float, more: float) -> None:
    replica = Replica(StepModel(LLAMA_8B, cluster(), PAGED, DATASHEET), 512, 128, 64)
    rate = share * replica.capacity()
    calm, busy = replica.open(rate), replica.open(rate * more)
    assert calm is not None
    assert busy is None or (busy.tpot_seconds >= calm.tpot_seconds and busy.ttft_seconds >= calm.ttft_seconds * 0.9999)


@quick
@given(
    st.sampled_from([LLAMA_8B, LLAMA_70B, MIXTURE]),
    st.sampled_from(["h100-sxm-80gb", "a100-sxm-80gb", "l4"]),
    st.sampled_from([1, 2, 8, 32]),
    st.one_of(st.none(), st.floats(0.01, 2)),
    st.one_of(st.none(), st.floats(0.002, 0.2)),
    st.one_of(st.none(), st.floats(0.1, 300)),
)
def test_what_is_planned_meets_the_target_and_what_is_offered_instead_can_be_had(
    shape: DecoderShape, name: str, devices: int, ttft: float | None, tpot: float | None, rate: float | None
) -> None:
    at = named_cluster(name, devices)
    query = query_for(shape, at, target=Target(512, 128, ttft, tpot, rate))
    try:
        plan = make_serving_plan(query)
    except CannotWork as error:
        _follow(query, name, error.problems[0].nearest)
        return
    figures = plan.chosen.predicted
    assert ttft is None or figures.ttft_seconds.mid <= ttft
    assert tpot is None or figures.tpot_seconds.mid <= tpot
    assert rate is None or figures.requests_per_second.mid == pytest.approx(rate)
    assert plan.chosen.devices <= devices
    assert plan.chosen.max_batch <= plan.chosen.memory.sequences
    assert figures.tpot_seconds.low < figures.tpot_seconds.mid < figures.tpot_seconds.high
    assert plan.as_dict() == make_serving_plan(query).as_dict()


def _follow(query: ServingQuery, name: str, nearest: str) -> None:
    """Plans again with each suggestion in `nearest`: all must work."""
    for offer in nearest.removeprefix("nearest: ").split(", or "):
        changed, target = query, query.target
        for word in offer.split():
            key, _, value = word.partition("=")
            if key == "cluster.devices":
                more = named_cluster(name, int(value))
                changed = replace(changed, devices=more.devices, cluster_of=lambda _, more=more: more)
            elif key == "serve.precision":
                changed = replace(changed, pins=replace(changed.pins, precision=value))
            else:
                assert key.startswith("serve."), nearest
                target = replace(target, **{key.removeprefix("serve."): float(value)})
        if "cluster.devices" in offer and not _fits_somewhere(query):
            target = Target(query.target.prompt_tokens, query.target.output_tokens)  # fitting is all that it promises
        make_serving_plan(replace(changed, target=target))


def _fits_somewhere(query: ServingQuery) -> bool:
    try:
        make_serving_plan(replace(query, target=Target(512, 128)))
    except CannotWork:
        return False
    return True


# ---- choices


def test_pins_stand() -> None:
    plan = make_serving_plan(query_for(pins=ServingPins(tp=2, max_batch=5, precision="fp8")))
    assert (plan.chosen.tp, plan.chosen.max_batch, plan.chosen.precision) == (2, 5, "fp8")
    assert all(other.tp == 2 and other.max_batch == 5 for other in plan.runners_up)


def test_fewer_bits_only_where_the_target_needs_them() -> None:
    calm = make_serving_plan(query_for(LLAMA_70B, target=Target(tpot_seconds=0.05)))
    assert calm.chosen.precision == "bf16"
    floor = make_serving_plan(query_for(LLAMA_70B, pins=ServingPins(tp=8, max_batch=1))).chosen.predicted.tpot_seconds
    quick = make_serving_plan(query_for(LLAMA_70B, target=Target(tpot_seconds=0.8 * floor.mid)))
    assert quick.chosen.precision == "fp8"
    assert any("compare the answers" in words for words in quick.assumed)


def test_a_rate_takes_the_fewest_devices() -> None:
    at = named_cluster("h100-sxm-80gb", 64)
    few, many = (
        make_serving_plan(query_for(at=at, target=Target(tpot_seconds=0.05, ttft_seconds=1, requests_per_second=rate)))
        for rate in (2.0, 200.0)
    )
    assert few.chosen.devices == 1 < many.chosen.devices <= 64
    assert many.chosen.replicas > 1 and many.chosen.predicted.utilisation < 1


def test_our_engine_is_planned_with_what_it_does() -> None:
    plan = make_serving_plan(query_for(server=OURS))
    assert plan.chosen.pp == plan.chosen.replicas == 1
    assert plan.chosen.precision in ("bf16", "fp32")
    assert plan.chosen.memory.page_tokens == 0
    assert plan.chosen.max_batch * plan.chosen.max_len == plan.chosen.memory.tokens
    with pytest.raises(CannotWork, match="fp8"):
        make_serving_plan(query_for(server=OURS, pins=ServingPins(precision="fp8")))


def test_a_cpu_that_is_slow_at_bf16_reads_prompts_in_fp32_and_decodes_in_bf16() -> None:
    """The rows, and the bytes of weights in fp32 at a time, are those of the engine."""
    from meshwright.engine.products import WIDE_ROWS, WIDENED_BYTES

    assert (OURS.widens_rows, OURS.widened_bytes) == (WIDE_ROWS, WIDENED_BYTES)
    slow, fast = (
        cluster(1, kind="cpu", flops={"fp32": 1e11, "bf16": bf16}, memory_bytes_per_second=3e10)
        for bf16 in (1e10, 2e11)
    )
    model, wide, never = (
        StepModel(LLAMA_8B, slow, server, DATASHEET, precision=precision)
        for server, precision in ((OURS, "bf16"), (OURS, "fp32"), (replace(OURS, widens_rows=0), "bf16"))
    )

    def seconds(model: StepModel, rows: int) -> float:
        return model.step(Step(rows=0, context=0, prompt=rows, prompt_context=rows / 2, sampled=0)).total

    assert seconds(wide, 128) < seconds(model, 128) < 1.3 * seconds(wide, 128) < seconds(never, 128) / 3
    assert seconds(model, WIDE_ROWS - 1) == seconds(never, WIDE_ROWS - 1)
    one = Step(rows=1, context=100)
    assert model.step(one).total == never.step(one).total

    def activations(model: StepModel) -> int:
        return serving_memory(model, 640, 8, 2048, 2048).activations

    logits = 8 * 8 * LLAMA_8B.vocab
    assert activations(model) - logits == pytest.approx(2 * (activations(never) - logits) + WIDENED_BYTES, abs=2)
    plan = make_serving_plan(query_for(at=slow, server=OURS, longest=2048))
    assert plan.chosen.precision == "bf16"
    assert any(f"steps of {WIDE_ROWS} rows and more" in words for words in plan.assumed)
    assert not any("rows and more" in words for words in make_serving_plan(query_for(at=fast, server=OURS)).assumed)


def test_what_does_not_fit_says_what_would() -> None:
    one = named_cluster("l4", 1)
    with pytest.raises(CannotWork, match=r"GiB a device.*nearest: cluster.devices=\d+"):
        make_serving_plan(query_for(LLAMA_70B, one))
    with pytest.raises(CannotWork, match=r"nearest: serve.max_batch=\d+") as refused:
        make_serving_plan(query_for(pins=ServingPins(max_batch=60000)))
    nearest = int(str(refused.value).rpartition("=")[2])
    assert make_serving_plan(query_for(pins=ServingPins(max_batch=nearest))).chosen.max_batch == nearest
    with pytest.raises(CannotWork):
        make_serving_plan(query_for(pins=ServingPins(max_batch=nearest + 1)))
    with pytest.raises(CannotWork, match=r"131072 tokens.*nearest: serve.max_len=131072"):
        make_serving_plan(query_for(pins=ServingPins(max_len=200000)))
    with pytest.raises(CannotWork, match=r"serve.prompt_tokens"):
        make_serving_plan(query_for(target=Target(200000, 128)))


def test_heads_that_do_not_divide_are_told() -> None:
    plan = make_serving_plan(query_for(replace(LLAMA_8B, heads=6, kv_heads=3, head_dim=128)))
    reasons = dict(plan.rejected)
    assert any("do not divide by 4" in reason for reason in reasons.values())


def test_slots_are_as_long_as_the_room_allows() -> None:
    model = StepModel(LLAMA_8B, named_cluster("h100-sxm-80gb", 1), OURS, DATASHEET, precision="bf16")
    few, many = (serving_memory(model, 640, batch, 131072, 2048) for batch in (1, 64))
    assert few.sequences == many.sequences and few.longest > many.longest >= 2048
    assert few.needed == many.needed > 2 * few.weights  # there are two copies while they are packed


def test_the_json_is_plain_and_whole() -> None:
    plan = make_serving_plan(query_for(target=Target(tpot_seconds=0.05)))
    read = json.loads(str(plan))
    assert set(read["chosen"]) >= {"tp", "pp", "replicas", "precision", "max_batch", "memory", "predicted", "binding"}
    assert set(read["chosen"]["predicted"]["ttft_seconds"]) == {"low", "mid", "high"}
    assert read["chosen"]["predicted"]["dollars_per_million_tokens"] > 0
    assert sum(read["chosen"]["breakdown"].values()) == pytest.approx(
        read["chosen"]["predicted"]["tpot_seconds"]["mid"]
    )
    assert isinstance(plan, ServingPlan) and read["target"]["tpot_seconds"] == 0.05


def test_every_constant_has_a_source_and_saving_keeps_it(tmp_path) -> None:
    from meshwright.plan.constants import load_profile
    from meshwright.plan.constants.serving import SERVING_CONSTANTS

    assert all(row.source and row.unit and row.value > 0 for row in SERVING_CONSTANTS)
    mine: Profile = DATASHEET.changed({"serving.cuda.step_seconds": 5e-4})
    mine.save(tmp_path / "mine.toml")
    assert load_profile(tmp_path / "mine.toml")["serving.cuda.step_seconds"] == 5e-4


def test_a_server_is_a_row_that_can_be_read() -> None:
    assert all(isinstance(server, Server) and server.name == name for name, server in SERVERS.items())
