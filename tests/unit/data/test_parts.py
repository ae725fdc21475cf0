"""The plan of parts, and .bin/.idx against megatron-core's own writer and reader."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from dsv2_train.data.corpus import Document, Skipped
from dsv2_train.data.manifest import DataError, FileRecord, SplitRecord
from dsv2_train.data.parts import plan_parts, read_lengths, token_dtype, write_index

NAMES = st.lists(st.text("abc/.", min_size=1), min_size=2, max_size=60, unique=True)


def documents_named(names: list[str], num_bytes: int = 10) -> list[Document]:
    return [Document(name, Path(name), 0, num_bytes, is_json=False) for name in names]


def fine(_: Document) -> Skipped | None:
    return None


def planned_names(
    documents: list[Document],
    share: float = 0.2,
    seed: int = 0,
    fault_of: Callable[[Document], Skipped | None] = fine,
) -> dict[str, list[str]]:
    parts = plan_parts(documents, share, seed, fault_of)
    return {
        split: [d.name for part in parts if part.split == split for d in part.documents]
        for split in ("train", "validation")
    }


@given(names=NAMES, share=st.floats(0.01, 0.5), seed=st.integers(0, 5))
def test_every_document_is_in_one_split_whatever_the_listing_order(
    names: list[str], share: float, seed: int
) -> None:
    planned = planned_names(documents_named(names), share, seed)
    assert sorted(planned["train"] + planned["validation"]) == sorted(names)
    assert all(planned.values())
    assert planned_names(documents_named(names[::-1]), share, seed) == planned


def test_a_new_document_moves_no_other_one() -> None:
    names = [f"file{index}" for index in range(300)]
    before = planned_names(documents_named(names))
    after = planned_names(documents_named([*names, "another"]))
    for split in before:
        assert [name for name in after[split] if name != "another"] == before[split]


def test_the_seed_shuffles_and_does_not_choose_the_split() -> None:
    names = [f"file{index}" for index in range(300)]
    one, other = (planned_names(documents_named(names), seed=seed) for seed in (0, 1))
    assert one["train"] != other["train"]
    assert set(one["validation"]) == set(other["validation"])
    assert one["train"] != sorted(one["train"])
    # 300 draws at 0.2: standard deviation 7
    assert abs(len(one["validation"]) - 60) < 35


def test_parts_hold_a_mebibyte_or_more() -> None:
    documents = documents_named([f"file{index}" for index in range(100)], num_bytes=100_000)
    sizes = [
        part.num_bytes for part in plan_parts(documents, 0.1, 0, fine) if part.split == "train"
    ]
    assert len(sizes) > 5
    assert all(1 << 20 <= size < (1 << 20) + 100_000 for size in sizes[:-1])


@given(names=NAMES, share=st.floats(0.01, 0.5), data=st.data())
def test_each_split_has_text_whatever_is_unusable(
    names: list[str], share: float, data: st.DataObject
) -> None:
    usable = set(data.draw(st.lists(st.sampled_from(names), min_size=2, unique=True)))
    asked = []

    def fault_of(document: Document) -> Skipped | None:
        asked.append(document.name)
        return None if document.name in usable else Skipped(document.name, "empty", "no text")

    planned = planned_names(documents_named(names), share, fault_of=fault_of)
    assert sorted(planned["train"] + planned["validation"]) == sorted(names)
    assert all(usable & set(split) for split in planned.values())
    as_if_all_were_fine = planned_names(documents_named(names), share)
    if all(usable & set(split) for split in as_if_all_were_fine.values()):
        assert planned == as_if_all_were_fine
    assert len(asked) <= 2 + 2 * (len(names) - len(usable))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"a": None}, r"found 1 document with text \(not used: none\); at least 2"),
        ({"a": "empty", "b": None}, r"found 1 document with text \(not used: 1 empty\)"),
        (
            {"a": "empty", "b": "binary", "c": "empty"},
            r"found no document with text \(not used: 1 binary, 2 empty\)",
        ),
    ],
)
def test_less_than_two_documents_with_text_cannot_be_split(
    faults: dict[str, str | None], message: str
) -> None:
    def fault_of(document: Document) -> Skipped | None:
        reason = faults[document.name]
        return None if reason is None else Skipped(document.name, reason, "")

    with pytest.raises(DataError, match=message):
        plan_parts(documents_named(list(faults)), 0.1, 0, fault_of)


@given(vocab_size=st.integers(1, 200_000))
def test_the_token_type_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size).__name__


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_are_those_of_megatrons_builder(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, size=size).astype(dtype) for size in (3, 1, 5000, 7)]
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), getattr(np, dtype))
    for document in documents:
        theirs.add_document(document, [document.size])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    np.concatenate(documents).tofile(tmp_path / "ours.bin")
    write_index(tmp_path / "ours.idx", [document.size for document in documents], dtype)
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"ours.{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()
    files = [FileRecord(f"ours.{suffix}", 0, "") for suffix in ("bin", "idx")]
    record = SplitRecord(files[0], files[1], dtype, len(documents), 0, 0)
    assert read_lengths(tmp_path, record).tolist() == [3, 1, 5000, 7]
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(documents)
    for found, expected in zip(read, documents, strict=True):
        np.testing.assert_array_equal(found, expected)
