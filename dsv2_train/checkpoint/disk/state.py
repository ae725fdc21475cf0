"""The clock of a run, and what else a resumed run must know besides its tensors."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsv2_train.checkpoint.disk.errors import CheckpointError

_SCHEMA_VERSION = 1
_TOO_MANY = 1 << 62  # sums of two still are int64


@dataclass(frozen=True)
class GuardState:
    """What bad steps and the losses before have left, for the rules about the next ones.

    Attributes:
        losses: of the last steps that were learned, oldest first; none without a rule for spikes.
        in_a_row: bad steps since the last one that was learned.
        last_bad_step: the highest number of a bad step, 0 without one.
        skipped_steps: steps without an update, since the run began.
        rollbacks: returns to a checkpoint, since the run began.
    """

    losses: tuple[float, ...] = ()
    in_a_row: int = 0
    last_bad_step: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after an optimizer step.

    Attributes:
        step: optimizer steps taken.
        consumed_samples: samples trained on; the clock of the run.
        consumed_tokens: tokens trained on.
        adam_step: updates that AdamW has made (its bias correction counts these).
        wandb_run_id: run to go on with in wandb, or None.
        skip_list: samples that are never trained on, [first, end) ranges of ids in order.
        corpus: SHA-256 of the token stream that was trained on; None where nothing was.
        guard: what the guards against bad numbers remember.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    adam_step: int
    wandb_run_id: str | None = None
    skip_list: tuple[tuple[int, int], ...] = ()
    corpus: str | None = None
    guard: GuardState = GuardState()

    def to_json(self) -> str:
        """The record as a JSON object, with the version of this schema."""
        return json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: for another schema version, and for keys or values that do not
                belong; all of them are listed.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"state: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"state: found {type(values).__name__}; allowed: an object")
        version = values.pop("schema_version", None)
        if version != _SCHEMA_VERSION:
            raise CheckpointError(
                f"state: schema_version: found {version!r}; this dsv2_train reads "
                f"{_SCHEMA_VERSION}; take the dsv2_train that wrote it, or another run.name"
            )
        problems = _problems(values)
        if problems:
            raise CheckpointError("\n".join(["state:", *(f"  - {line}" for line in problems)]))
        skip_list = tuple((first, end) for first, end in values.pop("skip_list"))
        guard = values.pop("guard")
        losses = tuple(guard.pop("losses"))
        return cls(**values, skip_list=skip_list, guard=GuardState(losses, **guard))


def _problems(values: dict[str, Any]) -> list[str]:
    names = [field.name for field in fields(TrainState)]
    problems = [
        f"{name}: unknown key; allowed: {', '.join(names)}" for name in values.keys() - names
    ]
    for name in names:
        if name not in values:
            problems.append(f"{name}: missing")
            continue
        belongs, allowed = _KINDS.get(name, (_is_count, "an integer >= 0"))
        if not belongs(values[name]):
            problems.append(f"{name}: found {values[name]!r:.100}; allowed: {allowed}")
    return sorted(problems)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _TOO_MANY


def _is_text_or_none(value: object) -> bool:
    return isinstance(value, str | None)


def _is_skip_list(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(one, list) for one in value):
        return False
    ends = [end for one in value for end in one]
    of_two = all(len(one) == 2 for one in value)
    return of_two and all(map(_is_count, ends)) and ends == sorted(set(ends))


def _is_guard(value: object) -> bool:
    names = [field.name for field in fields(GuardState)]
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        return False
    losses, *counts = (value[name] for name in names)
    of_numbers = isinstance(losses, list) and all(type(loss) is float for loss in losses)
    return of_numbers and all(map(math.isfinite, losses)) and all(map(_is_count, counts))


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "wandb_run_id": (_is_text_or_none, "a string or null"),
    "skip_list": (_is_skip_list, "ranges [first, end) in order, with samples between them"),
    "corpus": (_is_text_or_none, "a string or null"),
    "guard": (_is_guard, "an object with finite losses and counts >= 0"),
}
