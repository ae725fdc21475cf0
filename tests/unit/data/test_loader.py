"""Batches are the windows that the sampler names, read from the file by other means here."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.data import loader
from dsv2_train.data.loader import Batch, Split, batches, open_split
from dsv2_train.data.manifest import DataError
from tests.helpers.corpus import synthetic_folder

LENGTH = 24
TRAIN_TOKENS = 2000
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "synthetic"
    return synthetic_folder(path, train_tokens=TRAIN_TOKENS, validation_tokens=500)


@pytest.fixture(scope="module")
def train(folder: Path) -> Split:
    return open_split(folder, "train", LENGTH, SEED)


def stream(folder: Path, split: str) -> list[int]:
    return [int(token) for token in np.fromfile(folder / f"{split}.bin", dtype=np.uint16)]


def one_by_one(split: Split, first: int, count: int) -> Iterator[Batch]:
    """The reference order: one rank, one sample a microbatch."""
    return batches(
        split,
        consumed_samples=first,
        num_microbatches=count,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    )


def rows(batch: Batch) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    return [
        (
            int(batch.sample_ids[row]),
            tuple(batch.tokens[row].tolist()),
            tuple(batch.labels[row].tolist()),
        )
        for row in range(len(batch.sample_ids))
    ]


def test_an_epoch_holds_every_token_of_the_stream_once(folder: Path, train: Split) -> None:
    tokens = stream(folder, "train")
    count = (TRAIN_TOKENS - 1) // LENGTH
    assert train.num_windows == count
    expected = sorted(tuple(tokens[i * LENGTH : (i + 1) * LENGTH]) for i in range(count))
    for epoch in range(2):
        epoch_rows = [rows(batch)[0] for batch in one_by_one(train, epoch * count, count)]
        assert sorted(row[1] for row in epoch_rows) == expected
        assert [row[0] for row in epoch_rows] == list(range(epoch * count, (epoch + 1) * count))


def test_labels_are_the_next_tokens_of_the_stream(folder: Path, train: Split) -> None:
    tokens = stream(folder, "train")
    spans = {tuple(tokens[i : i + LENGTH]): i for i in range(0, len(tokens), LENGTH)}
    for batch in one_by_one(train, 0, train.num_windows):
        ((_, window, labels),) = rows(batch)
        start = spans[window]
        assert list(labels) == tokens[start + 1 : start + 1 + LENGTH]


def test_validation_is_read_in_the_order_of_its_file(folder: Path) -> None:
    split = open_split(folder, "validation", LENGTH, SEED)
    tokens = stream(folder, "validation")
    found = [token for batch in one_by_one(split, 0, 5) for token in batch.tokens[0].tolist()]
    assert found == tokens[: 5 * LENGTH]


def test_batches_are_int64_and_contiguous(train: Split) -> None:
    (batch,) = batches(
        train, consumed_samples=0, num_microbatches=1, micro_batch_size=3, dp_rank=0, dp_size=1
    )
    for tensor, shape in (
        (batch.tokens, (3, LENGTH)),
        (batch.labels, (3, LENGTH)),
        (batch.sample_ids, (3,)),
    ):
        assert tensor.dtype.itemsize == 8
        assert not tensor.dtype.is_floating_point
        assert tensor.is_contiguous()
        assert tuple(tensor.shape) == shape


@given(data=st.data())
def test_the_run_sees_one_order_through_ramps_layouts_and_restarts(
    train: Split, data: st.DataObject
) -> None:
    consumed = first = data.draw(st.integers(0, 300))
    seen = []
    for _ in range(data.draw(st.integers(1, 4))):
        dp_size = data.draw(st.sampled_from([1, 2, 3]))
        micro_batch_size = data.draw(st.sampled_from([1, 2]))
        num_microbatches = data.draw(st.integers(1, 3))
        for rank in range(dp_size):
            for batch in batches(
                train,
                consumed_samples=consumed,
                num_microbatches=num_microbatches,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
            ):
                seen += rows(batch)
        consumed += dp_size * micro_batch_size * num_microbatches
    expected = [rows(batch)[0] for batch in one_by_one(train, first, consumed - first)]
    assert sorted(seen) == expected


def test_skipped_samples_are_not_seen_and_others_keep_their_ids(train: Split) -> None:
    skipping = replace(train, skip_list=((3, 5), (9, 10)))
    everything = [rows(batch)[0] for batch in one_by_one(train, 0, 12)]
    found = [rows(batch)[0] for batch in one_by_one(skipping, 0, 9)]
    assert found == [row for row in everything if row[0] not in (3, 4, 9)]


def test_another_seed_is_another_order(folder: Path, train: Split) -> None:
    other = open_split(folder, "train", LENGTH, SEED + 1)
    first = [rows(batch)[0] for batch in one_by_one(train, 0, 10)]
    second = [rows(batch)[0] for batch in one_by_one(other, 0, 10)]
    assert [row[1] for row in first] != [row[1] for row in second]


def test_a_stream_shorter_than_a_sample_is_refused(folder: Path) -> None:
    assert open_split(folder, "train", TRAIN_TOKENS - 1, SEED).num_windows == 1
    with pytest.raises(
        DataError, match=f"found {TRAIN_TOKENS} tokens, .* needs {TRAIN_TOKENS + 1}"
    ):
        open_split(folder, "train", TRAIN_TOKENS, SEED)


def test_a_truncated_stream_is_refused(tmp_path: Path) -> None:
    folder = synthetic_folder(tmp_path, train_tokens=100, validation_tokens=100)
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(150)
    with pytest.raises(DataError, match=r"train\.bin: found 150 bytes, the manifest says 200"):
        open_split(folder, "train", 8, 0)


def test_a_stream_cut_after_its_size_was_seen_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = synthetic_folder(tmp_path, train_tokens=100, validation_tokens=100)
    with (folder / "train.bin").open("r+b") as file:
        file.truncate(150)
    monkeypatch.setattr(loader, "size_problems", lambda *_: [])
    with pytest.raises(DataError, match=r"train\.bin: found 75 tokens, the manifest says 100"):
        open_split(folder, "train", 8, 0)


@given(num_tokens=st.integers(13, 200), length=st.integers(1, 12))
def test_windows_share_one_token_and_stay_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, length: int
) -> None:
    path = tmp_path_factory.mktemp("data")
    synthetic_folder(path, train_tokens=num_tokens, validation_tokens=50)
    tokens = stream(path, "train")
    count = (num_tokens - 1) // length
    expected = [tokens[i * length : (i + 1) * length + 1] for i in range(count)]
    assert open_split(path, "train", length, SEED).windows.tolist() == expected
