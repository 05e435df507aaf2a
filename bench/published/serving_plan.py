"""Predicted serving figures beside measured ones: published tables with --data, else our engine on this machine.

    python bench/published/serving_plan.py                             our engine here: batch 1 and 8
    python bench/published/serving_plan.py --data ../shared/published  published figures, error by source

Nothing is fitted to these rows. Published rows name a public model, a device, the split, the precision and the
lengths; latencies were measured at a fixed number of clients, throughputs with all requests at once. Caches of fp8 and
fp4 models are in fp8 unless the row says otherwise.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshwright.cluster import Cluster, available_cores, named_cluster, this_machine
from meshwright.errors import MeshwrightError
from meshwright.families.decoder_shape import DecoderShape
from meshwright.plan.constants import Profile, default_profile
from meshwright.plan.serving import SERVERS
from meshwright.plan.serving.load import Load, Replica
from meshwright.plan.serving.memory import serving_memory
from meshwright.plan.serving.time import StepModel

_LLAMA4 = DecoderShape(48, 5120, 40, 8, 128, 16384, 202048, experts=16, top_k=1, expert_ffn=8192, shared_ffn=8192)
_DEEPSEEK = DecoderShape(
    61, 7168, 128, 128, 128, 18432, 129280, experts=256, top_k=8, expert_ffn=2048, shared_ffn=2048,
    first_dense_layers=3, q_lora=1536, kv_lora=512, rope_head_dim=64, v_head_dim=128,
)  # fmt: skip
_QWEN_MOE = DecoderShape(48, 2048, 32, 4, 128, 6144, 151936, experts=128, top_k=8, expert_ffn=768)
#: Public configs of the models that the tables name, by a part of the name in lower case.
MODELS: dict[str, DecoderShape] = {
    "llama 3.1 405b": DecoderShape(126, 16384, 128, 8, 128, 53248, 128256),
    "llama3.1-405b": DecoderShape(126, 16384, 128, 8, 128, 53248, 128256),
    "llama 3.3 70b": DecoderShape(80, 8192, 64, 8, 128, 28672, 128256),
    "llama 3 (70b)": DecoderShape(80, 8192, 64, 8, 128, 28672, 128256),
    "llama2-70b": DecoderShape(80, 8192, 64, 8, 128, 28672, 32000),
    "llama 3.1 8b": DecoderShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama3.1-8b": DecoderShape(32, 4096, 32, 8, 128, 14336, 128256),
    "llama 3 (8b)": DecoderShape(32, 4096, 32, 8, 128, 14336, 128256),
    "mistral (7b)": DecoderShape(32, 4096, 32, 8, 128, 14336, 32000),
    "llama 4 scout": _LLAMA4,
    "llama 4 maverick": replace(_LLAMA4, experts=128, moe_every=2),
    "qwen3-30b-a3b": _QWEN_MOE,
    "qwen3-235b-a22b": replace(_QWEN_MOE, layers=94, hidden=4096, heads=64, ffn=12288, expert_ffn=1536),
    "qwen3-32b": DecoderShape(64, 5120, 64, 8, 128, 25600, 151936),
    "deepseek": _DEEPSEEK,
    "kimi-k2": replace(_DEEPSEEK, heads=64, kv_heads=64, experts=384, first_dense_layers=1, vocab=163840),
    "minimax-m2": DecoderShape(62, 3072, 48, 8, 128, 1536, 200064, experts=256, top_k=8, expert_ffn=1536),
}
DEVICES = {
    "rtx 6000 pro": "rtx-pro-6000",
    "gb200": "gb200",
    "gb300": "gb300",
    "b200": "b200-sxm",
    "b300": "b300-sxm",
    "h100": "h100-sxm-80gb",
    "h200": "h200-sxm",
    "a100": "a100-sxm-80gb",
}


@dataclass(frozen=True)
class ServingFigure:
    """A measured figure and the prediction with its interval."""

    source: str
    what: str
    label: str
    measured: float
    low: float
    mid: float
    high: float

    @property
    def error(self) -> float:
        return abs(self.mid / self.measured - 1)

    @property
    def in_interval(self) -> bool:
        return self.low <= self.measured <= self.high


def look_up(table: dict[str, Any], name: str) -> Any:
    """The entry whose key is a part of `name`."""
    return next((value for key, value in table.items() if key in name.lower()), None)


def csv_rows(path: Path, kind: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


def row_details(row: dict[str, str]) -> dict[str, str]:
    return dict(part.split("=", 1) for part in row["details"].split(";") if "=" in part)


def predict(
    shape: DecoderShape, cluster: Cluster, profile: Profile, precision: str, tp: int, pp: int, sizes: tuple[int, int],
    batch: int | None,
) -> Load:  # fmt: skip
    """A replica of the split with `batch` sequences, or as many as fit its memory; a mixture of experts then splits
    attention by heads or by sequences, whichever has the higher throughput."""
    server = SERVERS["paged"]
    cache = 1.0 if precision in ("fp8", "fp4") else None
    loads = []
    for attention_dp in (False, True) if batch is None and shape.experts and tp > 1 else (False,):
        model = StepModel(
            shape, cluster, server, profile, tp=tp, pp=pp, precision=precision, cache_bytes=cache,
            attention_dp=attention_dp,
        )  # fmt: skip
        room = serving_memory(model, sum(sizes), server.most_batch, sum(sizes)).sequences
        loads.append(Replica(model, *sizes, batch or max(1, min(server.most_batch, room))).closed())
    return max(loads, key=lambda load: load.requests_per_second)


def published(path: Path, profile: Profile) -> Iterator[ServingFigure]:
    """Every complete row of the two kinds; others are printed."""
    for row in csv_rows(path, "serving_latency"):
        details = row_details(row)
        if details["mode"] != "agg":
            continue  # separate machines for prompts and decoding: no plan has that
        tp, pp = int(details["tp_size"]), int(details.get("pp_size", 1))
        precision = details.get("precision", "bf16")
        sizes = (int(details["isl"]), int(details["osl"]))
        at_once = int(details.get("concurrency", details["batch_size"]))
        load = _load(row["hardware"], details["model_path"], profile, precision, tp, pp, sizes, at_once)
        if load is None:
            continue
        if row["metric"] == "TTFT" and "concurrency" not in details:
            continue  # all requests at once: the time depends on the queue, whose length is not given
        what, mid = ("tpot", load.tpot_seconds) if row["metric"] == "TPOT" else ("ttft", load.ttft_seconds)
        low, high = interval(profile, details["model_path"], what)
        label = f"{details['model_path']} {row['hardware']} tp{tp} {precision} {at_once} at once {sizes[0]}/{sizes[1]}"
        source = f"aiconfigurator {details['backend']} {what}"
        source += "" if "concurrency" in details else ", clients not said"
        yield ServingFigure(source, what, label, float(row["value"]) / 1e3, mid * low, mid, mid * high)
    for row in csv_rows(path, "inference_throughput"):
        details = row_details(row)
        if "isl" not in details:
            continue  # rounded sums of whole machines, without lengths
        tp, pp = int(details.get("tp", details.get("gpus", 1))), int(details.get("pp", 1))
        precision = details.get("quant", "FP16").lower().replace("fp16", "bf16")
        sizes = (int(details["isl"]), int(details["osl"]))
        batch = int(details["batch"]) if "batch" in details else None
        load = _load(row["hardware"], details["model"], profile, precision, tp, pp, sizes, batch)
        if load is None:
            continue
        mid = load.requests_per_second * sizes[1]
        low, high = interval(profile, details["model"], "throughput")
        label = f"{details['model']} {row['hardware']} tp{tp} pp{pp} {precision} {sizes[0]}/{sizes[1]}"
        source = "TensorRT-LLM 1.0 tables" if "TensorRT" in row["details"] else "Azure guide"
        yield ServingFigure(source, "throughput", label, float(row["value"]), mid * low, mid, mid * high)


def interval(profile: Profile, model: str, what: str) -> tuple[float, float]:
    shape = look_up(MODELS, model)
    return profile.interval("serving", "cuda", what, "mixture" if shape.experts else "dense")


def _load(
    hardware: str, model: str, profile: Profile, precision: str, tp: int, pp: int, sizes: tuple[int, int],
    batch: int | None,
) -> Load | None:  # fmt: skip
    shape, device = look_up(MODELS, model), look_up(DEVICES, hardware)
    if shape is None or device is None:
        print(f"left out: {model} on {hardware}")
        return None
    try:
        cluster = named_cluster(device, max(tp * pp, 1))
        return predict(shape, cluster, profile, precision, tp, pp, sizes, batch)
    except (MeshwrightError, KeyError) as error:
        print(f"left out: {model} on {hardware}: {error}")
        return None


def show(rows: Sequence[ServingFigure], every: bool) -> None:
    """A table with one line per source; with `every`, all rows below it."""
    print("| source | rows | mean error | worst | bias | in the 90 % interval |\n|---|---|---|---|---|---|")
    for source in sorted({row.source for row in rows}):
        here = [row for row in rows if row.source == source]
        errors = [row.error for row in here]
        bias = statistics.median(row.mid / row.measured for row in here)
        covered = sum(row.in_interval for row in here)
        print(
            f"| {source} | {len(here)} | {statistics.mean(errors):.0%} | {max(errors):.0%} | x{bias:.2f} "
            f"| {covered} of {len(here)} |"
        )
    if every:
        for row in rows:
            print(row_line(row))


def row_line(row: ServingFigure) -> str:
    """Source, predicted over measured, both figures, and the label."""
    return f"{row.source:32} {row.mid / row.measured:5.2f}x  {row.measured:10.4g} {row.mid:10.4g}  {row.label}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted serving figures beside measured ones.")
    parser.add_argument("--data", type=Path, help="folder with measurements.csv")
    parser.add_argument("--rows", action="store_true", help="print every row, too")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of torch; all cores by default")
    arguments = parser.parse_args()
    profile = default_profile()
    if arguments.data is not None:
        show(list(published(arguments.data / "measurements.csv", profile)), arguments.rows)
        return
    rows = []
    for row in here(profile, arguments.sizes, arguments.rounds, arguments.threads):
        rows.append(row)
        print(row_line(row), flush=True)
    show(rows, False)


@dataclass(frozen=True)
class TimedModel:
    """A Llama with random weights, and the lengths of prompt and output to time it with."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    precision: str
    prompt: int
    output: int


SIZES = {
    "3M fp32": TimedModel(4, 224, 8, 4, 640, 4096, "fp32", 64, 96),
    "29M bf16": TimedModel(8, 512, 8, 4, 1536, 8192, "bf16", 128, 64),
    "29M fp32": TimedModel(8, 512, 8, 4, 1536, 8192, "fp32", 128, 64),
    "443M bf16": TimedModel(24, 1024, 16, 8, 4096, 32000, "bf16", 128, 32),
}


def here(profile: Profile, sizes: Sequence[str], rounds: int, threads: int | None) -> Iterator[ServingFigure]:
    """Our engine on this machine: a step of 1 and of 8 rows, and reading one prompt; the median of all rounds."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    cores = this_machine(max(1, available_cores() // torch.get_num_threads()))
    cluster = replace(cores, devices=1, devices_per_node=1)  # the other cores are idle
    low, high = profile.interval("serving", cluster.device.kind, "tpot")
    with tempfile.TemporaryDirectory() as scratch:
        for name in sizes:
            size = SIZES[name]
            shape = DecoderShape(
                size.layers, size.hidden, size.heads, size.kv_heads, size.hidden // size.heads, size.ffn, size.vocab
            )
            model = StepModel(shape, cluster, SERVERS["meshwright"], profile, precision=size.precision)
            folder = make_folder(size, Path(scratch) / name.replace(" ", "-"))
            for batch in (1, 8):
                replica = Replica(model, size.prompt, size.output, batch)
                seconds = {"tpot": replica.decode_seconds(batch), "ttft": replica.prompt_seconds(0)}
                measured = timed(folder, size, batch, rounds)
                for what in ("tpot", "ttft") if batch == 1 else ("tpot",):
                    mid = seconds[what]
                    yield ServingFigure(
                        f"our engine, {what}", what, f"{name} batch {batch}", measured[what], mid * low, mid, mid * high
                    )


def make_folder(size: TimedModel, folder: Path) -> Path:
    """A Hugging Face folder of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, intermediate_size=size.ffn, vocab_size=size.vocab,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def timed(folder: Path, size: TimedModel, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step that decodes `batch` rows, and of reading one prompt alone. With one thread they are
    seconds of CPU time, which other work on the machine disturbs less."""
    import torch

    from meshwright.engine import Engine, Request

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    steps, firsts = [], []
    with Engine.open(folder, max_batch=batch) as engine:
        for turn in range(rounds + 1):
            for index in range(batch):
                prompt = tuple((7 * index + 3 * place + turn) % size.vocab for place in range(size.prompt))
                engine.submit(Request(prompt_ids=prompt, max_tokens=size.output, ignore_eos=True))
            first = True
            while engine.running or engine.waiting:
                begin = clock()
                events = engine.step()
                took = clock() - begin
                if not turn:
                    continue  # the first round warms up
                if first and batch == 1:
                    firsts.append(took)
                elif len(events) == batch and not first:
                    steps.append(took)
                first = False
    return {"tpot": statistics.median(steps), "ttft": statistics.median(firsts) if firsts else 0.0}


if __name__ == "__main__":
    main()
