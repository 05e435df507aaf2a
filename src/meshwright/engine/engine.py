"""The engine: schedule, run, postprocess, one step at a time."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from meshwright.cluster import GIB, available_cores, available_memory_bytes
from meshwright.engine.cache import bytes_per_token
from meshwright.engine.folder import (
    EngineModel,
    check_split,
    find_model,
    packed_bytes,
    read_model_config,
    read_weights,
)
from meshwright.engine.products import widens
from meshwright.engine.ranks import Ranks, join, leave
from meshwright.engine.request import Request, TokenEvent, check
from meshwright.engine.runner import Decoder
from meshwright.engine.sampler import sample
from meshwright.engine.scheduler import RunningRequest, Scheduler
from meshwright.errors import CannotWork, InputError, Problem, nearest_name
from meshwright.launch import Context
from meshwright.nn import gpu_type, take_device

PRECISIONS = ("auto", "fp32", "bf16")
#: The largest share of the free memory beside the weights that the cache may grow to when the engine chooses `max_len`.
_CACHE_SHARE = 0.5


class Engine:
    """Completions for many requests at once, from one model.

    `step` makes one token for every running request; requests join and leave between steps. Any thread may call
    `submit` and `cancel`, one at a time `step`. Ranks other than 0 only `follow`.
    """

    def __init__(self, model: EngineModel, decoder: Decoder, ranks: Ranks) -> None:
        self.folder, self.shape, self.eos_ids = model.folder, model.shape, model.eos_ids
        self.vocab = model.shape.vocab
        self.max_batch, self.max_len = decoder.cache.max_batch, decoder.cache.max_len
        self._decoder, self._ranks = decoder, ranks
        self._scheduler = Scheduler(self.max_batch)
        self._ids = itertools.count()
        self._lock = threading.Lock()  # around the scheduler; never held while the model runs
        self._closed = False

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        max_batch: int = 16,
        max_len: int | None = None,
        precision: str = "auto",
        threads: int | None = None,
        context: Context | None = None,
    ) -> Engine:
        """An engine for a run, a checkpoint, or a Hugging Face folder of Llama, Mistral, Qwen2 or Qwen3.

        max_batch: requests that run at once. max_len: tokens of a request, prompt and completion; None is the model's
        limit, or less if max_batch such requests would not fit in half of the memory that the weights leave free.
        precision: "auto" is that of the folder's config. threads: None is torch's setting, but at most the cores that
        this process may use. context: this process's rank among tensor-parallel ones; all of them open the engine,
        rank 0 uses it and the others call `follow`.

        Raises InputError for an unreadable folder or a wrong argument, CannotWork if the model cannot be split so or
        memory cannot hold it.
        """
        if precision not in PRECISIONS:
            raise InputError(Problem("precision", f"{precision!r} is not known", nearest_name(precision, PRECISIONS)))
        for name, value in (("max_batch", max_batch), ("max_len", max_len), ("threads", threads)):
            if value is not None and value < 1:
                raise InputError(Problem(name, f"is {value}", "at least 1"))
        model = read_model_config(find_model(Path(folder)))
        dtype = {"auto": model.precision, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        if context is not None:
            check_split(model.shape, Ranks(context.rank, context.world))
        ranks = join(context)
        torch.set_num_threads(threads or min(torch.get_num_threads(), max(1, available_cores() // ranks.world)))
        device = take_device(ranks.rank)
        limit = _limit_len(model, ranks, max_batch, max_len, dtype)
        weights = read_weights(model, ranks, dtype, device)
        decoder = Decoder(model.shape, weights, ranks, max_batch, limit, widens(dtype, device))
        return cls(model, decoder, ranks)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._scheduler.waiting

    @property
    def cache_bytes(self) -> int:
        """Memory of this rank's cache."""
        return self._decoder.cache.bytes

    def submit(self, request: Request) -> int:
        """Queues `request` and returns the id of its events. Raises InputError if this model cannot answer it."""
        check(request, self.vocab, self.max_len)
        stop_ids = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else self.eos_ids)
        with self._lock:
            running = RunningRequest(
                id=next(self._ids),
                request=request,
                max_tokens=request.max_tokens or self.max_len - len(request.prompt_ids),
                stop_ids=stop_ids,
                random=random.Random(request.seed),
            )
            self._scheduler.add(running)
        return running.id

    def cancel(self, id: int) -> bool:
        """Drops a request: its slot is free at once and it has no more events. False if it has ended already."""
        with self._lock:
            return self._scheduler.remove(id)

    def step(self) -> list[TokenEvent]:
        """Runs one step: at most one token for each running request. Returns [] while prompts are read, or if there is
        nothing to do (`running` and `waiting` are then 0)."""
        with self._lock:
            scheduled = self._scheduler.schedule()
        if scheduled is None:
            return []
        work, sampled = scheduled
        self._ranks.send(work)
        logits = self._decoder.run(work)
        assert logits is not None, "step is rank 0's"
        if not sampled:
            return []
        tokens, logprobs = sample(logits, sampled)
        logprob_of = dict(zip((running.id for running in sampled), logprobs, strict=True))
        with self._lock:
            events = self._scheduler.postprocess(zip(sampled, tokens, strict=True))
        return [TokenEvent(running.id, token, reason, logprob_of[running.id]) for running, token, reason in events]

    def generate(self, prompts: Sequence[Sequence[int]], **fields: Any) -> Iterator[tuple[int, TokenEvent]]:
        """Completes every prompt; yields (index of the prompt, event) as tokens come. `fields` are those of Request.

        Raises CannotWork while other requests run, since it would lose their events, and InputError where the model's
        logits are not finite. A request's `seed` is s + index,
        so that equal prompts differ. A caller that stops early cancels the rest.
        """
        if self.running or self.waiting:
            raise CannotWork(Problem("generate", "other requests are running", "use submit and step"))
        seed = fields.pop("seed", None)
        base = Request(prompt_ids=(), **fields)
        requests = [
            replace(base, prompt_ids=tuple(prompt), seed=None if seed is None else seed + index)
            for index, prompt in enumerate(prompts)
        ]
        for request in requests:
            check(request, self.vocab, self.max_len)
        index_of = {self.submit(request): index for index, request in enumerate(requests)}
        try:
            while self.running or self.waiting:
                for event in self.step():
                    if event.finish_reason == "error":
                        what = "its logits are not finite (NaN or infinity)"
                        raise InputError(Problem(str(self.folder), what, "check its weights, or try precision fp32"))
                    yield index_of[event.id], event
        finally:
            for id in index_of:
                self.cancel(id)

    def follow(self) -> None:
        """Ranks other than 0: runs rank 0's steps until it closes."""
        assert self._ranks.rank > 0, "rank 0 leads"
        while (work := self._ranks.receive()) is not None:
            self._decoder.run(work)
        self.close()

    def close(self) -> None:
        """Ends the other ranks too. The engine cannot be used afterwards; closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        if self._ranks.rank == 0:
            self._ranks.send(None)
        leave(self._ranks)


def _limit_len(model: EngineModel, ranks: Ranks, max_batch: int, max_len: int | None, dtype: torch.dtype) -> int:
    """Most tokens of a request. Raises InputError for a `max_len` past the model's limit."""
    shape, longest = model.shape, model.shape.longest
    if max_len is not None:
        if max_len > longest:
            window = shape.sliding_window
            why = f"its sliding window is {window} tokens" if window == longest else f"it has {longest} positions"
            raise InputError(Problem("max_len", f"{max_len} is more than the model takes: {why}", f"at most {longest}"))
        return max_len
    token_bytes = bytes_per_token(shape.layers, shape.kv_heads // ranks.world, shape.head_dim, dtype)
    # All ranks ask before any of them reads weights, which `minimum` waits for.
    free_bytes = torch.accelerator.get_memory_info()[0] if gpu_type() else available_memory_bytes() // ranks.world
    weight_bytes = packed_bytes(model, ranks, dtype)
    if free_bytes <= weight_bytes:
        what = f"its weights take {weight_bytes / GIB:.1f} GiB in memory, of which {free_bytes / GIB:.1f} GiB are free"
        raise CannotWork(Problem(str(model.folder), what, "nearest: end other programs, or precision bf16"))
    fits = int((free_bytes - weight_bytes) * _CACHE_SHARE) // (token_bytes * max_batch)
    if fits < 2:
        what = f"a cache for {max_batch} requests does not fit in memory"
        raise CannotWork(Problem("max_batch", what, "nearest: a smaller max_batch"))
    return ranks.minimum(min(longest, fits))
