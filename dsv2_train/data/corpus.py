"""Where documents come from: source trees, text files, JSONL, the standard library of Python.

A document is listed first (its name, and where its bytes are) and read later, by whichever process
tokenizes it. What cannot be used is never dropped in silence: it becomes a `Skipped` record, which
`dsv2 prepare` counts in the manifest and lists in skipped.jsonl. Text is UTF-8; bytes that are not
are skipped, because a guessed encoding would train on garbled text without anybody noticing.

A further format is a lister (path -> documents) in `_documents_of` and, if its documents are no
byte ranges of a file, a reader beside `_json_text`. The listing holds one small record per document
in memory.
"""

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dsv2_train.data.manifest import DataError

Format = Literal["auto", "tree", "text", "jsonl"]
FORMATS: tuple[str, ...] = get_args(Format)
STDLIB = "stdlib"
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a whole file, or one line of a JSONL file.

    Attributes:
        name: stable name, path relative to its source (and `:line` in JSONL); decides its split.
        path: the file that holds it.
        offset: first byte in the file.
        num_bytes: bytes in the file (of the JSON line, in JSONL).
        is_json: the bytes are a JSON object with a text field.
    """

    name: str
    path: Path
    offset: int
    num_bytes: int
    is_json: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something found in a source and not used: a short reason, and what exactly was found."""

    name: str
    reason: str
    found: str


@dataclass(frozen=True)
class Listing:
    """All documents of a corpus, unread, and what was already found unusable."""

    documents: list[Document]
    skipped: list[Skipped]
    description: str


class UnusableDocument(Exception):
    """A document has no text to train on; carries the record of it."""

    def __init__(self, document: Document, reason: str, found: str) -> None:
        self.skipped = Skipped(document.name, reason, found)
        super().__init__(f"{document.name}: {reason}, {found}")


def list_documents(sources: Sequence[str], file_format: Format) -> Listing:
    """List the documents of `stdlib`, folders and files.

    Formats: `tree` takes every file below a folder as a document; `text` the files given, and the
    *.txt files below folders given; `jsonl` makes each line of the files given, and of the *.jsonl
    files below folders given, a document; `auto` takes every file, a *.jsonl file by line. Hidden
    files and folders are skipped, and links to folders are not followed.

    Raises:
        DataError: a source is missing, does not fit the format, or holds no document.
    """
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for source in sources:
        prefix = f"{Path(source).name}/" if len(sources) > 1 else ""
        unused: list[Skipped] = []
        for path, name in _files_of(source, file_format, unused):
            documents += _documents_of(path, prefix + name, file_format, skipped)
        skipped += [replace(entry, name=prefix + entry.name) for entry in unused]
    if not documents:
        left_out = f" ({len(skipped)} skipped, the first: {skipped[0].name})" if skipped else ""
        raise DataError(
            f"--source: found no document in {', '.join(sources)} with --format {file_format}"
            f"{left_out}; give a folder or file with text"
        )
    named = [f"{s} of Python {platform.python_version()}" if s == STDLIB else s for s in sources]
    return Listing(documents, skipped, ", ".join(named))


def read_text(document: Document, text_field: str) -> str:
    """Read and decode a document; a leading byte order mark is not text.

    Args:
        document: what to read.
        text_field: key of the text in a JSON document.

    Raises:
        UnusableDocument: it is empty, binary, not UTF-8, not JSON or lacks the field.
    """
    with document.path.open("rb") as file:
        file.seek(document.offset)
        content = file.read(document.num_bytes)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {document.offset + error.start}"
        raise UnusableDocument(document, "not UTF-8", found) from error
    if document.is_json:
        text = _json_text(document, text, text_field)
    elif "\0" in text:
        raise UnusableDocument(document, "binary", "a zero byte")
    if not text:
        raise UnusableDocument(document, "empty", "no text")
    return text


def find_fault(document: Document, text_field: str) -> Skipped | None:
    """Why a document cannot be used, None if it can; reads it as `read_text` does."""
    try:
        read_text(document, text_field)
    except UnusableDocument as error:
        return error.skipped
    return None


def _json_text(document: Document, line: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UnusableDocument(document, "not JSON", str(error)) from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"keys {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
        raise UnusableDocument(document, f"no string field {text_field!r}", found)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair at character {error.start}"
        raise UnusableDocument(document, "not UTF-8", found) from error
    return text


def _files_of(
    source: str, file_format: Format, skipped: list[Skipped]
) -> Iterator[tuple[Path, str]]:
    """Files of one source with their names, in a fixed order."""
    if source == STDLIB:
        yield from _stdlib_files()
        return
    root = Path(source)
    if root.is_file():
        if file_format == "tree":
            raise DataError(f"--source {source}: found a file; --format tree needs a folder")
        yield root, root.name
    elif root.is_dir():
        suffix = {"text": ".txt", "jsonl": ".jsonl"}.get(file_format, "")
        for path in _walk(root, skipped):
            name = path.relative_to(root).as_posix()
            if name.endswith(suffix):
                yield path, name
            else:
                skipped.append(Skipped(name, "other suffix", f"a name without {suffix}"))
    else:
        raise DataError(f"--source {source}: no such file or folder (or give {STDLIB!r})")


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[Path]:
    def skip(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        skipped.append(Skipped(name, "unreadable folder", str(error.strerror)))

    for folder, folder_names, file_names in os.walk(root, onerror=skip):
        kept_folders = []
        for name in sorted(folder_names + file_names):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if name.startswith(".") or name == "__pycache__":
                skipped.append(Skipped(relative, "hidden", "a name that starts with . or a cache"))
            elif path.is_file():
                yield path
            elif path.is_dir() and not path.is_symlink():
                kept_folders.append(name)
            else:
                found = "a link" if path.is_symlink() else "a device, pipe or socket"
                skipped.append(Skipped(relative, "not a file", found))
        folder_names[:] = kept_folders


def _stdlib_files() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folder_names, file_names in os.walk(root):
        folder_names[:] = sorted(set(folder_names) - _STDLIB_LEFT_OUT)
        for name in sorted(file_names):
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path, path.relative_to(root).as_posix()


def _documents_of(
    path: Path, name: str, file_format: Format, skipped: list[Skipped]
) -> Iterator[Document]:
    is_jsonl = file_format == "jsonl" or (file_format == "auto" and path.suffix == ".jsonl")
    if not is_jsonl:
        yield Document(name, path, 0, path.stat().st_size, is_json=False)
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Document(f"{name}:{number}", path, offset, len(line), is_json=True)
            else:
                skipped.append(Skipped(f"{name}:{number}", "blank line", "white space alone"))
            offset += len(line)
