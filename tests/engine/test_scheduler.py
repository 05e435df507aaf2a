"""Slots never leak and are never owned twice; work survives its trip as integers; requests join and leave."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import torch
from hypothesis import given

from meshwright.engine.cache import KeyValueCache
from meshwright.engine.request import Request
from meshwright.engine.scheduler import Move, RunningRequest, Scheduler, Segment, Slots, Work

_small = st.integers(0, 2**31)
_works = st.builds(
    lambda moves, rows, decoding, segments, keep: Work(
        tuple(moves),
        tuple(r[0] for r in rows),
        tuple(r[1] for r in rows),
        tuple(decoding),
        tuple(segments),
        tuple(keep),
    ),
    st.lists(st.builds(Move, _small, _small, _small), max_size=4),
    st.lists(st.tuples(_small, _small), max_size=6),
    st.lists(_small, max_size=6),
    st.lists(st.builds(Segment, _small, _small, st.lists(_small, max_size=9).map(tuple), st.booleans()), max_size=4),
    st.lists(_small, max_size=6),
)


@given(_works)
def test_work_as_integers_and_back(work: Work) -> None:
    assert Work.decode(work.encode()) == work


@given(st.integers(1, 6), st.lists(st.integers(-1, 7), max_size=60))
def test_slots_are_dense_and_owned_once(count: int, actions: list[int]) -> None:
    """-1 acquires, any other number releases that slot (modulo those in use)."""
    slots, expected, following = Slots(count), [], 0
    for action in actions:
        if action < 0:
            slot = slots.acquire(following)
            if len(expected) == count:
                assert slot is None
            else:
                assert slot == len(expected)
                expected.append(following)
            following += 1
        elif expected:
            slot = action % len(expected)
            moved = slots.release(slot)
            last = expected.pop()
            if slot < len(expected):
                expected[slot] = last
                assert moved == last
            else:
                assert moved is None
        assert slots.owners == tuple(expected)
        assert len(set(slots.owners)) == slots.used <= count


def make(id: int, prompt: int, new: int) -> RunningRequest:
    request = Request(prompt_ids=tuple(range(100, 100 + prompt)))
    return RunningRequest(id=id, request=request, max_tokens=new, stop_ids=frozenset(), random=random.Random(id))


class Memory:
    """A cache of plain lists: carries out work as the decoder would and checks what each row may see.

    A real cache grows beside it and carries out the moves, which must lie within what it has grown to."""

    def __init__(self, slots: int) -> None:
        self.rows: list[dict[int, int]] = [{} for _ in range(slots)]
        self.cache = KeyValueCache(1, 1, 1, slots, 64, torch.float32, torch.device("cpu"))

    def run(self, work: Work) -> None:
        self.cache.reserve(work.slots, work.length)
        self.cache.apply(work.moves)
        self.cache.clear(work.keep)
        for move in work.moves:
            kept = {p: t for p, t in self.rows[move.source].items() if p < move.length}
            assert len(kept) == move.length, "a move copies only what was written"
            self.rows[move.target] = kept
        for slot, length in enumerate(work.keep):
            self.rows[slot] = {position: self.rows[slot][position] for position in range(length)}
        touched = [(slot, position) for slot, position in enumerate(work.positions)]
        for segment in work.segments:
            for offset, token in enumerate(segment.tokens):
                self.rows[segment.slot][segment.start + offset] = token
                touched.append((segment.slot, segment.start + offset))
        for slot, (token, position) in enumerate(zip(work.tokens, work.positions, strict=True)):
            self.rows[slot][position] = token
        assert len(set(touched)) == len(touched), "no place is written twice in a step"

    def sees(self, running: RunningRequest) -> list[int]:
        return [self.rows[running.slot][p] for p in range(running.cached)]


@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 12), st.integers(1, 6)), st.integers(0, 20)), max_size=60),
)
def test_every_request_sees_its_own_tokens(slots: int, chunk: int, actions: list[object]) -> None:
    """None steps, a pair (prompt, new) submits, a number cancels: the cache behind a slot is always its owner's."""
    scheduler, memory, alive = Scheduler(slots, chunk_tokens=chunk), Memory(slots), {}
    for id, action in enumerate([*actions, *[None] * 400]):
        if isinstance(action, tuple):
            alive[id] = make(id, *action)
            scheduler.add(alive[id])
        elif isinstance(action, int):
            assert scheduler.remove(action) == (alive.pop(action, None) is not None)
        else:
            scheduled = scheduler.schedule()
            if scheduled is None:
                continue
            work, sampled = scheduled
            memory.run(work)
            for running in sampled:
                seen = [*running.request.prompt_ids, *running.generated]
                assert memory.sees(running) == seen
            tokens = [(r, None if id % 5 == 0 else 1000 + r.id) for r in sampled]
            for running, _, reason in scheduler.postprocess(tokens):
                if reason == "error":
                    del alive[running.id]
                elif reason:
                    assert len(running.generated) == running.max_tokens
                    del alive[running.id]
        assert scheduler.running + scheduler.waiting == len(alive)
    assert not alive and scheduler.slots.used == 0


def test_a_long_prompt_does_not_hold_up_those_that_run() -> None:
    scheduler = Scheduler(2, chunk_tokens=8)
    first, second = make(0, 3, 50), make(1, 40, 5)
    scheduler.add(first)
    tokens = []
    for step in range(8):
        if step == 1:
            scheduler.add(second)
        scheduled = scheduler.schedule()
        assert scheduled is not None
        work, sampled = scheduled
        assert sum(len(segment.tokens) for segment in work.segments) <= 8
        tokens.append([running.id for running in sampled])
        scheduler.postprocess([(running, 7) for running in sampled])
    assert tokens == [[0], [0], [0], [0], [0], [0, 1], [0, 1], [0, 1]]


def test_stop_ids_and_length_end_a_request() -> None:
    scheduler = Scheduler(1)
    running = RunningRequest(0, Request(prompt_ids=(1,)), 9, frozenset({5}), random.Random(0))
    scheduler.add(running)
    reasons = []
    for token in (3, 4, 5):
        scheduler.schedule()
        reasons += [reason for _, _, reason in scheduler.postprocess([(running, token)])]
    assert reasons == [None, None, "stop"] and scheduler.running == 0


def test_what_a_failed_step_leaves_is_no_work_for_the_next() -> None:
    """The step may have failed before the cache grew, so nothing that was queued for it can be moved."""
    scheduler = Scheduler(3, chunk_tokens=30)
    for id in range(3):
        scheduler.add(make(id, 9, 4))
    assert scheduler.schedule() is not None
    for id in range(3):
        scheduler.remove(id)
    scheduler.add(make(3, 2, 4))
    scheduled = scheduler.schedule()
    assert scheduled is not None
    Memory(3).run(scheduled[0])
    assert scheduled[0].moves == ()
