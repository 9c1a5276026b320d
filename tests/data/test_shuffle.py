"""If this fails, a row is trained more or less often than configured, or a resumed run sees other data."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.shuffle import epoch_of_position, length_grouped_order, rows_before, rows_in_epochs, shuffled_epoch

weights = st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 1.0, 1.5, 2.0, 3.7])
mixtures = st.lists(st.tuples(st.integers(1, 20), weights), min_size=1, max_size=3)
seeds = st.integers(-3, 3)


@given(mixtures, st.integers(1, 12), seeds)
def test_weights_are_exact_over_epochs(sources, epochs, seed):
    orders = [shuffled_epoch(epoch, sources, seed) for epoch in range(epochs)]
    for epoch, order in enumerate(orders):
        assert rows_before(epoch + 1, sources) - rows_before(epoch, sources) == len(order)
    trained = Counter(np.concatenate(orders).tolist())
    first = 0
    for count, weight in sources:
        times = [trained.pop(row, 0) for row in range(first, first + count)]
        assert sum(times) == round(epochs * count * weight)
        assert max(times) - min(times) <= 1, "no row is trained two times more often than another"
        first += count
    assert not trained


@given(count=st.integers(1, 30), seed=seeds)
def test_weights_of_one_half_one_and_two(count, seed):
    sources = [(count, 0.5), (count, 1.0), (count, 2.0)]
    two = [shuffled_epoch(epoch, sources, seed).tolist() for epoch in (4, 5)]
    assert Counter(row for row in two[0] + two[1] if row < count) == Counter(range(count))
    for epoch in two:
        assert Counter(row for row in epoch if count <= row < 2 * count) == Counter(range(count, 2 * count))
        assert Counter(row for row in epoch if row >= 2 * count) == Counter([*range(2 * count, 3 * count)] * 2)


@given(mixtures, st.integers(0, 2000))
def test_each_position_lies_in_its_epoch(sources, position):
    epoch = epoch_of_position(position, sources)
    assert rows_before(epoch, sources) <= position < rows_before(epoch + 1, sources)


@pytest.mark.parametrize(
    ("epochs", "sources", "expected"),
    [
        (1, [(10, 1.0)], 10),
        (2.5, [(10, 1.0)], 25),
        (0.01, [(10, 1.0)], 1),
        (0.7, [(10, 1.0)], 7),
        (3, [(10, 1.0), (5, 0.5)], 38),  # 30 and round(7.5)
        (1.5, [(10, 1.0), (4, 0.5)], 18),
    ],
)
def test_rows_of_epochs(epochs, sources, expected):
    assert rows_in_epochs(epochs, sources) == expected


def test_order_is_pinned():
    """A new release must not change the data of a run that resumes."""
    assert shuffled_epoch(0, [(8, 1.0)], 42).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    mixed = [shuffled_epoch(epoch, [(4, 0.5), (3, 1.0)], 42).tolist() for epoch in (0, 1)]
    assert mixed == [[6, 4, 5, 3, 1], [6, 2, 0, 4, 5]]
    grouped = length_grouped_order(np.arange(8), np.array([3, 1, 2, 1, 3, 2, 5, 4]), 2, 0, 0, 42)
    assert grouped.tolist() == [7, 6, 0, 4, 1, 3, 2, 5]


def test_seeds_epochs_laps_and_sources_have_orders_of_their_own():
    orders = [tuple(shuffled_epoch(epoch, [(16, 1.0)], seed)) for epoch in range(3) for seed in (0, 1, -1)]
    orders += [
        tuple(row % 16 for row in np.sort(shuffled_epoch(epoch, [(16, 0.5)] * 2, 0)).reshape(2, 8)[source])
        for epoch in (0, 2)
        for source in (0, 1)
    ]
    assert len(set(orders)) == len(orders)


@given(count=st.integers(1, 400), epoch=st.integers(0, 3), global_batch=st.sampled_from([1, 3, 4, 16]), seed=seeds)
def test_grouping_by_length_changes_the_order_and_nothing_else(count, epoch, global_batch, seed):
    sources, lengths = [(count, 1.0)], np.random.default_rng(count).integers(1, 2048, count)
    order = shuffled_epoch(epoch, sources, seed)
    position = rows_before(epoch, sources)
    grouped = length_grouped_order(order, lengths, global_batch, position, epoch, seed)
    assert sorted(grouped) == sorted(order)
    # The epoch's own steps begin and end here.
    begin = min(-position % global_batch, count)
    steps = (count - begin) // global_batch
    batches = grouped[begin : begin + steps * global_batch].reshape(steps, global_batch)
    if steps <= 50:  # They are sorted together, so the batches do not overlap in length.
        bounds = sorted((lengths[batch].min(), lengths[batch].max()) for batch in batches)
        assert all(upper <= lower for (_, upper), (lower, _) in pairwise(bounds))


def test_groups_are_shuffled():
    """Training from short to long rows would be an unwanted curriculum."""
    lengths = np.arange(1, 401)
    grouped = [
        length_grouped_order(shuffled_epoch(e, [(400, 1.0)], 0), lengths, 4, 400 * e, e, 0).reshape(100, 4)
        for e in (0, 1)
    ]
    means = [lengths[batches].mean(axis=1) for batches in grouped]
    for mean in means:
        assert abs(np.corrcoef(mean, np.arange(100))[0, 1]) < 0.3
    assert not np.array_equal(*means)
