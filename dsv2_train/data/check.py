"""Whether a run can train on its data folder, told before any rank starts; no torch."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dsv2_train.config.problems import Problem, passing_over_absent
from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Absent
from dsv2_train.data.manifest import (
    DataError,
    Manifest,
    file_problems,
    how_to_restore,
    read_manifest,
    size_problems,
)
from dsv2_train.data.sampler import num_windows

# Rows past the tokenizer's ids are never targets; DeepSeek pads 100,015 to 102,400.
MAX_PADDING_SHARE = 0.1
# About a third of a second of SHA-256; the ranks and `dsv2 validate` read larger corpora.
READ_AT_LAUNCH_BYTES = 256 << 20


def check_config(config: RunConfig) -> list[Problem]:
    """What keeps a run from training on its data folder.

    Reads the manifest, and all files of a corpus of at most READ_AT_LAUNCH_BYTES; of a larger one
    their sizes alone. Fields that are themselves wrong may be absent from `config`: checks that
    need them are passed over.
    """
    try:
        path = config.data.path
    except Absent:
        return []
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [Problem("data.path", path, str(error))]
    problems = [
        Problem("data.path", path, f"{problem}; {how_to_restore(folder)}")
        for problem in _damage(folder, manifest)
    ]
    for check in _CHECKS:
        problems += passing_over_absent(partial(check, manifest=manifest), config)
    return problems


def _damage(folder: Path, manifest: Manifest) -> list[str]:
    if sum(record.num_bytes for record in manifest.files) > READ_AT_LAUNCH_BYTES:
        return size_problems(folder, manifest)
    return file_problems(folder, manifest, max_file_bytes=None)


def _vocabulary(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    rows, needed = config.model.vocab_size, manifest.tokenizer.vocab_size
    most = int(needed * (1 + MAX_PADDING_SHARE))
    if not needed <= rows <= most:
        allowed = (
            f"must be {needed} to {most}: the tokenizer of {config.data.path} has {needed} ids, "
            f"and at most {MAX_PADDING_SHARE:.0%} more rows are padding"
        )
        yield Problem("model.vocab_size", rows, allowed)


def _train_size(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    length, num_tokens = config.recipe.sequence_length, manifest.splits["train"].num_tokens
    if length >= num_tokens:
        allowed = (
            f"must be at most {num_tokens - 1}: the train split of {config.data.path} "
            f"has {num_tokens} tokens, and a sample takes one more than its length"
        )
        yield Problem("recipe.sequence_length", length, allowed)


def _validation_size(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    length, num_tokens = config.recipe.sequence_length, manifest.splits["validation"].num_tokens
    num_samples = num_windows(num_tokens, length)
    if config.recipe.eval_num_samples > num_samples:
        allowed = (
            f"must be at most {num_samples}: the validation split of {config.data.path} has "
            f"{num_tokens} tokens, so {num_samples} samples of recipe.sequence_length = {length}"
        )
        yield Problem("recipe.eval_num_samples", config.recipe.eval_num_samples, allowed)


_CHECKS: tuple[Callable[..., Iterator[Problem]], ...] = (
    _vocabulary,
    _train_size,
    _validation_size,
)
