"""`verify`: two short training runs of the same job in local processes, and their comparison."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from meshwright import data, families, launch
from meshwright.card import Card
from meshwright.cluster import Cluster, this_machine
from meshwright.errors import CannotWork, LayoutsDisagree, Problem
from meshwright.families.llama import card as llama
from meshwright.job import Job, job_to_toml
from meshwright.layout import Layout
from meshwright.plan import Plan, PlanRequest, Workload, balance, make_plan
from meshwright.run import RunFolder
from meshwright.verify.compare import Comparison, Difference, Recording, compare
from meshwright.verify.twin import small_job, small_layout

#: Precision -> largest relative difference of loss and gradients that counts as equal.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
#: What the processes call.
WORK = "meshwright.verify.work:work"


def run(job: Job, card: Card, cluster: Cluster, *, steps: int = 20, precision: str = "fp32") -> dict[str, Any]:
    """Trains the planned layout of `job` and one device for `steps` steps from equal seeds and data, and compares.

    The layout is planned for `cluster`; the runs are processes of this machine, which may outnumber its cores. Returns
    {"layout", "steps", "precision", "tolerance", "twin", "without_dropout", "loss", "gradient", "buffer", "drift"}: the
    largest relative differences, a description of the smaller twin where one was needed to fit one process, else "",
    and whether the model's dropout was left out. Raises LayoutsDisagree naming the first step and tensor that differ,
    CannotWork where no layout does the job.
    """
    request = PlanRequest(
        global_batch=job.train.global_batch,
        precision=job.train.precision,
        pins=job.layout.pins(),
        origins=job.origins,
    )
    planned = make_plan(card, cluster, request)
    layout = small_layout(planned.chosen.layout)
    twin = ""
    if layout != planned.chosen.layout or not _fits_one_process(card, request):
        job = small_job(job, layout)
        twin = f"a twin of {job.model.layers} layers, {job.model.hidden} wide, split {layout}"
        card = llama.card(families.shape_of_job(job), job.data.seq_len or 1)
    names = tuple(block.name for block in card.blocks)
    stages = planned.chosen.stages
    if twin:
        stages = balance(Workload(card, cluster, job.train.global_batch, precision), layout)
    split = _plan_of(planned, layout, stages, precision, job)
    single = _plan_of(planned, Layout(micro_batch=layout.micro_batch), (names,), precision, job)
    tolerance = TOLERANCE[precision]
    comparison, dropout = _train_both(_short_job(job, steps, precision), single, split, tolerance)
    if comparison.first_beyond is not None:
        raise LayoutsDisagree(_disagreement(layout, comparison, comparison.first_beyond))
    return {
        "layout": str(planned.chosen.layout),
        "steps": steps,
        "precision": precision,
        "tolerance": tolerance,
        "twin": twin,
        "without_dropout": dropout,
        "loss": dataclasses.asdict(comparison.loss),
        "gradient": dataclasses.asdict(comparison.gradient),
        "buffer": dataclasses.asdict(comparison.buffer),
        "drift": dataclasses.asdict(comparison.drift),
    }


def _fits_one_process(card: Card, request: PlanRequest) -> bool:
    """Whether the reference run in fp32 fits all of this machine's memory."""
    here = this_machine()
    whole = dataclasses.replace(here.device, memory_bytes=here.device.memory_bytes * here.devices)
    alone = dataclasses.replace(here, device=whole, devices=1, devices_per_node=1)
    try:
        make_plan(card, alone, dataclasses.replace(request, precision="fp32", pins={}))
    except CannotWork:
        return False
    return True


def _plan_of(planned: Plan, layout: Layout, stages: tuple[tuple[str, ...], ...], precision: str, job: Job) -> Plan:
    """`planned` with another layout, to be run. Its predictions stay those of `planned`."""
    chosen = dataclasses.replace(
        planned.chosen,
        layout=layout,
        stages=stages,
        precision=precision,
        compiled=False,
        micro_batches=layout.micro_batches(job.train.global_batch),
    )
    return dataclasses.replace(planned, chosen=chosen)


def _train_both(job: Job, single: Plan, split: Plan, tolerance: float) -> tuple[Comparison, bool]:
    """The comparison, and whether the model's dropout was left out.

    One device trains as it is, and with its batches in another order; the layout by itself, and from one device's
    weights at each step.
    """
    with launch.scratch_folder("meshwright-verify-") as folder:
        reference, other = Path(folder, "one-device"), Path(folder, "layout")
        weights = str(Path(folder, "weights"))
        as_it_is = {"record": str(reference / "gradients"), "save": weights}
        reordered = {"record": str(reference / "reordered"), "reversed": True}
        free = {"record": str(other / "gradients")}
        followed = {"record": str(other / "followed"), "load": weights}
        (one_device, other_order), dropout = _train(reference, job, single, [as_it_is, reordered], data_from=None)
        (by_itself, from_equal_weights), _ = _train(other, job, split, [free, followed], data_from=reference)
        return compare(one_device, other_order, by_itself, from_equal_weights, tolerance), dropout


def _disagreement(layout: Layout, comparison: Comparison, first: Difference) -> Problem:
    loss, gradient = comparison.loss, comparison.gradient
    by_name = first.tensor == "loss" or first.tensor.startswith("buffer ")
    what = f"the {first.tensor}" if by_name else f"the gradient of {first.tensor}"
    return Problem(
        f"layout {layout}, step {first.step}",
        f"{what} differs from one device's by {first.relative:.1e} relative, more than {first.allowed:.1g}",
        f"largest over all steps: loss {loss.relative:.1e} at step {loss.step}, gradient "
        f"{gradient.relative:.1e} ({gradient.tensor}) at step {gradient.step}",
    )


def _short_job(job: Job, steps: int, precision: str) -> Job:
    """The same job with `steps` steps, without checkpoints, evaluations and compilation."""
    sections: dict[str, Any] = job.as_dict()
    train = {"steps": steps, "precision": precision, "eval_every": 0, "eval_batches": 1, "compile": False}
    sections["train"] |= train
    sections["train"]["warmup_steps"] = min(sections["train"]["warmup_steps"], steps // 4)
    sections["checkpoint"] |= {"every": 0}
    return Job(**sections)


def _train(
    path: Path, job: Job, plan: Plan, passes: list[dict[str, Any]], data_from: Path | None
) -> tuple[list[Recording], bool]:
    """Runs the passes of `verify.work` in one set of processes. Returns their recordings, and whether dropout was left
    out."""
    run = RunFolder(path).create()
    run.write_job(job_to_toml(job))
    run.write_plan(plan.as_dict())
    if data_from is None:
        data.build_manifest(job, run.manifest)
    else:
        shutil.copytree(RunFolder(data_from).manifest, run.manifest)
    payload = {"run": str(path), "passes": passes}
    # On CPUs alone: ranks may outnumber GPUs, and fp32 is the same on every machine.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with launch.local(WORK, payload, plan.chosen.layout.devices, run.logs, env=environment) as processes:
        first = processes.wait()[0]
    recordings = [Recording(losses, Path(one["record"])) for losses, one in zip(first["losses"], passes, strict=True)]
    return recordings, first["dropout"]
