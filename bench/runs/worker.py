"""The processes of `bench.runs`: they measure many layouts in one world with the real trainer, taking turns."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.runs.models import MODELS, Mixer
from meshwright import tasks
from meshwright.job import Job
from meshwright.launch import Context
from meshwright.layout import Execution, Layout, coordinates
from meshwright.parallel import Mesh, apply
from meshwright.parallel.mesh import _ends
from meshwright.process_group import store_of
from meshwright.train.loop import Clock, Trainer
from meshwright.train.model import Model, model_of_job

POLL_SECONDS = 0.01
TIMEOUT_SECONDS = 900.0


def job_of(model: str) -> Job:
    """The job of a measured model. Its data are not used: batches are random."""
    section, seq_len, batch = MODELS[model]
    source = {"source": "digits"} if "module" in section else {"source": "stdlib", "tokenizer": "bpe"}
    if "module" not in section:
        source["seq_len"] = seq_len  # type: ignore[assignment]
    train = {"steps": 1000, "lr": 1e-3, "global_batch": batch, "eval_batches": 1}
    return Job(model=dict(section), data=source, train=train)


class RandomBatches:
    """Random batches that depend only on the step."""

    held_out_samples = 0

    def __init__(self, model: str, vocab: int | None) -> None:
        _, self.seq_len, self.batch_size = MODELS[model]
        self.vocab = vocab

    def batch(self, step: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        if self.vocab is None:
            inputs = torch.randn(self.batch_size, *Mixer().shape, generator=generator)
            targets = torch.randint(0, 10, (self.batch_size,), generator=generator)
            return {"inputs": inputs[start:stop], "targets": targets[start:stop]}
        ids = torch.randint(0, self.vocab, (self.batch_size, self.seq_len + 1), generator=generator)
        positions = torch.arange(self.seq_len).expand(self.batch_size, -1)
        whole = {"input_ids": ids[:, :-1], "positions": positions, "targets": ids[:, 1:]}
        return {name: tensor[start:stop] for name, tensor in whole.items()}


class World:
    """The process group, and a mesh for each shape."""

    def __init__(self, context: Context) -> None:
        self.rank, self.size = context.rank, context.world
        dist.init_process_group(
            "gloo",
            store=store_of(context),
            rank=context.rank,
            world_size=context.world,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        self._dims: dict[tuple[int, ...], Any] = {}

    def mesh(self, layout: Layout) -> Mesh:
        shape = (layout.pp, layout.replicate, layout.shard, layout.tp)
        if shape not in self._dims:
            dims = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "replicate", "shard", "tp"))
            self._dims[shape] = (dims, _ends(layout, self.rank))
        dims, ends = self._dims[shape]
        return Mesh(layout, self.rank, torch.device("cpu"), coordinates(layout, self.rank), dims, ends)


class Runner:
    """One layout of one model on this rank, kept between its turns."""

    def __init__(self, name: str, model: Model, run: Mapping[str, Any], world: World) -> None:
        job, layout = job_of(name), Layout(**run["layout"])
        mesh = world.mesh(layout)
        stages = tuple(tuple(stage) for stage in run["stages"])
        applied = apply(Execution(layout, stages, run["precision"]), model.card, model.module, mesh)
        model.fill(applied)
        vocab = None if job.model.module else job.model.vocab
        batches = RandomBatches(name, vocab)
        self.trainer = Trainer(job, model.card, applied, mesh, tasks.get(job.task.name), batches.batch)
        self.steps = 0
        self.seconds: list[list[float]] = []
        self.cpu_seconds: list[float] = []
        self.spans: list[dict[str, float]] = []

    def turn(self, warm: int, counted: int) -> None:
        """One round: warm-up steps, then counted steps."""
        clock, round_seconds = Clock(), []
        for index in range(warm + counted):
            cpu = time.process_time()
            self.steps += 1
            self.trainer.step(self.steps)
            seconds = clock.tick()
            if index >= warm:
                round_seconds.append(seconds)
                self.cpu_seconds.append(time.process_time() - cpu)
                sums: dict[str, float] = {}
                for name, _, span_seconds, details in self.trainer.spans._spans:
                    if details["step"] == self.steps:
                        sums[name] = sums.get(name, 0.0) + span_seconds
                self.spans.append(sums)
        if round_seconds:
            self.seconds.append(round_seconds)

    def as_dict(self) -> dict[str, Any]:
        return {"rounds": self.seconds, "cpu_seconds": self.cpu_seconds, "spans": self.spans}


def work(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    """Takes this world's turns. payload: {turns: [{world, model, round}], runs: {model: [...]}, folder, warm, counted}.
    Turn K begins when the file turn-K exists, and ends by creating turn-(K+1)."""
    torch.set_flush_denormal(True)
    world, folder = World(context), Path(payload["folder"])
    results: dict[str, list[Any]] = {}
    runners: list[Runner] = []
    try:
        for number, turn in enumerate(payload["turns"]):
            if turn["world"] != context.world:
                continue
            while not (folder / f"turn-{number}").exists():
                time.sleep(POLL_SECONDS)
            if turn["round"] == 0:
                runners = []
                for run in payload["runs"][turn["model"]]:
                    if Layout(**run["layout"]).devices == context.world:
                        model = model_of_job(job_of(turn["model"]), None)
                        runners.append(Runner(turn["model"], model, run, world))
                        runners[-1].turn(1, 0)
            else:
                for runner in runners:
                    runner.turn(payload["warm"], payload["counted"])
                results[turn["model"]] = [runner.as_dict() for runner in runners]
                if context.rank == 0:
                    print(f"{turn['model']}: round {turn['round']} of {context.world} processes", flush=True)
            dist.barrier()
            if context.rank == 0:
                (folder / f"turn-{number + 1}").touch()
    finally:
        dist.destroy_process_group()
    return json.loads(json.dumps(results))
