"""Alerts: told when a rule is broken for long enough, once, in plain words."""

import pytest

from dsv2_train.config.sections.monitor import AlertConfig
from dsv2_train.monitor.alerts import Alerts
from dsv2_train.monitor.metrics import layer_key

CONFIG = AlertConfig(min_load_evenness=0.5, max_device_load=1.5, patience_rows=3)
GOOD = {"expert_load_evenness": 0.9, "dead_experts": 0.0, "device_load_max_over_mean": 1.1}


def row(*layers: int, **bad: float) -> dict[str, float]:
    """A row of four layers, in which `layers` have bad values."""
    return {
        layer_key(f"moe/{name}", layer): bad.get(name, value) if layer in layers else value
        for layer in range(1, 5)
        for name, value in GOOD.items()
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("expert_load_evenness", 0.31, "routing collapses onto few experts: the entropy of their"),
        ("dead_experts", 7.0, "dead experts: up to 7 of a layer got no token"),
        ("device_load_max_over_mean", 1.71, "over its budget: it was routed 1.71 times the mean"),
    ],
)
def test_a_rule_broken_in_three_rows_is_told_once(name: str, value: float, words: str) -> None:
    alerts = Alerts(CONFIG, device_budget=1.0)
    told = [alerts.check(row(2, **{name: value})) for _ in range(6)]
    assert [len(sentences) for sentences in told] == [0, 0, 1, 0, 0, 0]
    (sentence,) = told[2]
    assert sentence.startswith("layer 2: ")
    assert words in sentence
    assert sentence.endswith("in each of the last 3 rows")


def test_a_row_that_keeps_the_rule_starts_the_count_again() -> None:
    alerts = Alerts(CONFIG, device_budget=1.0)
    rows = [row(1, dead_experts=1.0)] * 2 + [row()] + [row(1, dead_experts=1.0)] * 3
    assert [len(alerts.check(one)) for one in rows] == [0, 0, 0, 0, 0, 1]


def test_it_is_told_again_after_it_was_good() -> None:
    alerts = Alerts(CONFIG, device_budget=1.0)
    bad = [row(1, dead_experts=1.0)] * 3
    assert [len(alerts.check(one)) for one in [*bad, row(), *bad]] == [0, 0, 1, 0, 0, 0, 1]


def test_layers_that_break_a_rule_together_are_one_sentence() -> None:
    alerts = Alerts(CONFIG, device_budget=1.0)
    for _ in range(2):
        alerts.check(row(1, 3, expert_load_evenness=0.2))
    (sentence,) = alerts.check(row(1, 3, expert_load_evenness=0.2))
    assert sentence.startswith("layers 1, 3: routing collapses")


def test_a_larger_budget_allows_a_larger_load() -> None:
    for budget, count in ((1.0, 1), (1.25, 0)):
        alerts = Alerts(CONFIG, device_budget=budget)
        told = [alerts.check(row(1, device_load_max_over_mean=1.8)) for _ in range(3)]
        assert sum(map(len, told)) == count


def test_rows_without_routing_say_nothing() -> None:
    assert Alerts(CONFIG, device_budget=1.0).check({"train/loss": 3.0, "eval/loss": 3.0}) == []
