"""Every metric once: its key, unit, meaning and number format."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        key: `<family>/<name>`, the unit in the name where it has one.
        unit: unit as written on an axis; empty for a ratio or a count.
        meaning: one line for people.
        number_format: format specification of a value.
        label: short name in the console line; empty keeps the metric out of it.
        per_layer: True if `<key>/layer_<2 digits>` is a key too.
    """

    key: str
    unit: str
    meaning: str
    number_format: str
    label: str = ""
    per_layer: bool = False


METRICS = (
    Metric("train/loss", "nats/token", "mean over the last step's tokens", ".4f", "loss"),
    Metric("eval/loss", "nats/token", "mean over the validation tokens", ".4f", "eval loss"),
    Metric("train/lr", "", "learning rate of the last step", ".2e", "lr"),
    Metric("train/grad_norm", "", "global norm before clipping", ".3f", "grad norm"),
    Metric("train/global_batch_size", "samples", "samples of the last step", ",.0f"),
    Metric("perf/tokens_per_s", "tokens/s", "all ranks together", ",.0f", "tokens/s"),
    Metric("perf/step_time_s", "s", "mean, without evaluation and checkpoints", ".3f"),
    Metric("perf/data_time_s", "s", "mean wait for data in a step", ".4f"),
    Metric("perf/eval_time_s", "s", "spent in evaluation since the last row", ".2f"),
    Metric("perf/checkpoint_time_s", "s", "spent in checkpoints since the last row", ".2f"),
    Metric("perf/model_tflops_per_gpu", "TFLOP/s", "model operations per device", ".2f"),
    Metric("perf/mfu", "", "share of the device's known peak, 0 to 1", ".1%", "MFU"),
    Metric(
        "moe/expert_load_max_over_mean",
        "",
        "busiest expert against the mean; without a layer, the worst layer; 1 is even",
        ".2f",
        "expert load",
        per_layer=True,
    ),
    Metric(
        "moe/device_load_max_over_mean",
        "",
        "busiest device group against the mean; without a layer, the worst layer; 1 is even",
        ".2f",
        per_layer=True,
    ),
    Metric("moe/dead_experts", "", "experts of all layers that got no token", ",.0f"),
    Metric("moe/expert_balance_loss", "", "unweighted, mean over layers; 1 is even", ".4f"),
    Metric("moe/device_balance_loss", "", "unweighted, mean over layers; 1 is even", ".4f"),
    Metric("moe/communication_balance_loss", "", "unweighted, mean over layers; 1 is even", ".4f"),
    Metric("mem/peak_rss_gib", "GiB", "most resident memory of a CPU rank", ".2f"),
    Metric("mem/peak_reserved_gib", "GiB", "most memory reserved on a GPU", ".2f"),
)

_BY_KEY = {metric.key: metric for metric in METRICS}
_LAYER_SUFFIX = re.compile(r"/layer_(\d{2,})$")


def layer_key(key: str, layer_idx: int) -> str:
    """Key of one layer's value: `layer_key("moe/x", 7)` is `moe/x/layer_07`."""
    return f"{key}/layer_{layer_idx:02d}"


def layer_of(key: str) -> int | None:
    """The layer that a key is about, None if it is about the model."""
    match = _LAYER_SUFFIX.search(key)
    return int(match[1]) if match else None


def metric_of(key: str) -> Metric:
    """The declaration that a key of a row belongs to.

    Raises:
        ValueError: if the key is not declared here.
    """
    base = _LAYER_SUFFIX.sub("", key)
    metric = _BY_KEY.get(base)
    if metric is not None and (base == key or metric.per_layer):
        return metric
    close = difflib.get_close_matches(base, _BY_KEY, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    raise ValueError(f"metric {key!r} is not declared in monitor/metrics.py{hint}")


def check_row(row: Mapping[str, float]) -> None:
    """Refuse a row with an undeclared key.

    Raises:
        ValueError: naming the first such key.
    """
    for key in row:
        metric_of(key)


def console_words(row: Mapping[str, float]) -> str:
    """`loss 4.1234  lr 2.00e-04 ...`: the labelled metrics that a row has, in table order."""
    return "  ".join(
        f"{metric.label} {row[metric.key]:{metric.number_format}}"
        for metric in METRICS
        if metric.label and metric.key in row
    )
