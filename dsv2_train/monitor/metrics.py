"""Every metric once: its key, unit, meaning and number format."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    Attributes:
        key: `<family>/<name>`, the unit in the name where it has one.
        unit: unit as written on an axis; empty for a ratio or a count.
        meaning: one line for people.
        number_format: format specification of a value.
        label: short name in the console line; empty keeps the metric out of it.
        over_layers: what the model's value is of its layers', where `<key>/layer_<2 digits>` is a
            key too; empty for what is not about layers.
    """

    key: str
    unit: str
    meaning: str
    number_format: str
    label: str = ""
    over_layers: Literal["", "max", "min", "mean", "sum"] = ""


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
    Metric(
        "perf/checkpoint_time_s", "s", "training stood for checkpoints since the last row", ".2f"
    ),
    Metric("perf/checkpoint_write_s", "s", "behind training, of checkpoints now complete", ".2f"),
    Metric("perf/model_tflops_per_gpu", "TFLOP/s", "model operations per device", ".2f"),
    Metric("perf/mfu", "", "share of the device's known peak, 0 to 1", ".1%", "MFU"),
    Metric(
        "perf/data_max_over_median",
        "",
        "wait for data, slowest rank against the median of its stage",
        ".2f",
    ),
    Metric(
        "perf/forward_max_over_median",
        "",
        "forward passes, slowest rank against the median of its stage",
        ".2f",
    ),
    Metric(
        "perf/backward_max_over_median",
        "",
        "backward passes, slowest rank against the median of its stage",
        ".2f",
    ),
    Metric(
        "perf/exchange_max_over_median",
        "",
        "messages and waiting for others, slowest rank against the median of its stage",
        ".2f",
    ),
    Metric(
        "perf/optimizer_max_over_median",
        "",
        "update, slowest rank against the median of its stage",
        ".2f",
    ),
    Metric(
        "moe/expert_load_max_over_mean",
        "",
        "busiest expert against the mean, before dropping",
        ".2f",
        "expert load",
        "max",
    ),
    Metric(
        "moe/expert_load_evenness",
        "",
        "entropy of the experts' load over that of an even one, before dropping",
        ".3f",
        over_layers="min",
    ),
    Metric("moe/dead_experts", "", "experts that got no token", ",.0f", over_layers="sum"),
    Metric(
        "moe/device_load_max_over_mean",
        "",
        "busiest device group against the mean, before dropping",
        ".2f",
        "device load",
        "max",
    ),
    Metric(
        "moe/sent_load_max",
        "",
        "most tokens for a device group over M / D of all (f''), before dropping",
        ".2f",
        over_layers="max",
    ),
    Metric(
        "moe/devices_per_token",
        "",
        "device groups of a token's experts, before dropping",
        ".2f",
        over_layers="mean",
    ),
    Metric(
        "moe/dropped_share",
        "",
        "assignments dropped by device capacity",
        ".2%",
        over_layers="mean",
    ),
    Metric("moe/gate_entropy", "nats", "of a token's affinities", ".3f", over_layers="mean"),
    Metric("moe/expert_balance_loss", "", "unweighted; 1 is even", ".4f", over_layers="mean"),
    Metric("moe/device_balance_loss", "", "unweighted; 1 is even", ".4f", over_layers="mean"),
    Metric("moe/communication_balance_loss", "", "unweighted", ".4f", over_layers="mean"),
    Metric("moe/exempt_share", "", "tokens of sequences that lose nothing to capacity", ".2%"),
    Metric("moe/num_alerts", "", "alerts about routing that came with this row", ",.0f"),
    Metric("guard/skipped_steps", "steps", "left out so far for their numbers", ",.0f"),
    Metric("guard/rollbacks", "", "returns to a checkpoint so far", ",.0f"),
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
    if metric is not None and (base == key or metric.over_layers):
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
