"""What is said about spikes is of some effect."""

from collections.abc import Iterator

from dsv2_train.config.problems import Check, Problem, value_at
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.guards import SpikeConfig


def _only_with(path: str, actions: tuple[str, ...]) -> Check:
    """A key of the rule is left as it is where no action needs it."""
    name = path.rsplit(".", 1)[-1]

    def check(config: RunConfig) -> Iterator[Problem]:
        action, found = config.guards.spike.action, value_at(config, path)
        default = SpikeConfig.model_fields[name].default
        if action not in actions and found != default:
            allowed = f"must be left at {default} with guards.spike.action={action}: set that to "
            yield Problem(path, found, allowed + " or ".join(actions))

    return check


GUARD_CHECKS: tuple[Check, ...] = (
    _only_with("guards.spike.factor", ("skip", "rollback", "stop")),
    _only_with("guards.spike.window", ("skip", "rollback", "stop")),
    _only_with("guards.spike.offending_steps", ("rollback",)),
)
