"""What the tests of `nn` start in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright.launch import Context


def split_loss(payload: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Loss and gradient of this rank's part of a vocabulary."""
    import torch
    import torch.distributed as dist

    from meshwright.nn import Split, cross_entropy_sum
    from meshwright.process_group import store_of

    dist.init_process_group("gloo", store=store_of(context), rank=context.rank, world_size=context.world)
    logits = torch.tensor(payload["logits"]).chunk(context.world, dim=-1)[context.rank].clone().requires_grad_()
    split = Split(dist.group.WORLD, context.rank, context.world)
    loss = cross_entropy_sum(logits, torch.tensor(payload["targets"]), split)
    (loss * payload["upstream"]).backward()
    dist.destroy_process_group()
    assert logits.grad is not None
    return {"loss": loss.item(), "gradient": logits.grad.tolist()}
