from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.data.order import batch_samples, permutation

counts = st.integers(min_value=1, max_value=3000)
seeds = st.integers(min_value=0, max_value=2**63 - 1)


@given(samples=counts, seed=seeds, epoch=st.integers(0, 1000))
def test_each_sample_comes_exactly_once_an_epoch(samples: int, seed: int, epoch: int) -> None:
    order = permutation(np.arange(samples), samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(samples))


@given(samples=counts, seed=seeds, data=st.data())
def test_a_place_has_the_same_sample_whoever_else_is_asked(samples: int, seed: int, data: st.DataObject) -> None:
    whole = permutation(np.arange(samples), samples, seed, 0)
    places = data.draw(st.lists(st.integers(0, samples - 1), max_size=20))
    assert permutation(np.array(places, dtype=np.int64), samples, seed, 0).tolist() == whole[places].tolist()


@given(samples=counts, seed=seeds, step=st.integers(0, 500), global_batch=st.integers(1, 64), data=st.data())
def test_the_cut_into_ranks_does_not_matter(
    samples: int, seed: int, step: int, global_batch: int, data: st.DataObject
) -> None:
    whole = batch_samples(samples, seed, step, global_batch, 0, global_batch)
    cuts = sorted({0, global_batch, *data.draw(st.lists(st.integers(0, global_batch), max_size=4))})
    parts = [batch_samples(samples, seed, step, global_batch, a, b) for a, b in pairwise(cuts)]
    assert np.concatenate(parts).tolist() == whole.tolist()


@given(samples=st.integers(1, 200), seed=seeds, global_batch=st.integers(1, 50), epochs=st.integers(1, 3))
def test_batches_follow_each_other_without_loss_or_repeat(
    samples: int, seed: int, global_batch: int, epochs: int
) -> None:
    steps = -(-samples * epochs // global_batch)
    seen = np.concatenate([batch_samples(samples, seed, step, global_batch, 0, global_batch) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4)


@given(samples=st.integers(1, 60), sizes=SIZES)
def test_batches_of_changing_sizes_follow_each_other(samples: int, sizes: list[tuple[int, int]]) -> None:
    seen, step, consumed = [], 0, 0
    for global_batch, steps in sizes:
        shift = consumed - step * global_batch
        for _ in range(steps):
            seen.append(batch_samples(samples, 3, step, global_batch, 0, global_batch, shift=shift))
            step, consumed = step + 1, consumed + global_batch
    assert np.concatenate(seen).tolist() == batch_samples(samples, 3, 0, consumed, 0, consumed).tolist()


@given(steps=st.integers(1, 20), skips=st.sets(st.integers(0, 15), max_size=6))
def test_a_skipped_batch_is_left_out_and_the_others_keep_their_order(steps: int, skips: set[int]) -> None:
    def batches(number: int, left_out: list[int]) -> list[list[int]]:
        return [batch_samples(1000, 1, step, 8, 0, 8, left_out).tolist() for step in range(number)]

    kept = [batch for index, batch in enumerate(batches(steps + len(skips), [])) if index not in skips]
    assert batches(steps, [*skips, *skips]) == kept[:steps]


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permutation(np.arange(50), 50, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert tuple(range(50)) not in orders


def test_the_order_is_fixed_for_good() -> None:
    """A run that is resumed with a later version of the program must meet the same samples."""
    assert permutation(np.arange(12), 12, 0, 0).tolist() == [5, 10, 6, 11, 7, 3, 0, 1, 4, 2, 8, 9]


def test_an_order_is_mixed_well() -> None:
    samples = 10_000
    order = permutation(np.arange(samples), samples, 7, 3).astype(float)
    assert abs(np.corrcoef(np.arange(samples), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_a_huge_epoch_is_never_laid_out() -> None:
    order = permutation(np.array([0, 10**12 - 1]), 10**12, 0, 0)
    assert ((order >= 0) & (order < 10**12)).all() and order[0] != order[1]


def test_places_outside_the_batch_are_our_bug() -> None:
    for start, stop in [(-1, 2), (3, 2), (0, 9)]:
        with pytest.raises(ValueError, match="not in a batch of 8"):
            batch_samples(10, 0, 0, 8, start, stop)
