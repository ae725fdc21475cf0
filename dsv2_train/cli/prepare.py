"""`dsv2 prepare`: text -> a folder that a run trains on."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dsv2_train.cli.main import EXIT_FAILED
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.data.corpus import FORMATS, STDLIB
from dsv2_train.data.manifest import Manifest
from dsv2_train.data.parts import read_lengths
from dsv2_train.data.preprocess import SKIPPED_NAME, Request, prepare
from dsv2_train.data.tokenizer import BOS_TOKEN, EOS_TOKEN, MIN_VOCAB_SIZE

STDLIB_FOLDER = "data/stdlib"
_VOCAB_SIZE = 4096
_MAX_VALIDATION_SHARE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.description = (
        "Tokenize documents into megatron-core .bin/.idx files with a manifest. An interrupted run "
        "goes on where it stopped when the command is given again."
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=[STDLIB],
        help="folders and files, or 'stdlib', the standard library of this Python (default)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="tree: a file is a document; text: *.txt; jsonl: a line is one; auto: by suffix",
    )
    parser.add_argument("--text-field", default="text", help="key of the text in JSONL")
    parser.add_argument("--out", type=Path, help=f"folder to write (stdlib: {STDLIB_FOLDER})")
    parser.add_argument(
        "--vocab-size", type=int, help=f"tokens of the tokenizer to train (default {_VOCAB_SIZE})"
    )
    parser.add_argument("--tokenizer", type=Path, help="an existing tokenizer.json")
    parser.add_argument("--bos-token", default=BOS_TOKEN, help="token before each document")
    parser.add_argument("--eos-token", default=EOS_TOKEN, help="token after each document")
    parser.add_argument(
        "--validation-share", type=float, default=0.025, help="share of the documents held out"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the documents")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="tokenizing processes"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the verb out; exit status 0, or 1 where the same command, given again, goes on.

    Raises:
        ConfigError: with every argument that cannot be used.
        DataError: the corpus or the folder cannot be used.
    """
    if problems := list(_problems(args)):
        raise ConfigError(problems)
    folder = args.out or Path(STDLIB_FOLDER)
    try:
        with _ProgressBars() as bars:
            prepared = prepare(folder, _request(args), args.workers, bars.report)
    except OSError as error:
        print(f"dsv2 prepare: {error}; run the command again to go on", file=sys.stderr)
        return EXIT_FAILED
    print(f"{folder}: {'written' if prepared.is_new else 'complete already, nothing to do'}")
    _print_contents(folder, prepared.manifest)
    return 0


class _ProgressBars:
    """One bar per stage of the work, on stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:24}"), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_ProgressBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage to `done` of `total`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)


def _problems(args: argparse.Namespace) -> Iterator[Problem]:
    if args.out is None and args.source != [STDLIB]:
        yield Problem("--out", None, "required with a --source of your own")
    if args.tokenizer is not None and args.vocab_size is not None:
        allowed = "--tokenizer brings its own; give one of the two"
        yield Problem("--vocab-size", args.vocab_size, allowed)
    if args.vocab_size is not None and args.vocab_size < MIN_VOCAB_SIZE:
        allowed = f"must be at least {MIN_VOCAB_SIZE}: the bytes, begin and end of sentence"
        yield Problem("--vocab-size", args.vocab_size, allowed)
    if not 0 < args.validation_share <= _MAX_VALIDATION_SHARE:
        allowed = f"must be above 0 and at most {_MAX_VALIDATION_SHARE}"
        yield Problem("--validation-share", args.validation_share, allowed)
    if args.seed < 0:
        yield Problem("--seed", args.seed, "must not be negative")
    if args.workers < 1:
        yield Problem("--workers", args.workers, "must be at least 1")


def _request(args: argparse.Namespace) -> Request:
    vocab_size = args.vocab_size or _VOCAB_SIZE
    return Request(
        sources=tuple(args.source),
        file_format=args.format,
        text_field=args.text_field,
        tokenizer=args.tokenizer,
        vocab_size=None if args.tokenizer is not None else vocab_size,
        bos_token=args.bos_token,
        eos_token=args.eos_token,
        validation_share=args.validation_share,
        seed=args.seed,
    )


def _print_contents(folder: Path, manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        longest = read_lengths(folder, split).max(initial=0)
        print(
            f"  {name:<12}{split.num_documents:>12,} documents {split.num_tokens:>16,} tokens"
            f"  {split.text_bytes / 1e6:,.2f} MB of text, longest document {longest:,} tokens"
        )
    train = manifest.splits["train"]
    rows = manifest.tokenizer.vocab_size
    ratio = train.text_bytes / train.num_tokens
    print(f"  {'tokenizer':<12}{rows:>12,} tokens    {ratio:>16.2f} bytes of text a token")
    if manifest.skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
        print(f"  {'not used':<12}{counts} (listed in {folder / SKIPPED_NAME})")
    print(f"Train on it with: data.path={folder} model.vocab_size={rows}")
    print("Samples and unused tokens depend on recipe.sequence_length: dsv2 validate tells them")
