"""Timelines: text to the character, a picture that opens, a trace that is one."""

import json
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.colors import to_rgb

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.simulate import Simulation, simulate
from dsv2_train.pipeline.timeline import (
    Event,
    Timeline,
    as_text,
    of_simulation,
    write,
    write_picture,
    write_trace,
)

PLACE = Placement(2, 1, "loop")


def simulated(schedule: str) -> Simulation:
    """Two stages, two microbatches: F 1 s, B 2 s, W 1 s."""
    return simulate(fixed.build(schedule, PLACE, 2), Costs.equal(PLACE, 1.0, 2.0, 1.0))


def test_events_are_the_simulated_ops() -> None:
    timeline = of_simulation(simulated("zb_h1"))
    assert timeline[1] == [
        Event("F0.0", "F", 1.0, 2.0),
        Event("B0.0", "B", 2.0, 4.0),
        Event("F1.0", "F", 4.0, 5.0),
        Event("B1.0", "B", 5.0, 7.0),
        Event("W0.0", "W", 7.0, 8.0),
        Event("W1.0", "W", 8.0, 9.0),
    ]


@pytest.mark.parametrize(
    ("schedule", "width", "text"),
    [
        ("zb_h1", 10, "0 FF..BBWBBW\n1 .FBBFBBWW."),
        ("1f1b", 12, "0 FF...BWW.BWW\n1 .FBWWFBWW..."),
    ],
)
def test_text(schedule: str, width: int, text: str) -> None:
    assert as_text(of_simulation(simulated(schedule)), width) == text


def test_text_shows_gaps_and_other_things_than_ops() -> None:
    timeline: Timeline = [
        [Event("F0.0", "F", 0.0, 2.0), Event("gradients", "reduce", 3.0, 4.0)],
        [],
    ]
    assert as_text(timeline, 4) == "0 FF.r\n1 ...."
    assert as_text([[]], 4) == "0 ...."


def test_stages_are_numbered_in_line() -> None:
    lines = as_text([[Event("F0.0", "F", 0.0, 1.0)]] * 11, 3).splitlines()
    assert (lines[0], lines[10]) == (" 0 FFF", "10 FFF")


def test_a_picture_shows_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    timelines = {name: of_simulation(simulated(name)) for name in ("1f1b", "zb_h1")}
    write_picture(timelines, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[1] == 14 * 120
    for color in ("#3b6ea5", "#d1495b", "#5b8c5a", "#a0526f"):  # F, B, W, BW
        distance = abs(image - to_rgb(color)).max(axis=2)
        assert (distance < 0.01).sum() > 500, color


def test_a_trace_has_every_op_at_its_time(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    timelines = {name: of_simulation(simulated(name)) for name in ("zb_h1", "1f1b")}
    write_trace(timelines, path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {
        (event["pid"], event["args"]["name"]) for event in events if event["name"] == "process_name"
    }
    assert names == {(0, "zb_h1"), (1, "1f1b")}
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert len(spans) == 12
    assert spans[7] == {
        "ph": "X",
        "name": "B0.0",
        "cat": "B",
        "pid": 0,
        "tid": 1,
        "ts": 2e6,
        "dur": 2e6,
    }


def test_both_files_lie_in_a_folder_that_is_made(tmp_path: Path) -> None:
    timelines = {"1f1b": of_simulation(simulated("1f1b"))}
    write(timelines, tmp_path / "new" / "folder", "step.1")
    write_trace(timelines, tmp_path / "trace.json")
    found = {path.name: path for path in (tmp_path / "new" / "folder").iterdir()}
    assert sorted(found) == ["step.1.json", "step.1.png"]
    assert found["step.1.png"].read_bytes().startswith(b"\x89PNG")
    assert found["step.1.json"].read_text() == (tmp_path / "trace.json").read_text()
