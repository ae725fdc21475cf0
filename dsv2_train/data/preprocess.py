"""Source -> data folder: list, train or load a tokenizer, tokenize in parallel, merge, describe.

Work in progress is in `<folder>/parts/`. A run that was killed goes on from the parts that are done
and ends with the same bytes; the manifest is written last, and then `parts/` is removed. A run that
was refused leaves nothing behind that the corrected command would go on from.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv2_train.data import parts as part_files
from dsv2_train.data.corpus import (
    STDLIB,
    Format,
    Listing,
    Skipped,
    UnusableDocument,
    find_fault,
    list_documents,
    read_text,
)
from dsv2_train.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    DataError,
    Manifest,
    TokenizerRecord,
    describe_file,
    read_manifest,
    size_problems,
    write_manifest,
)
from dsv2_train.data.parts import Encoding, Part
from dsv2_train.data.tokenizer import (
    load_tokenizer,
    num_rows,
    special_token_id,
    train_tokenizer,
)

TOKENIZER_NAME = "tokenizer.json"
SKIPPED_NAME = "skipped.jsonl"
_WORK_NAME = "parts"
_PLAN_NAME = "plan.json"
_OUTPUT_NAMES = (
    TOKENIZER_NAME,
    *(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")),
)
_TOKENIZER_SAMPLE_BYTES = 1 << 29

Report = Callable[[str, int, int], None]
"""Told (stage, bytes done, bytes in all) as the work goes on."""


@dataclass(frozen=True)
class Request:
    """What a data folder is made from; everything that decides its bytes.

    Attributes:
        sources: `stdlib`, folders, files.
        file_format: how files become documents, see `corpus.list_documents`.
        text_field: key of the text in JSONL.
        tokenizer: an existing tokenizer.json; None trains one.
        vocab_size: tokens of a trained tokenizer, None with an existing one.
        bos_token: prepended to each document.
        eos_token: appended to each document.
        validation_share: share of the documents kept for validation.
        seed: seed of the order of documents.
    """

    sources: tuple[str, ...]
    file_format: Format
    text_field: str
    tokenizer: Path | None
    vocab_size: int | None
    bos_token: str
    eos_token: str
    validation_share: float
    seed: int

    def identity(self) -> dict[str, Any]:
        """The request as plain values that compare: absolute paths, the tokenizer by its hash."""
        values = asdict(self)
        values["sources"] = [s if s == STDLIB else str(Path(s).resolve()) for s in self.sources]
        if self.tokenizer is not None:
            load_tokenizer(self.tokenizer)
            values["tokenizer"] = f"sha256 {describe_file(self.tokenizer).sha256}"
        return values


@dataclass(frozen=True)
class Prepared:
    """A complete folder; `is_new` is False if there was nothing left to do."""

    manifest: Manifest
    is_new: bool


def prepare(folder: Path, request: Request, num_workers: int, report: Report) -> Prepared:
    """Write a data folder, finish one that was interrupted, or find it complete.

    Args:
        folder: where to; made if missing.
        request: what from.
        num_workers: processes that tokenize; the result does not depend on it.
        report: told of progress.

    Raises:
        DataError: nothing to train on, a folder made from something else, files changed since, or
            another process is writing the folder.
        OSError: a file cannot be read or written, or a process was killed; given again, the same
            request goes on.
    """
    work = folder / _WORK_NAME
    identity = request.identity()
    complete = _find_complete(folder, identity)
    if complete is not None:
        shutil.rmtree(work, ignore_errors=True)
        return Prepared(complete, is_new=False)
    listing = list_documents(request.sources, request.file_format)
    planned = part_files.plan_parts(
        listing.documents,
        request.validation_share,
        request.seed,
        partial(find_fault, text_field=request.text_field),
    )
    _refuse_foreign(folder)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(folder, identity, listing)
        with _undone_if_refused(folder):
            tokenizer = _tokenizer(folder, request, planned, report)
            dtype = part_files.token_dtype(tokenizer.vocab_size)
            encoding = Encoding(
                folder / TOKENIZER_NAME,
                tokenizer.bos_id,
                tokenizer.eos_id,
                dtype,
                request.text_field,
            )
            _tokenize(planned, work, encoding, num_workers, report)
            merged = {
                split: part_files.merge(
                    [part for part in planned if part.split == split], work, folder, dtype
                )
                for split in SPLITS
            }
        skipped = listing.skipped + [entry for each in merged.values() for entry in each.skipped]
        manifest = Manifest(
            source=listing.description,
            arguments=identity,
            tokenizer=tokenizer,
            splits={split: each.record for split, each in merged.items()},
            skipped=_write_skipped(folder, skipped),
        )
        write_manifest(folder, manifest)
        shutil.rmtree(work)
    return Prepared(manifest, is_new=True)


def _find_complete(folder: Path, identity: dict[str, Any]) -> Manifest | None:
    if not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    _refuse_other(folder, manifest.arguments, identity)
    if problems := size_problems(folder, manifest):
        raise DataError(f"{'; '.join(problems)}; delete {folder} and run the command again")
    return manifest


def _refuse_other(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    different = [key for key in asked if found.get(key) != asked[key]]
    if different:
        changes = ", ".join(f"{key} {found.get(key)!r}, not {asked[key]!r}" for key in different)
        raise DataError(
            f"--out {folder}: was made with {changes}; give another --out, or delete {folder}"
        )


def _refuse_foreign(folder: Path) -> None:
    """Never write over files that this program did not write."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: found a file; give a folder")
    work = folder / _WORK_NAME
    if (folder / MANIFEST_NAME).exists() or (work / _PLAN_NAME).exists():
        return
    present = [name for name in _OUTPUT_NAMES if (folder / name).exists()]
    if any(path.suffix != ".tmp" for path in work.glob("*")):
        present.append(f"{_WORK_NAME}/")
    if present:
        raise DataError(
            f"--out {folder}: holds {', '.join(present)} but no {MANIFEST_NAME}, so dsv2 prepare "
            "did not write them; give another --out, or move them away"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One prepare per folder; the lock goes with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"--out {folder}: another dsv2 prepare is writing it") from error
    finally:
        os.close(descriptor)


@contextmanager
def _undone_if_refused(folder: Path) -> Iterator[None]:
    """Remove what was written so far if the request turns out to be one that cannot be met."""
    try:
        yield
    except DataError:
        for name in _OUTPUT_NAMES:
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        shutil.rmtree(folder / _WORK_NAME)
        raise


def _claim(folder: Path, identity: dict[str, Any], listing: Listing) -> None:
    """Record what the folder is made from; refuse to go on with parts made from anything else."""
    digest = hashlib.sha256()
    for document in listing.documents:
        modified_ns = document.path.stat().st_mtime_ns
        line = f"{document.name}\n{document.num_bytes}\n{modified_ns}\n"
        digest.update(line.encode(errors="replace"))
    plan = {"arguments": identity, "corpus": digest.hexdigest()}
    path = folder / _WORK_NAME / _PLAN_NAME
    if path.exists():
        found = json.loads(path.read_bytes())
        _refuse_other(folder, found["arguments"], identity)
        if found["corpus"] != plan["corpus"]:
            raise DataError(
                f"--out {folder}: the source changed since an interrupted dsv2 prepare; "
                f"delete {folder} and run the command again"
            )
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plan))
    temporary.replace(path)


def _tokenizer(
    folder: Path, request: Request, planned: Sequence[Part], report: Report
) -> TokenizerRecord:
    path = folder / TOKENIZER_NAME
    if not path.exists():
        temporary = path.with_name(f"{TOKENIZER_NAME}.tmp")
        if request.tokenizer is not None:
            shutil.copyfile(request.tokenizer, temporary)
        else:
            assert request.vocab_size is not None
            texts = _sample(planned, request.text_field, report)
            train_tokenizer(texts, request.vocab_size).save(str(temporary))
        temporary.replace(path)
    tokenizer = load_tokenizer(path)
    return TokenizerRecord(
        file=describe_file(path),
        vocab_size=num_rows(tokenizer),
        bos_id=special_token_id(tokenizer, request.bos_token),
        eos_id=special_token_id(tokenizer, request.eos_token),
    )


def _sample(planned: Sequence[Part], text_field: str, report: Report) -> Iterator[str]:
    """Train documents in shuffled order, up to what a tokenizer needs to see."""
    documents = [d for part in planned if part.split == "train" for d in part.documents]
    total = min(sum(document.num_bytes for document in documents), _TOKENIZER_SAMPLE_BYTES)
    done = 0
    for document in documents:
        if done >= total:
            return
        try:
            yield read_text(document, text_field)
        except UnusableDocument:
            continue
        finally:
            done += document.num_bytes
            report("training the tokenizer", min(done, total), total)


def _tokenize(
    planned: Sequence[Part], work: Path, encoding: Encoding, num_workers: int, report: Report
) -> None:
    missing = [part for part in planned if not part_files.is_done(part, work)]
    total = sum(part.num_bytes for part in planned)
    done = total - sum(part.num_bytes for part in missing)
    report("tokenizing", done, total)
    for num_bytes in _run(missing, work, encoding, min(num_workers, len(missing))):
        done += num_bytes
        report("tokenizing", done, total)


def _run(
    missing: Sequence[Part], work: Path, encoding: Encoding, num_workers: int
) -> Iterator[int]:
    if num_workers <= 1:
        for part in missing:
            yield part_files.tokenize_part(part, work, encoding)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker) as pool:
        jobs = [pool.submit(part_files.tokenize_part, part, work, encoding) for part in missing]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a tokenizing process was killed, most likely for want of memory: give fewer "
                "--workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_skipped(folder: Path, skipped: Sequence[Skipped]) -> dict[str, int]:
    lines = [json.dumps(asdict(entry)) + "\n" for entry in skipped]
    temporary = folder / f"{SKIPPED_NAME}.tmp"
    temporary.write_text("".join(lines))
    temporary.replace(folder / SKIPPED_NAME)
    return dict(sorted(Counter(entry.reason for entry in skipped).items()))
