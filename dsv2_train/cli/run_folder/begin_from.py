"""Whether a run can begin with the weights of a checkpoint: looked at before a rank starts."""

from collections.abc import Iterator
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.layout import checkpoint_at
from dsv2_train.cli.run_folder.changes import changes
from dsv2_train.config.load import read_values
from dsv2_train.config.problems import Problem
from dsv2_train.config.run import RunConfig

_PATH = "checkpoint.init_from"
_MAY_DIFFER = "yarn"  # it has no weights: a context is extended with those of a short one


def can_begin_from(config: RunConfig) -> Iterator[Problem]:
    """Nothing, or why `checkpoint.init_from` is no checkpoint of this run's model.

    Raises:
        ConfigError: for a checkpoint whose configuration cannot be read.
    """
    given = config.checkpoint.init_from
    if given is None:
        return
    try:
        found = checkpoint_at(Path(given))
        open_verified(found)
    except (CheckpointError, OSError) as error:
        what = " ".join(str(error).split())
        yield Problem(_PATH, given, f"must be an intact checkpoint, or a run with one: {what}")
        return
    theirs, ours = read_values(found / layout.CONFIG).get("model"), config.model
    if not isinstance(theirs, dict):
        yield Problem(_PATH, given, f"must have a model section in its {layout.CONFIG}; has none")
        return
    for change in changes(_plain(theirs), _plain(ours.model_dump(mode="json"))):
        allowed = f"must be {change.before}, as in {found}, whose weights the run is to begin with"
        yield Problem(f"model.{change.path}", change.now, allowed)


def _plain(model: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in model.items() if name != _MAY_DIFFER}
