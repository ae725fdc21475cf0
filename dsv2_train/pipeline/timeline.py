"""What every stage did when, simulated or measured: as text, as a picture, for Perfetto.

A measured timeline is drawn beside the plan it ran: give both to one picture or one trace.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.simulate import Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IDLE = "."
_COLORS = {
    "F": "#3b6ea5",
    "B": "#d1495b",
    "W": "#5b8c5a",
    "BW": "#a0526f",
    "wait": "#e8e8e8",
    "reduction": "#8a76b0",
    "update": "#c9a227",
}
_OTHER_COLOR = "#b8b8b8"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took a stage's time.

    Attributes:
        label: what it was, in few characters.
        kind: F, B, W, BW, or a word for what is none of them; it gives color and letter.
        start_s: from the start of the step.
        end_s: from the start of the step.
    """

    label: str
    kind: str
    start_s: float
    end_s: float


Timeline = Sequence[Sequence[Event]]  # for each stage its events in order of their start
_NONE: Mapping[str, Timeline] = MappingProxyType({})


def of_simulation(simulation: Simulation) -> Timeline:
    """The timeline of a simulated step; a label is kind, microbatch, chunk: `F3.0`."""
    stages = zip(simulation.plan.ops, simulation.starts_s, simulation.ends_s, strict=True)
    return [
        [
            Event(op.label, op.kind.value, start_s, end_s)
            for op, start_s, end_s in zip(*stage, strict=True)
        ]
        for stage in stages
    ]


def mean_costs(plan: Plan, timeline: Timeline) -> Costs:
    """What F, B and W took on each virtual stage; of a BW, which is one event, B is all.

    Args:
        plan: what was run.
        timeline: of its ops in their order, and of what is none.
    """
    sums = {kind: [0.0] * plan.placement.num_virtual_stages for kind in Kind}
    for stage, events in enumerate(timeline):
        ops = iter(plan.ops[stage])
        for event in events:
            if event.kind in Kind.__members__:
                op = next(ops)
                virtual_stage = plan.placement.virtual_stage(stage, op.chunk)
                sums[op.kind][virtual_stage] += event.end_s - event.start_s
    means = {kind: tuple(each / plan.num_microbatches for each in sums[kind]) for kind in Kind}
    both = tuple(map(sum, zip(means[Kind.B], means[Kind.BW], strict=True)))
    return Costs(means[Kind.F], both, means[Kind.W])


def as_text(timeline: Timeline, width: int = 150) -> str:
    """One line a stage, all to the same scale; a dot where a stage is idle.

    A character is the first letter of what runs in the middle of its span of time; of BW the
    first half is B and the second W.

    Args:
        timeline: what to show.
        width: characters for the whole step.
    """
    end_s = _end_s(timeline)
    name_width = len(str(len(timeline) - 1))
    lines = []
    for stage, events in enumerate(timeline):
        letters = [_IDLE] * width
        for place in range(width):
            middle_s = (place + 0.5) * end_s / width
            letters[place] = _letter(events, middle_s)
        lines.append(f"{stage:>{name_width}} {''.join(letters)}")
    return "\n".join(lines)


def write(timelines: Mapping[str, Timeline], folder: Path, name: str) -> None:
    """Write timelines both ways: `<name>.png`, and `<name>.json` for Perfetto.

    Args:
        timelines: by title.
        folder: where to; made if need be.
        name: of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_picture(timelines, folder / f"{name}.png")
    write_trace(timelines, folder / f"{name}.json")


def write_picture(
    timelines: Mapping[str, Timeline], path: Path, waits: Mapping[str, Timeline] = _NONE
) -> None:
    """Draw timelines below each other with one time axis, as PNG.

    Args:
        timelines: by title, for instance the plan and what was measured.
        path: file to write.
        waits: by title, what is drawn as a line within a timeline's events.
    """
    # Half a second of import that most ranks never need; a figure of its own needs no pyplot.
    from matplotlib.figure import Figure  # noqa: PLC0415

    num_rows = sum(len(timeline) for timeline in timelines.values())
    height = 1.0 + 0.7 * len(timelines) + 0.22 * num_rows
    figure = Figure(figsize=(14, height), layout="constrained")
    panels = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
    for axes, (title, timeline) in zip(panels, timelines.items(), strict=True):
        _draw(axes, timeline)
        _draw_waits(axes, waits.get(title, ()))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        axes.set_title(f"{title}: {_end_s(timeline):.4g} s", loc="left")
    panels[-1].set_xlabel("seconds from the start of the step")
    figure.savefig(path, dpi=120)


def write_trace(
    timelines: Mapping[str, Timeline], path: Path, waits: Mapping[str, Timeline] = _NONE
) -> None:
    """Write trace events (Chrome's JSON, which Perfetto opens): a thread a stage.

    Args:
        timelines: by title, each a process.
        path: file to write.
        waits: by title, spans within a timeline's events.
    """
    events = [
        event
        for process, (title, timeline) in enumerate(timelines.items())
        for event in _trace_events(process, title, timeline, waits.get(title, ()))
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _trace_events(
    process: int, title: str, timeline: Timeline, waits: Timeline
) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}}
    for stage, events in enumerate(timeline):
        thread = {"pid": process, "tid": stage}
        yield {"ph": "M", "name": "thread_name", "args": {"name": f"stage {stage}"}, **thread}
        yield {"ph": "M", "name": "thread_sort_index", "args": {"sort_index": stage}, **thread}
        within = waits[stage] if waits else ()
        for event in (*events, *within):
            start_us, end_us = event.start_s * 1e6, event.end_s * 1e6
            span = {"ts": start_us, "dur": end_us - start_us}
            yield {"ph": "X", "name": event.label, "cat": event.kind, **thread, **span}


def _draw(axes: Axes, timeline: Timeline) -> None:
    kinds = dict.fromkeys(event.kind for events in timeline for event in events)
    for kind in kinds:
        label = kind
        style: dict[str, Any] = {"facecolor": _COLORS.get(kind, _OTHER_COLOR), "linewidth": 0.3}
        for stage, events in enumerate(timeline):
            bars = [(e.start_s, e.end_s - e.start_s) for e in events if e.kind == kind]
            row = (stage - 0.42, 0.84)
            axes.broken_barh(bars, row, label=label, edgecolor="white", **style)
            label = "_"  # a name that the legend leaves out: one entry a kind
    axes.set_ylim(len(timeline) - 0.5, -0.5)
    axes.set_xlim(0, None)
    axes.set_ylabel("stage")


def _draw_waits(axes: Axes, waits: Timeline) -> None:
    label = "with others"
    for stage, events in enumerate(waits):
        bars = [(event.start_s, event.end_s - event.start_s) for event in events]
        axes.broken_barh(bars, (stage - 0.06, 0.12), facecolor="black", label=label)
        label = "_"


def _letter(events: Sequence[Event], now: float) -> str:
    place = bisect.bisect_right(events, now, key=lambda event: event.start_s) - 1
    if place < 0 or events[place].end_s <= now:
        return _IDLE
    event = events[place]
    share = (now - event.start_s) / (event.end_s - event.start_s)
    return event.kind[int(share * len(event.kind))] if event.kind == "BW" else event.kind[0]


def _end_s(timeline: Timeline) -> float:
    return max((event.end_s for events in timeline for event in events), default=0.0)
