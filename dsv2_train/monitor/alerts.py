"""What people should be told about while a run trains: routing that goes wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dsv2_train.config.sections.monitor import AlertConfig
from dsv2_train.monitor.metrics import layer_of


@dataclass(frozen=True)
class _Rule:
    """A condition on one metric of a layer.

    Attributes:
        key: of the metric, without its layer.
        is_bad: the condition.
        worst: which of several layers' values to tell, `min` or `max`.
        words: what goes wrong, with the worst value as `{value}`.
    """

    key: str
    is_bad: Callable[[float], bool]
    worst: Callable[[list[float]], float]
    words: str


class Alerts:
    """Holds rows against rules; tells once when a rule begins to be broken for long enough.

    Args:
        config: thresholds, and how many rows in a row break a rule.
        device_budget: assignments that a device group is meant to compute, over the mean.
    """

    def __init__(self, config: AlertConfig, device_budget: float) -> None:
        self._patience = config.patience_rows
        self._rules = _rules(config, device_budget)
        self._rows_broken: dict[str, int] = {}

    def check(self, row: Mapping[str, float]) -> list[str]:
        """Take the next row.

        Returns:
            A sentence for each rule that layers have now broken in as many rows as it takes. A
            layer is named again only after a row in which it kept the rule.
        """
        return [sentence for rule in self._rules if (sentence := self._check(rule, row))]

    def _check(self, rule: _Rule, row: Mapping[str, float]) -> str:
        new: dict[int, float] = {}
        for key, value in row.items():
            layer_idx = layer_of(key)
            if layer_idx is None or not key.startswith(f"{rule.key}/"):
                continue
            broken = self._rows_broken.get(key, 0) + 1 if rule.is_bad(value) else 0
            self._rows_broken[key] = broken
            if broken == self._patience:
                new[layer_idx] = value
        if not new:
            return ""
        layers = ", ".join(str(layer_idx) for layer_idx in sorted(new))
        what = rule.words.format(value=rule.worst(list(new.values())))
        where = f"layer{'s' if len(new) > 1 else ''} {layers}"
        return f"{where}: {what}, in each of the last {self._patience} rows"


def _rules(config: AlertConfig, device_budget: float) -> list[_Rule]:
    least, most = config.min_load_evenness, config.max_device_load
    return [
        _Rule(
            "moe/expert_load_evenness",
            lambda evenness: evenness < least,
            min,
            "routing collapses onto few experts: the entropy of their load is down to "
            f"{{value:.2f}} of an even one's, alert below {least:g}",
        ),
        _Rule(
            "moe/dead_experts",
            lambda count: count > 0,
            max,
            "dead experts: up to {value:.0f} of a layer got no token of the step",
        ),
        _Rule(
            "moe/device_load_max_over_mean",
            lambda load: load > most * device_budget,
            max,
            "a device group is over its budget: it was routed {value:.2f} times the mean load, "
            f"alert above {most:g} times a budget of {device_budget:g}",
        ),
    ]
