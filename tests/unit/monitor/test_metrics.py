"""The metric table."""

import re

import pytest

from dsv2_train.monitor.metrics import (
    METRICS,
    check_row,
    console_words,
    layer_key,
    layer_of,
    metric_of,
)


def test_every_key_is_declared_once_and_named_by_the_glossary() -> None:
    keys = [metric.key for metric in METRICS]
    assert len(set(keys)) == len(keys)
    for metric in METRICS:
        assert re.fullmatch(r"(train|eval|perf|moe|guard|mem)/[a-z][a-z0-9_]*", metric.key)
        assert metric.meaning
        assert format(1234.5, metric.number_format)


def test_seconds_and_gib_are_in_the_key() -> None:
    for metric in METRICS:
        assert metric.key.endswith("_gib") == (metric.unit == "GiB")
        assert (metric.key.endswith("_s") and "_per_s" not in metric.key) == (metric.unit == "s")


@pytest.mark.parametrize(
    "key", ["train/los", "loss", "train/loss/layer_01", "moe/expert_load_max_over_mean/layer_1"]
)
def test_undeclared_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(key))):
        check_row({"train/loss": 1.0, key: 2.0})


def test_refusal_names_the_likely_key() -> None:
    with pytest.raises(ValueError, match="did you mean train/grad_norm"):
        check_row({"train/gradnorm": 1.0})


def test_layer_key_is_the_metric_of_one_layer() -> None:
    key = layer_key("moe/expert_load_max_over_mean", 7)
    assert key == "moe/expert_load_max_over_mean/layer_07"
    assert metric_of(key).key == "moe/expert_load_max_over_mean"
    assert layer_of(key) == 7
    assert layer_of(layer_key("moe/expert_load_max_over_mean", 123)) == 123
    assert layer_of("moe/expert_load_max_over_mean") is None


def test_console_words_show_labelled_metrics_only() -> None:
    row = {"perf/tokens_per_s": 12345.6, "train/loss": 4.12345, "mem/peak_rss_gib": 1.0}
    assert console_words(row) == "loss 4.1235  tokens/s 12,346"
