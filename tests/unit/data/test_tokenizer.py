"""The byte-level BPE: lossless, with the classes of facts 4.2 kept apart."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dsv2_train.data.manifest import DataError
from dsv2_train.data.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    MIN_VOCAB_SIZE,
    encode_document,
    load_tokenizer,
    num_rows,
    special_token_id,
    train_tokenizer,
)

TRAINING = [
    "the year 2024, line\n\nthe year 2025; \u6f22\u5b57 and \u304b\u306a\n\tx = y + 12\n"
] * 50
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TRAINING, 400).save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    tokens = encode_document(tokenizer, text, BOS, EOS, "uint16")
    assert tokens.dtype == np.uint16
    assert (tokens[0], tokens[-1]) == (BOS, EOS)
    return [int(token) for token in tokens[1:-1]]


TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t09.,\u6f22\u3042"))
)


@given(text=TEXTS)
def test_decoding_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert BOS not in ids
    assert EOS not in ids


def bytes_of(tokenizer: Tokenizer) -> list[str]:
    """Text of each merged token, with tokens that are part of a character left out."""
    texts = [
        tokenizer.decode([index], skip_special_tokens=False)
        for index in range(2, num_rows(tokenizer))
    ]
    return [text for text in texts if "\ufffd" not in text and len(text) > 1]


def test_no_token_joins_classes(tokenizer: Tokenizer) -> None:
    merged = bytes_of(tokenizer)
    assert {" year", "the", "\u6f22\u5b57"} <= set(merged)
    for text in merged:
        assert not any(character.isnumeric() for character in text), text
        assert not set(text) & set("\r\n"), text
        body = text.lstrip()
        is_cjk = [character >= "\u3000" for character in body]
        assert all(is_cjk) or not any(is_cjk), text
        is_letter = [character.isalpha() for character in body]
        assert all(is_letter) or not any(is_letter), text


def test_numbers_are_single_digits_and_newlines_single_tokens(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "2024\n\n\n2024")
    assert [tokenizer.decode([index]) for index in ids] == [*"2024", "\n", "\n", "\n", *"2024"]


def test_special_tokens_in_a_document_are_text(tokenizer: Tokenizer) -> None:
    text = f"a{EOS_TOKEN}b{BOS_TOKEN}"
    ids = encode(tokenizer, text)
    assert not {BOS, EOS} & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_twice_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    train_tokenizer(iter(TRAINING), 400).save(str(again))
    assert again.read_bytes() == path.read_bytes()


def test_the_smallest_vocabulary_is_the_bytes_and_two_special_tokens() -> None:
    tokenizer = train_tokenizer(TRAINING, MIN_VOCAB_SIZE)
    assert num_rows(tokenizer) == MIN_VOCAB_SIZE
    assert len(encode(tokenizer, "ab\u00e9")) == 4
    assert special_token_id(tokenizer, BOS_TOKEN) == BOS
    assert special_token_id(tokenizer, EOS_TOKEN) == EOS


def test_a_corpus_with_few_pairs_yields_fewer_tokens() -> None:
    assert MIN_VOCAB_SIZE < num_rows(train_tokenizer(["abcd abcd"], 4096)) < 270


def test_truncation_and_padding_of_a_given_tokenizer_are_turned_off(
    path: Path, tmp_path: Path
) -> None:
    given_tokenizer = Tokenizer.from_file(str(path))
    given_tokenizer.enable_truncation(4)
    given_tokenizer.enable_padding(length=64)
    given_tokenizer.save(str(tmp_path / "given.json"))
    text = "the year 2024 " * 20
    assert encode(load_tokenizer(tmp_path / "given.json"), text) == encode(
        load_tokenizer(path), text
    )


def test_tokenizers_that_cannot_be_used_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"no token '<s>'.*begin"):
        special_token_id(load_tokenizer(path), "<s>")


def test_rows_are_counted_from_the_largest_id(path: Path, tmp_path: Path) -> None:
    text = path.read_text().replace(f'"id": {EOS},', '"id": 5000,')
    text = text.replace(f'{EOS_TOKEN}": {EOS},', f'{EOS_TOKEN}": 5000,')
    (tmp_path / "gap.json").write_text(text)
    tokenizer = load_tokenizer(tmp_path / "gap.json")
    assert num_rows(tokenizer) == 5001
    assert tokenizer.get_vocab_size() == num_rows(load_tokenizer(path))
