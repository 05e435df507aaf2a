"""verify's worker with a fault of one in a thousand in the gradient of one tensor, on all layouts but one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright.launch import Context
from meshwright.train import loop
from meshwright.verify.work import work as sound_work

TENSOR = "blocks.1.ffn.down.weight"


def from_the_start(payload: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return _broken(payload, context, first_step=1)


def from_step_3(payload: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return _broken(payload, context, first_step=3)


def _broken(payload: Mapping[str, Any], context: Context, first_step: int) -> dict[str, Any]:
    if context.world > 1:
        sound, sound_step, step = loop.complete_gradients, loop.Trainer.step, [0]

        def complete(model: Any, optimizer: Any, mesh: Any) -> None:
            sound(model, optimizer, mesh)
            gradient = optimizer.named_gradients().get(TENSOR)
            if gradient is not None and step[0] >= first_step:
                gradient.mul_(1.001)

        def counted(self: Any, number: int, record: Any = None) -> Any:
            step[0] = number
            return sound_step(self, number, record)

        loop.complete_gradients, loop.Trainer.step = complete, counted
    return sound_work(payload, context)
