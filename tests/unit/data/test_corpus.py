"""Documents are found, decoded, or skipped with a reason; nothing is lost in silence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsv2_train.data.corpus import (
    Document,
    Format,
    Skipped,
    UnusableDocument,
    list_documents,
    read_text,
)
from dsv2_train.data.manifest import DataError


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def names(source: str, file_format: Format = "auto") -> list[str]:
    return sorted(document.name for document in list_documents([source], file_format).documents)


def only(source: str, file_format: Format = "auto") -> Document:
    (document,) = list_documents([source], file_format).documents
    return document


def why_unusable(content: bytes, folder: Path, name: str = "a.txt") -> tuple[str, str]:
    write(folder, {name: content})
    with pytest.raises(UnusableDocument) as raised:
        read_text(only(str(folder)), "text")
    return raised.value.skipped.reason, raised.value.skipped.found


FILES = {
    "a.txt": b"one",
    "src/b.py": b"two",
    "src/deep/c.txt": b"three",
    "lines.jsonl": b'{"text": "four"}\n\n{"text": "five"}',
}


@pytest.mark.parametrize(
    ("file_format", "expected", "blank", "others"),
    [
        ("tree", ["a.txt", "lines.jsonl", "src/b.py", "src/deep/c.txt"], [], []),
        ("text", ["a.txt", "src/deep/c.txt"], [], ["lines.jsonl", "src/b.py"]),
        (
            "jsonl",
            ["lines.jsonl:1", "lines.jsonl:3"],
            ["lines.jsonl:2"],
            ["a.txt", "src/b.py", "src/deep/c.txt"],
        ),
        (
            "auto",
            ["a.txt", "lines.jsonl:1", "lines.jsonl:3", "src/b.py", "src/deep/c.txt"],
            ["lines.jsonl:2"],
            [],
        ),
    ],
)
def test_each_format_finds_its_documents_and_lists_the_rest(
    tmp_path: Path, file_format: Format, expected: list[str], blank: list[str], others: list[str]
) -> None:
    source = write(tmp_path, FILES)
    assert names(source, file_format) == expected
    assert sorted(
        (entry.name, entry.reason) for entry in list_documents([source], file_format).skipped
    ) == sorted(
        [(name, "blank line") for name in blank] + [(name, "other suffix") for name in others]
    )


def test_jsonl_lines_are_read_from_their_place(tmp_path: Path) -> None:
    texts = ["caf\u00e9", "line\nbreak", "\u6f22\u5b57", 'quote "', "last"]
    lines = [
        json.dumps({"id": 1, "body": text}, ensure_ascii=bool(i % 2))
        for i, text in enumerate(texts)
    ]
    source = write(tmp_path, {"x.jsonl": b"\xef\xbb\xbf" + "\r\n".join(lines).encode()})
    documents = list_documents([source], "jsonl").documents
    assert [read_text(document, "body") for document in documents] == texts


def test_several_sources_keep_their_names_apart(tmp_path: Path) -> None:
    files = [{"a.txt": name, ".hidden": b""} for name in (b"x", b"y")]
    sources = [write(tmp_path / each["a.txt"].decode(), each) for each in files]
    listing = list_documents(sources, "tree")
    documents = listing.documents
    assert [entry.name for entry in listing.skipped] == ["x/.hidden", "y/.hidden"]
    assert [document.name for document in documents] == ["x/a.txt", "y/a.txt"]
    assert [read_text(document, "text") for document in documents] == ["x", "y"]


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    reason, found = why_unusable("caf\u00e9".encode("latin-1"), tmp_path)
    assert (reason, found) == ("not UTF-8", "byte 0xe9 at offset 3")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"MZ\0\1", "binary"),
        ("text".encode("utf-16"), "not UTF-8"),
        (b"truncated \xe6\xbc", "not UTF-8"),
    ],
)
def test_unusable_files_say_why(tmp_path: Path, content: bytes, reason: str) -> None:
    assert why_unusable(content, tmp_path)[0] == reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'{"txt": "x"}', "no string field 'text'"),
        (b'{"text": 7}', "no string field 'text'"),
        (b'["text"]', "no string field 'text'"),
        (b'{"text": ""}', "empty"),
        (b'{"text": "\xe9"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_unusable_lines_say_why(tmp_path: Path, line: bytes, reason: str) -> None:
    assert why_unusable(line + b"\n", tmp_path, "x.jsonl")[0] == reason


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": b"\xef\xbb\xbfabc"})
    assert read_text(only(source), "text") == "abc"


def test_hidden_files_links_and_pipes_are_listed_as_skipped(tmp_path: Path) -> None:
    files = {"a.txt": b"a", ".git/HEAD": b"h", "src/.env": b"e", "src/__pycache__/m.pyc": b"p"}
    source = write(tmp_path / "tree", files)
    write(tmp_path, {"outside/b.txt": b"b"})
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree", target_is_directory=True)
    (tmp_path / "tree" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tree" / "b.txt").symlink_to(tmp_path / "outside" / "b.txt")
    os.mkfifo(tmp_path / "tree" / "pipe")
    listing = list_documents([source], "tree")
    assert sorted(document.name for document in listing.documents) == ["a.txt", "b.txt"]
    assert sorted((entry.name, entry.reason) for entry in listing.skipped) == [
        (".git", "hidden"),
        ("dangling", "not a file"),
        ("loop", "not a file"),
        ("pipe", "not a file"),
        ("src/.env", "hidden"),
        ("src/__pycache__", "hidden"),
    ]


def test_a_folder_that_cannot_be_read_is_listed_as_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, FILES)
    original = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_documents([source], "tree")
    assert sorted(document.name for document in listing.documents) == [
        "a.txt",
        "lines.jsonl",
        "src/b.py",
    ]
    assert listing.skipped == [Skipped("src/deep", "unreadable folder", "Permission denied")]


def test_the_standard_library_comes_without_its_tests() -> None:
    listing = list_documents(["stdlib"], "auto")
    found = {document.name for document in listing.documents}
    assert {"argparse.py", "json/decoder.py"} <= found
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in found)
    assert "stdlib of Python 3" in listing.description
    # 12.1 MB on 3.11; other versions and packagings differ by a few MB
    assert 8e6 < sum(document.num_bytes for document in listing.documents) < 20e6


@pytest.mark.parametrize("file_format", ["tree", "text", "jsonl", "auto"])
def test_a_corpus_without_documents_is_an_error(tmp_path: Path, file_format: Format) -> None:
    source = write(tmp_path, {".hidden": b"x"})
    with pytest.raises(DataError, match=r"found no document in .*1 skipped, the first: \.hidden"):
        list_documents([source], file_format)


def test_a_source_that_is_missing_or_misread_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list_documents([str(tmp_path / "none")], "auto")
    write(tmp_path, {"a.txt": b"x"})
    with pytest.raises(DataError, match="--format tree needs a folder"):
        list_documents([str(tmp_path / "a.txt")], "tree")
