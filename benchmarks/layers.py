"""One layer of DeepSeek-V2's shape on one rank, forward and backward: its mixture, or all of it.

Timed as kernels are, in turns, on a GPU with L2 emptied before each: weights come from memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks import report
from benchmarks.kernel_time import KernelTime, kernel_time
from benchmarks.layer_contenders import KINDS, OURS, TINY, Kind, batch, contenders, layer_config
from dsv2_kernels.testing import machine
from dsv2_kernels.testing.timing import Times, alternate, ratio
from dsv2_train.config.run import RunConfig
from dsv2_train.recipe.flops import forward_flops

ROOT = Path(__file__).parents[1]
TOKENS = (4096, 8192, 16384, 32768)
LENGTH = 4096
# What of the model's operations a layer of each kind does.
_MIXTURE = ("router", "shared_experts", "routed_experts")
_PARTS: dict[Kind, tuple[str, ...]] = {
    "moe": _MIXTURE,
    "transformer": ("attention_projections", "attention_core", *_MIXTURE),
}


@dataclass(frozen=True)
class LayerRow:
    """A contender's figures.

    Attributes:
        us: of forward and backward.
        tflop_per_s: of the model's operations; recomputation counts as time alone.
        of_ours: its time over ours, turn by turn: median, least, most; ours is the first row.
        work: where its time goes.
        busiest: tokens of the busiest expert over the mean; None for a peer.
    """

    name: str
    us: Times
    tflop_per_s: float
    of_ours: dict[str, float]
    work: KernelTime
    busiest: float | None


def compare_all(groups: ProcessGroupCollection) -> Iterator[dict[str, Any]]:
    """Both kinds of layer on this machine's GPU; without one, tiny ones on the CPU.

    Returns:
        After each comparison all so far, since a lent machine may be taken away: rows by kind and
        tokens, why contenders are missing, and where this was measured.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.compiler.set_stance("force_eager")
    seconds = 2.0 if on_gpu else 0.0
    found: dict[str, Any] = {
        "machine": report.machine() | machine.describe(device, ROOT),
        "speeds": machine.measure_speeds(device, machine.timer_of(device), seconds),
        "layers": {},
        "missing": {},
    }
    for tokens in TOKENS if on_gpu else (64,):
        for kind in KINDS:
            length, overrides = (LENGTH, {}) if on_gpu else (32, TINY)
            config = layer_config(tokens, length, overrides)
            title = f"{kind} layer, {tokens} tokens"
            rows, missing = compare_layers(kind, config, groups, device, seconds)
            show(title, rows, missing)
            found["layers"][title], found["missing"][title] = rows, missing
            yield found


def show(title: str, rows: list[LayerRow], missing: dict[str, str]) -> None:
    """Print one comparison, and where the time of each contender goes."""
    print(f"\n{title}, forward and backward; medians, L2 emptied before each")
    print(f"{'':24}{'ms':>9}{'TFLOP/s':>9}{'of ours':>9}{'busiest':>9}  work")
    for row in rows:
        busiest = "" if row.busiest is None else f"{row.busiest:.2f}"
        work = ", ".join(f"{name} {share:.0%}" for name, share in row.work.shares.items())
        print(
            f"{row.name:24}{row.us.median / 1e3:9.2f}{row.tflop_per_s:9.1f}"
            f"{row.of_ours['median']:8.2f}x{busiest:>9}  {work}"
        )
    for name, why in missing.items():
        print(f"{name:24} not run: {why}")


def compare_layers(
    kind: Kind,
    config: RunConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    seconds: float,
) -> tuple[list[LayerRow], dict[str, str]]:
    """Time all contenders on one batch, in turns.

    Args:
        kind: the mixture, or all of the layer.
        config: a model of one layer.
        groups: of this rank alone.
        device: runs them.
        seconds: to spend on all turns; see `alternate`.

    Returns:
        A row each, ours first; and, by name, why others could not run.
    """
    layers, missing = contenders(kind, config, groups, device)
    hidden, gradient = batch(config, device)
    # Without ours there is nothing to compare: its error is raised.
    layers[OURS].step(hidden, gradient)
    calls = {name: partial(layer.step, hidden, gradient) for name, layer in layers.items()}
    times, errors = alternate(calls, machine.timer_of(device), seconds)
    flops = layer_flops(kind, config)
    rows = [
        LayerRow(
            name=name,
            us=us,
            tflop_per_s=flops / us.median / 1e6,
            of_ours=ratio(us, times[OURS]),
            work=kernel_time(calls[name], device),
            busiest=busiest() if (busiest := layers[name].busiest) else None,
        )
        for name, us in times.items()
    ]
    return rows, missing | errors


def layer_flops(kind: Kind, config: RunConfig) -> int:
    """Operations of forward and backward over a batch; attention is causal."""
    recipe = config.recipe
    parts = forward_flops(config.model, recipe.sequence_length, "causal")
    tokens = recipe.sequence_length * recipe.micro_batch_size
    return int(3 * tokens * sum(getattr(parts, part) for part in _PARTS[kind]))
