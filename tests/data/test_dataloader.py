"""If this fails, a run that resumes or uses more ranks trains on other data, or its ranks wait forever."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_dist.config.sections import DataConfig
from qlora_dist.data.collate import LABEL_IGNORE_INDEX, PADDING_ROW, Batch, PackedDataset, build_packed_dataset
from qlora_dist.data.dataloader import BatchLayout, TrainDataLoader, eval_batches
from qlora_dist.data.tokenized import TokenizedSequences
from qlora_dist.errors import UserError

SEQ_LEN = 64


def make_rows(count: int, packing: str = "none", first: int = 0) -> PackedDataset:
    """Return rows of 2 to 64 tokens, or of 64 if packed.

    Row i starts with the token 1000 + first + i. All its other tokens are trained.
    """
    lengths = [2 + (row * 37) % 63 if packing == "none" else SEQ_LEN for row in range(count)]
    sequences = TokenizedSequences.from_lists(
        ([1000 + first + row] + [1] * (length - 1), [True] * length) for row, length in enumerate(lengths)
    )
    return build_packed_dataset(sequences, DataConfig(train=["a"], seq_len=SEQ_LEN, packing=packing), pad_token_id=0)


def make_loader(
    sources: list[tuple[PackedDataset, float]],
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 1,
    global_batch: int = 8,
    **options: object,
) -> TrainDataLoader:
    layout = BatchLayout(global_batch, micro_batch, rank, world_size)
    return TrainDataLoader(sources, layout, **{"seed": 0, **options})


def identities(batches: list[Batch]) -> list[int]:
    """Return the row indices of the batches."""
    rows = [row - 1000 for batch in batches for row in batch.input_ids[:, 0].tolist()]
    return [row if row >= 0 else PADDING_ROW for row in rows]


@st.composite
def loaders(draw: st.DrawFn) -> tuple[list[tuple[PackedDataset, float]], dict[str, object]]:
    """Draw sources and options of a loader."""
    packing = draw(st.sampled_from(["best-fit", "none"]))
    counts = draw(st.lists(st.integers(2, 30), min_size=1, max_size=2))
    firsts = [0, counts[0]]
    weights = [draw(st.sampled_from([0.5, 1.0, 1.7])) for _ in counts]
    sources = [
        (make_rows(count, packing, first), weight)
        for count, first, weight in zip(counts, firsts, weights, strict=False)
    ]
    options = {
        "seed": draw(st.integers(-3, 3)),
        "epochs": draw(st.sampled_from([None, 0.4, 1.0, 3.0])),
        "group_by_length": packing == "none" and draw(st.booleans()),
    }
    return sources, options


@given(
    made=loaders(), step=st.integers(0, 50), world_size=st.sampled_from([1, 2, 4]), micro_batch=st.sampled_from([1, 2])
)
def test_ranks_share_the_batch_of_a_single_process(made, step, world_size, micro_batch):
    sources, options = made
    alone = make_loader(sources, micro_batch=8, **options)
    step = step if alone.steps is None else step % alone.steps
    parts = [make_loader(sources, rank, world_size, micro_batch, **options) for rank in range(world_size)]
    windows = [loader.micro_batches(step) for loader in parts]
    rows = [row for row in alone.row_indices(step).tolist() if row != PADDING_ROW]
    for loader, window in zip(parts, windows, strict=True):
        # The number is equal on all ranks, and not larger than necessary.
        assert len(window) == -(-len(rows) // (world_size * micro_batch)) <= loader.gradient_accumulation
        assert all(tensor.shape == batch.input_ids.shape for batch in window for tensor in batch)
        # Every rank can compute these without communication.
        assert loader.steps == alone.steps
        assert loader.tokens(step) == alone.tokens(step)
        assert loader.loss_tokens(step) == alone.loss_tokens(step)
    dealt = [batch for micro_batches in zip(*windows, strict=True) for batch in micro_batches]
    assert all(len(batch.input_ids) == micro_batch for batch in dealt)
    # The order of the step is [accumulation][rank].
    assert [row for row in identities(dealt) if row != PADDING_ROW] == rows
    assert [row for row in identities(alone.micro_batches(step)) if row != PADDING_ROW] == rows
    assert sum(int((batch.labels != LABEL_IGNORE_INDEX).sum()) for batch in dealt) == alone.loss_tokens(step) > 0
    assert sum(int((batch.input_ids != 0).sum()) for batch in dealt) == alone.tokens(step)


@settings(deadline=None)
@given(made=loaders())
def test_any_step_alone_is_the_same_as_after_all_before_it(made):
    sources, options = made
    running = make_loader(sources, **options)
    steps = [running.micro_batches(step) for step in range(running.steps or 9)]
    for step in (len(steps) - 1, len(steps) // 2, 0):
        for before, now in zip(steps[step], make_loader(sources, **options).micro_batches(step), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@settings(deadline=None)
@given(made=loaders())
def test_epochs_take_every_row_as_often_as_its_weight_says(made):
    sources, options = made
    options["epochs"] = 6.0
    loader = make_loader(sources, **options)
    dealt = np.concatenate([loader.row_indices(step) for step in range(loader.steps)])
    assert len(dealt) == 8 * loader.steps
    times = Counter(dealt.tolist())
    assert times.pop(PADDING_ROW, 0) < 8, "only the last step is padded"
    assert PADDING_ROW not in dealt[:-8]
    first = 0
    for rows, weight in sources:
        assert {times.pop(row, 0) for row in range(first, first + len(rows))} <= {
            int(6 * weight),
            int(6 * weight) + (6 * weight % 1 > 0),
        }
        first += len(rows)
    assert not times
    assert loader.steps_to_epochs(loader.steps) == pytest.approx(6, abs=1 / loader.rows_per_epoch)


@given(count=st.integers(1, 30))
def test_steps_cross_the_ends_of_epochs(count):
    loader = make_loader([(make_rows(count, "best-fit"), 1.0)])
    assert loader.steps is None
    stream = np.concatenate([loader.row_indices(step) for step in range(count)])  # 8 epochs
    for epoch in range(8):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


@settings(deadline=None)
@given(made=loaders())
def test_grouping_by_length_trains_the_same_rows_in_an_epoch(made):
    sources, options = made
    assume(not sources[0][0].is_packed)
    epochs = [
        make_loader(sources, **options | {"epochs": 2.0, "group_by_length": grouped}) for grouped in (False, True)
    ]
    plain, grouped = (sorted(np.concatenate([e.row_indices(s) for s in range(e.steps)]).tolist()) for e in epochs)
    assert plain == grouped


def test_grouping_by_length_saves_padding_and_reports_it_correctly():
    sources = [(make_rows(400), 1.0)]
    paddings = {}
    for grouped in (False, True):
        loader = make_loader(sources, micro_batch=4, global_batch=8, epochs=1.0, group_by_length=grouped)
        batches = [batch for step in range(loader.steps) for batch in loader.micro_batches(step)]
        computed = sum(batch.input_ids.numel() for batch in batches)
        paddings[grouped] = loader.padding_fraction(loader.steps)
        assert paddings[grouped] == pytest.approx(1 - int(sources[0][0].row_tokens.sum()) / computed, abs=1e-9)
    # Lengths are padded to multiples of 16, so 8 of 64 are lost on average.
    assert paddings[True] < 0.22 < 0.29 < paddings[False]


def test_without_packing_micro_batches_hold_similar_lengths():
    loader = make_loader([(make_rows(64), 1.0)], rank=1, world_size=2, micro_batch=4, global_batch=32)
    lengths = [sorted((batch.input_ids != 0).sum(1).tolist()) for batch in loader.micro_batches(0)]
    assert len(lengths) == 4
    for longer, shorter in pairwise(lengths):
        assert longer[0] >= shorter[-1]
    assert [batch.input_ids.shape[1] for batch in loader.micro_batches(0)] == [-(-max(x) // 16) * 16 for x in lengths]


@pytest.mark.parametrize(
    ("global_batch", "world_size", "micro_batch", "remedy"),
    [
        (10, 4, 2, "10 is not a multiple of 8 (4 ranks x train.micro_batch: 2); use 8 or 16"),
        (2, 4, 1, "2 is not a multiple of 4 (4 ranks x train.micro_batch: 1); use 4"),
        (3, 1, 2, "3 is not a multiple of 2 (1 rank x train.micro_batch: 2); use 2 or 4"),
    ],
)
def test_batch_that_cannot_be_dealt_to_the_ranks(refusal, global_batch, world_size, micro_batch, remedy):
    with pytest.raises(UserError) as error:
        make_loader([(make_rows(3), 1.0)], 0, world_size, micro_batch, global_batch=global_batch)
    assert refusal(error.value) == f"train.global_batch: {remedy}"


def test_weights_that_leave_no_rows(refusal):
    with pytest.raises(UserError) as error:
        make_loader([(make_rows(3), 0.1), (make_rows(2), 0.2)])
    assert refusal(error.value) == "data.train: the weights leave 0.7 rows per epoch; raise one of them"


@given(
    count=st.integers(1, 20),
    world_size=st.sampled_from([1, 2, 4]),
    micro_batch=st.sampled_from([1, 2, 3]),
    packing=st.sampled_from(["best-fit", "none"]),
)
def test_evaluation_takes_each_row_once_and_as_many_batches_on_every_rank(count, world_size, micro_batch, packing):
    rows = make_rows(count, packing)
    parts = [
        eval_batches(rows, micro_batch=micro_batch, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {-(-count // (world_size * micro_batch))}
    batches = [batch for together in zip(*parts, strict=True) for batch in together]
    assert all(len(batch.input_ids) == micro_batch for batch in batches)
    dealt = identities(batches)
    assert sorted(dealt[:count]) == list(range(count))
    assert set(dealt[count:]) <= {PADDING_ROW}
    if packing == "best-fit":
        assert dealt[:count] == list(range(count))
    trained = [int(row) for batch in batches for row in (batch.labels != LABEL_IGNORE_INDEX).sum(1)]
    assert trained == [*rows.row_loss_tokens[dealt[:count]].tolist(), *[0] * (len(dealt) - count)]
