"""Plans made by hand, for tests of what is drawn and written from them."""

from __future__ import annotations

import itertools

from meshwright.layout import Layout
from meshwright.plan import Choice, Plan
from meshwright.plan.result import Interval, Prediction


def stages_of(layers: int, stages: int) -> tuple[tuple[str, ...], ...]:
    """Embedding, layers and head cut into stages as even as can be, the first ones longer."""
    names = ["embed", *map(str, range(layers)), "head"]
    size, more = divmod(len(names), stages)
    cuts = [stage * size + min(stage, more) for stage in range(stages + 1)]
    return tuple(tuple(names[a:b]) for a, b in itertools.pairwise(cuts))


def choice(layout: Layout, micro_batches: int, *, layers: int = 16, precision: str = "bf16") -> Choice:
    """A choice of that layout whose stages take a second forward, two backward."""
    stages = layout.pp * layout.vpp
    return Choice(
        layout=layout,
        precision=precision,
        compiled=False,
        micro_batches=micro_batches,
        stages=stages_of(layers, stages),
        predicted=Prediction(
            step_seconds=Interval(90.0, 100.0, 120.0),
            peak_bytes=2**34,
            tokens_per_second=1e5,
            mfu=0.4,
            dollars=None,
            goodput=None,
            breakdown={"compute": 80.0, "bubble": 20.0},
        ),
        memory=(),
        forward_seconds=(1.0,) * stages,
        backward_seconds=(2.0,) * stages,
        transfer_seconds=0.1,
        binding="compute",
        why="it is the test's",
        weight_seconds=(1.0,) * stages,
    )


def plan(layout: Layout, micro_batches: int, **more: object) -> Plan:
    """A plan of that choice; the batch is what the layout's arithmetic makes it."""
    return Plan(
        chosen=choice(layout, micro_batches, **more),  # type: ignore[arg-type]
        runners_up=(),
        rejected=(),
        assumed=(),
        model="llama 16x1024",
        parameters=400_000_000,
        cluster="a test's cluster",
        device_bytes=80 * 2**30,
        global_batch=layout.dp * layout.micro_batch * micro_batches,
        unit="tokens",
    )
