"""Requests join, leave and are cancelled without their neighbours noticing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meshwright.engine import Engine, Request, TokenEvent
from meshwright.engine import engine as engine_file
from meshwright.errors import CannotWork, InputError

VOCAB = 199


def prompt(seed: int, length: int = 9) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(VOCAB) for _ in range(length))


def drain(engine: Engine) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {}
    while engine.running or engine.waiting:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    return events


def test_tokens_do_not_depend_on_the_batch(llama: Path) -> None:
    """Greedy and seeded requests give alone what they give among others that come and go at other times."""
    requests = [
        Request(prompt(seed, 5 + 7 * seed), max_tokens=10 + seed, temperature=0.8 * (seed % 2), seed=seed, top_p=0.9)
        for seed in range(7)
    ]
    alone = []
    with Engine.open(llama, max_batch=1) as engine:
        for request in requests:
            id = engine.submit(request)
            alone.append([event.token for event in drain(engine)[id]])
    with Engine.open(llama, max_batch=3) as engine:
        ids, together = [], {}
        for request in requests:
            ids.append(engine.submit(request))
            for event in engine.step():
                together.setdefault(event.id, []).append(event.token)
        for id, events in drain(engine).items():
            together.setdefault(id, []).extend(event.token for event in events)
    assert [together[id] for id in ids] == alone


def test_another_seed_is_another_completion(llama: Path) -> None:
    with Engine.open(llama) as engine:
        out = [[], [], []]
        for index, event in engine.generate([prompt(0)] * 3, max_tokens=20, temperature=1.5, seed=4):
            out[index].append(event.token)
        again = [event.token for _, event in engine.generate([prompt(0)], max_tokens=20, temperature=1.5, seed=4)]
    assert out[0] != out[1] != out[2]
    assert out[0] == again


def test_requests_join_running_ones(llama: Path) -> None:
    with Engine.open(llama, max_batch=2) as engine:
        first = engine.submit(Request(prompt(1), max_tokens=30))
        assert [event.id for event in engine.step()] == [first]
        second = engine.submit(Request(prompt(2), max_tokens=3))
        third = engine.submit(Request(prompt(3), max_tokens=3))
        assert {event.id for event in engine.step()} == {first, second}
        assert (engine.running, engine.waiting) == (2, 1)
        events = drain(engine)
    assert [event.finish_reason for event in events[third]] == [None, None, "length"]
    assert len(events[first]) == 28 and events[first][-1].finish_reason == "length"


def test_cancel_frees_the_slot_at_once(llama: Path) -> None:
    with Engine.open(llama, max_batch=1) as engine:
        long = engine.submit(Request(prompt(1), max_tokens=200))
        engine.step()
        engine.step()
        short = engine.submit(Request(prompt(2), max_tokens=2))
        assert engine.cancel(long) and not engine.cancel(long)
        assert (engine.running, engine.waiting) == (0, 1)
        events = drain(engine)
        assert set(events) == {short}
        assert engine.cancel(999) is False


@pytest.mark.parametrize("leavers", [1, 3])
def test_who_leaves_before_its_first_step_changes_nothing_for_others(llama: Path, leavers: int) -> None:
    """The cache has one slot when the first leaves; the second and third have run in no step."""
    with Engine.open(llama, max_batch=4) as engine:
        engine._scheduler._chunk_tokens = 16
        ids = [engine.submit(Request(prompt(seed, 40), max_tokens=5)) for seed in range(3)]
        engine.step()
        for id in ids[:leavers]:
            assert engine.cancel(id)
        ids.append(engine.submit(Request(prompt(3, 40), max_tokens=5)))
        together = {id: [event.token for event in events] for id, events in drain(engine).items()}
        for seed in range(leavers, 4):
            alone = [event.token for _, event in engine.generate([prompt(seed, 40)], max_tokens=5)]
            assert together[ids[seed]] == alone


def test_a_request_cancelled_while_a_step_runs_gives_no_event(llama: Path) -> None:
    with Engine.open(llama, max_batch=2) as engine:
        kept, gone = (engine.submit(Request(prompt(seed), max_tokens=40)) for seed in (1, 2))
        engine.step()
        seen = []
        inside, go_on = threading.Event(), threading.Event()
        run = engine._decoder.run

        def slow(work):  # type: ignore[no-untyped-def]
            inside.set()
            go_on.wait(10)
            return run(work)

        engine._decoder.run = slow  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: seen.extend(engine.step()))
        thread.start()
        inside.wait(10)
        assert engine.cancel(gone)
        go_on.set()
        thread.join()
        assert [event.id for event in seen] == [kept]


def test_numbers_that_are_not_finite_end_their_request_alone(llama: Path) -> None:
    """The embedding of one token is NaN: who reads it ends with an error, and no one else sees it in the cache."""
    short, other = Request(prompt(1, 4), max_tokens=6), Request(prompt(2, 60), max_tokens=6)
    spoiled = 198
    assert spoiled not in short.prompt_ids + other.prompt_ids
    with Engine.open(llama, max_batch=3) as engine:
        alone = [[event.token for _, event in engine.generate([r.prompt_ids], max_tokens=6)] for r in (short, other)]
        engine._decoder._embed = engine._decoder._embed.index_fill(0, torch.tensor(spoiled), torch.nan)
        beside = engine.submit(other)
        wrong = engine.submit(Request((spoiled, *prompt(3, 80)), max_tokens=6))
        events = drain(engine)
        assert [(event.token, event.finish_reason) for event in events[wrong]] == [(-1, "error")]
        assert [event.token for event in events[beside]] == alone[1]
        ids = [engine.submit(request) for request in (other, short, short)]  # the second has the slot of `wrong`
        events = drain(engine)
        assert [[event.token for event in events[id]] for id in ids] == [alone[1], alone[0], alone[0]]
        with pytest.raises(InputError, match=f"{llama}.*not finite"):
            list(engine.generate([(spoiled,)], max_tokens=2))


def test_stop_ids_and_eos(llama: Path) -> None:
    with Engine.open(llama) as engine:
        plain = [event.token for _, event in engine.generate([prompt(5)], max_tokens=8)]
        stop = plain[3]
        cut = [event for _, event in engine.generate([prompt(5)], max_tokens=8, stop_ids=(stop,))]
        assert cut[-1].token == stop and cut[-1].finish_reason == "stop" and len(cut) == plain.index(stop) + 1
        engine.eos_ids = frozenset({stop})
        assert len(list(engine.generate([prompt(5)], max_tokens=8))) == plain.index(stop) + 1
        assert len(list(engine.generate([prompt(5)], max_tokens=8, ignore_eos=True))) == 8


def test_a_prompt_longer_than_a_chunk_and_than_the_first_cache(llama: Path) -> None:
    """Read in parts, over a cache that grows meanwhile, a prompt gives what it gives in one part."""
    out = {}
    for chunk in (512, 16):
        with Engine.open(llama, max_batch=2) as engine:
            engine._scheduler._chunk_tokens = chunk
            small = engine.submit(Request(prompt(9, 4), max_tokens=60))
            large = engine.submit(Request(prompt(8, 200), max_tokens=20))
            events = drain(engine)
            out[chunk] = [[event.token for event in events[id]] for id in (small, large)]
    assert out[512] == out[16]


@pytest.mark.parametrize(("kind", "key_heads", "copies"), [("llama", 2, 0), ("llama_tied_biased", 4, 1)])
def test_the_cache_takes_half_of_what_the_weights_leave_free(
    kind: str, key_heads: int, copies: int, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 slots of 100 tokens, each with keys and values of 16 elements for every key head of 3 layers, in fp32. Tied
    embeddings are in memory twice."""
    saved = load_file(folder_of(kind) / "model.safetensors").values()
    weights = sum(tensor.nbytes for tensor in saved) + copies * VOCAB * 64 * 4
    cache = 2 * 100 * 3 * 2 * key_heads * 16 * 4
    monkeypatch.setattr(engine_file, "available_memory_bytes", lambda: weights + 2 * cache)
    with Engine.open(folder_of(kind), max_batch=2) as engine:
        assert engine.max_len == 100
    monkeypatch.setattr(engine_file, "available_memory_bytes", lambda: weights // 2)
    with pytest.raises(CannotWork, match=r"its weights take .* GiB in memory, of which .* are free"):
        Engine.open(folder_of(kind), max_batch=2)


@pytest.mark.parametrize(("asked", "cores", "threads"), [(None, 2, 2), (None, 64, 3), (5, 2, 5)])
def test_threads_are_at_most_the_cores_of_this_process(
    asked: int | None, cores: int, threads: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_file, "available_cores", lambda: cores)
    torch.set_num_threads(3)
    try:
        with Engine.open(llama, max_len=8, threads=asked):
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_max_tokens_defaults_to_what_fits(llama: Path) -> None:
    with Engine.open(llama, max_len=20) as engine:
        assert len(list(engine.generate([prompt(1)]))) == 11


def test_wrong_requests_name_the_limit(llama: Path) -> None:
    with Engine.open(llama, max_len=32) as engine:
        with pytest.raises(InputError, match=r"prompt: has 40 tokens; a request has room for 32.*at most 31"):
            engine.submit(Request(prompt(1, 40)))
        with pytest.raises(InputError, match=r"max_tokens.*at most 22"):
            engine.submit(Request(prompt(1, 10), max_tokens=23))
        with pytest.raises(InputError) as caught:
            engine.submit(Request((VOCAB,), temperature=-1.0, top_p=0.0, top_k=-1, min_p=2.0, max_tokens=0))
        wrong = {problem.where for problem in caught.value.problems}
        assert wrong == {"prompt", "temperature", "top_p", "top_k", "min_p", "max_tokens"}
        with pytest.raises(InputError, match="empty"):
            engine.submit(Request(()))
        assert (engine.running, engine.waiting) == (0, 0)


def test_generate_left_early_cancels(llama: Path) -> None:
    with Engine.open(llama) as engine:
        for _, _ in engine.generate([prompt(1), prompt(2)], max_tokens=50):
            break
        assert (engine.running, engine.waiting) == (0, 0)
        engine.submit(Request(prompt(1), max_tokens=5))
        with pytest.raises(CannotWork, match="use submit and step"):
            next(engine.generate([prompt(1)]))
