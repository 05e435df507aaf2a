"""Real processes for the tests of layouts: one world trains many small cases, one process group each.

A Case is a layout with a model and a precision. `train_cases` starts as many processes as the layouts need and gives
back losses, norms and recorded gradients, which `compare` sets beside one device's. Tests call these; the functions
that take (payload, context) are what the started processes run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from meshwright import launch
from meshwright.launch import Context
from meshwright.layout import Execution, Layout

STEPS = 20
SEQ_LEN = 16
GLOBAL_BATCH = 8
CLIP = 0.95  # near the norms of these models, so that some steps are clipped and some are not

#: A Llama whose sizes do not divide evenly over four shards, with grouped queries wider than the residual stream.
PLAIN: Mapping[str, Any] = {
    "layers": 2,
    "hidden": 40,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 8,
    "ffn": 54,
    "vocab": 102,
}
#: The same with sizes that four tensor-parallel ranks can share.
FOURFOLD: Mapping[str, Any] = dict(PLAIN, ffn=52, vocab=100)
#: Qwen3's features: tied embeddings and norms of queries and keys.
TIED: Mapping[str, Any] = dict(PLAIN, tied=True, qk_norm=True, hf_type="qwen3")
#: Qwen2's: biases on queries, keys and values.
BIASED: Mapping[str, Any] = dict(PLAIN, bias_of=("qkv",), hf_type="qwen2")
SHAPES = {
    "plain": PLAIN,
    "fourfold": FOURFOLD,
    "tied": TIED,
    "tied fourfold": {**TIED, **FOURFOLD},
    "biased": BIASED,
}


@dataclass(frozen=True)
class Case:
    """What one process group trains. `shape` is a key of SHAPES."""

    layout: Layout
    shape: str = "plain"
    precision: str = "fp32"
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [str(self.layout), self.shape, "" if self.precision == "fp32" else self.precision]
        return " ".join([*filter(None, words), *(["compiled"] if self.compiled else [])])

    @property
    def alone(self) -> Case:
        """The same model and arithmetic on one device, in one micro-batch."""
        return dataclasses.replace(self, layout=Layout(micro_batch=GLOBAL_BATCH), compiled=False, precision="fp32")


@dataclass(frozen=True)
class Trained:
    """What came of a Case: by step, the loss and the gradient norm; `folder` holds the recorded gradients."""

    losses: list[float]
    norms: list[float]
    folder: Path


@dataclass(frozen=True)
class Distance:
    """The largest relative differences from one device, over all steps.

    `first_gradient` is of step 1, before rounding has passed through the optimizer, tensor by tensor against itself.
    """

    loss: float
    norm: float
    gradient: float
    gradient_where: str
    first_gradient: float
    first_where: str


@dataclass(frozen=True)
class RandomTokens:
    """Batches that depend on the step alone. Padding is uneven: some samples have none, some are nearly all padding."""

    vocab: int

    def batch(self, step: int, start: int, stop: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, self.vocab, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
        targets = ids[:, 1:].clone()
        targets[0, 1:] = -100
        targets[1, SEQ_LEN // 2 :] = -100
        targets[GLOBAL_BATCH - 1, : SEQ_LEN // 4] = -100
        positions = torch.arange(SEQ_LEN).expand(GLOBAL_BATCH, -1)
        whole = {"input_ids": ids[:, :-1], "positions": positions, "targets": targets}
        return {name: tensor[start:stop] for name, tensor in whole.items()}


def job(steps: int = STEPS) -> Any:
    """The part of a Job that the Trainer reads."""
    train = SimpleNamespace(
        steps=steps,
        lr=1e-3,
        global_batch=GLOBAL_BATCH,
        seed=0,
        warmup_steps=2,
        decay="cosine",
        min_lr_ratio=0.1,
        decay_fraction=0.2,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=CLIP,
        eval_batches=1,
    )
    return SimpleNamespace(train=train)


def train_one(case: Case, context: Context, folder: Path, steps: int = STEPS) -> Trained:
    """Trains `case` as one rank of its layout; every rank of it calls this."""
    import torch

    from meshwright import tasks
    from meshwright.families.llama.card import LlamaShape, card
    from meshwright.families.llama.module import build
    from meshwright.parallel import apply, start
    from meshwright.train.loop import Trainer
    from meshwright.train.model import initial_values
    from meshwright.train.recorder import recorder

    torch.set_num_threads(1)
    shape = LlamaShape(**SHAPES[case.shape])
    paper = card(shape, SEQ_LEN)
    with start(case.layout, context, timeout_seconds=120, name=case.name) as mesh:
        with torch.device("meta"):
            module = build(shape)
        stages = even_stages([block.name for block in paper.blocks], case.layout.pp)
        applied = apply(Execution(case.layout, stages, case.precision, case.compiled), paper, module, mesh)
        applied.fill(initial_values(0, module.init_rule))
        trainer = Trainer(
            job(steps), paper, applied, mesh, tasks.get("language-model"), RandomTokens(shape.vocab).batch
        )
        record = recorder(str(folder), applied, mesh)
        results = [trainer.step(step, record) for step in range(1, steps + 1)]
    return Trained([result.loss for result in results], [result.grad_norm for result in results], folder)


def even_stages(names: Sequence[str], stages: int) -> tuple[tuple[str, ...], ...]:
    """Blocks cut into contiguous stages of about equal number."""
    cuts = [index * len(names) // stages for index in range(stages + 1)]
    return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(cuts))


def work(payload: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """What a started process runs: its rank of every case, one after the other."""
    results = []
    for case in payload["cases"]:
        read = Case(**{**case, "layout": Layout(**case["layout"])})
        folder = Path(payload["folder"]) / read.name.replace(" ", "_")
        trained = train_one(read, context, folder, payload["steps"])
        results.append({"losses": trained.losses, "norms": trained.norms, "folder": str(folder)})
    return results


def train_cases(cases: Iterable[Case], folder: Path, steps: int = STEPS, seconds: float = 500) -> dict[str, Trained]:
    """Trains the cases, by name. Cases of one number of devices share their processes."""
    by_size: dict[int, list[Case]] = {}
    for case in cases:
        by_size.setdefault(case.layout.devices, []).append(case)
    trained: dict[str, Trained] = {}
    for size, group in sorted(by_size.items()):
        payload = {"cases": [dataclasses.asdict(case) for case in group], "folder": str(folder), "steps": steps}
        env = {"OMP_NUM_THREADS": "1"}
        with launch.local("tests.worlds:work", payload, size, folder / f"logs-{size}", env=env) as started:
            answers = started.wait(seconds)
        for case, answer in zip(group, answers[0], strict=True):
            trained[case.name] = Trained(answer["losses"], answer["norms"], Path(answer["folder"]))
    return trained


def compare(reference: Trained, other: Trained) -> Distance:
    """How far `other` is from `reference`, both recorded. Gradients of all steps are judged as `verify` does."""
    from meshwright.verify.compare import Recording, differences, read_step

    one, two = (Recording(run.losses, run.folder) for run in (reference, other))
    found = [
        difference
        for step in range(1, len(one.losses) + 1)
        for difference in differences(step, read_step(one.folder, step), one, two, math.inf)
    ]
    loss = max(difference.relative for difference in found if difference.tensor == "loss")
    gradient = max((one for one in found if one.tensor != "loss"), key=lambda one: one.relative)
    norm = max(abs(a - b) / a for a, b in zip(reference.norms, other.norms, strict=True))
    expected, first = read_step(reference.folder, 1), read_step(other.folder, 1)
    apart = {
        name: float((first[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in expected.items()
        # Under softmax the gradient of a bias on keys is zero but for rounding.
        if not name.endswith("attn.k.bias")
    }
    worst = max(apart, key=apart.__getitem__)
    return Distance(
        loss,
        norm,
        gradient.relative,
        f"{gradient.tensor} at step {gradient.step}",
        apart[worst],
        worst,
    )
