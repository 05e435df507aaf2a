"""The twin of a model that one process cannot hold: smaller, with the same kinds of split, schedule and blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

from meshwright import families
from meshwright.errors import CannotWork, Problem
from meshwright.job import Job
from meshwright.layout import Layout

#: A layout of more ranks has its degrees reduced to two, which keeps every kind of split.
MOST_RANKS = 16
HEAD_DIM = 16
WIDTH = 64  # of the feed-forward part, per tensor-parallel rank
SEQ_LEN = 128


def small_layout(layout: Layout) -> Layout:
    """`layout`, or the same kinds of split at degree two where it has more than MOST_RANKS."""
    if layout.devices <= MOST_RANKS:
        return layout
    replicate, shard = min(layout.replicate, 2), min(layout.shard, 2)
    return dataclasses.replace(
        layout, dp=replicate * shard, shard=shard, tp=min(layout.tp, 2), pp=min(layout.pp, 2), cp=1, ep=1
    )


def small_job(job: Job, layout: Layout) -> Job:
    """A job whose model fits one process of this machine, and can be divided as `layout` needs.

    Layers, heads, widths and sequence length shrink. The ratio of query to key heads, tied embeddings, biases, norms,
    rotary scaling, vocabulary and the number of micro-batches (at most two per stage) stay. Raises CannotWork for a
    custom module, which has no twin.
    """
    if job.model.module is not None:
        what = f"one process of this machine cannot hold {job.model.module}, and a module cannot be made smaller for it"
        raise CannotWork(Problem("model.module", what, "make the factory smaller by its arguments: model.arguments"))
    shape = families.shape_of_job(job)
    kv_heads = layout.tp
    heads = kv_heads * (shape.heads // shape.kv_heads)
    micro_batches = min(layout.micro_batches(job.train.global_batch), 2 * layout.pp)
    sections: dict[str, Any] = job.as_dict()
    sections["model"] = {
        "family": "llama",
        "layers": min(shape.layers, max(2, 2 * layout.pp)),
        "hidden": HEAD_DIM * heads,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "ffn": WIDTH * layout.tp,
        "vocab": shape.vocab,
        "rope_theta": shape.rope_theta,
        "rope_scaling": dict(shape.rope_scaling) if shape.rope_scaling else None,
        "norm_eps": shape.norm_eps,
        "tied_embeddings": shape.tied,
        "qk_norm": shape.qk_norm,
        "attention_bias": shape.bias("qkv"),
    }
    seq_len = min(job.data.seq_len or SEQ_LEN, SEQ_LEN)
    sections["data"] |= {"seq_len": max(seq_len - seq_len % layout.tp, layout.tp)}
    if job.model.hf is not None and job.data.tokenizer == "bpe":
        sections["data"]["tokenizer"] = job.model.hf
    sections["train"] |= {"global_batch": layout.dp * layout.micro_batch * micro_batches}
    sections["cluster"] = {}
    sections["layout"] = {}
    return Job(**sections)
