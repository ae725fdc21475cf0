"""Chosen steps of a run: a timeline beside its plan, a window of torch's profiler."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.activity import Place
from dsv2_train.pipeline.plans import Op
from dsv2_train.pipeline.stage.stage import StageStep
from dsv2_train.train import loop
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.world import World

SLEEPS_S = {"F": 0.1, "B": 0.2, "W": 0.3}  # of microbatch 1 on the second stage, in drawn steps


def _train(rank: int, config: RunConfig) -> None:
    run = open_run(rank, config)
    compute = StageStep._compute

    def slowed(step: StageStep, op: Op, arrived: Tensor | None) -> Tensor | None:
        is_drawn = step._recorder is not None
        if is_drawn and run.groups.pp.rank() == 1 and op.microbatch == 1:
            time.sleep(SLEEPS_S[op.kind.value])
        return compute(step, op, arrived)

    with mock.patch.object(StageStep, "_compute", slowed):
        loop.train(run)
    close_run(run)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("profiled")
    config = run_config(
        root,
        synthetic_folder(root / "data"),
        "parallel.world_size=4",
        "parallel.pp=2",
        "parallel.schedule=zb_h1",
        "monitor.profile.timeline_steps=[2,4]",
        "monitor.profile.torch_first_step=5",
        "monitor.profile.torch_last_step=100",
        "monitor.profile.torch_ranks=[1]",
        "recipe.micro_batch_size=2",
        "parallel.ep=2",
    )
    world.run(_train, 4, config)
    return config.run.folder


def test_chosen_steps_are_drawn(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "timelines").iterdir())
    stems = [f"step_0000000{step}" for step in (2, 4)]
    assert names == [f"{stem}.{suffix}" for stem in stems for suffix in ("json", "png")]
    for stem in stems:
        assert (folder / "timelines" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def _spans(
    trace: dict[str, Any], process: int, stage: int, *, waits: bool = False
) -> list[dict[str, Any]]:
    """What a stage did; or what it waited for in that, which has a place for a name."""
    places = {place.value for place in Place}
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (process, stage)
        if (event["name"] in places) == waits
    ]


def test_a_measured_timeline_has_the_ops_of_its_plan_in_order_and_leaves_no_gap(
    folder: Path,
) -> None:
    trace = json.loads((folder / "timelines" / "step_00000004.json").read_text())
    for stage in range(2):
        measured, planned = (_spans(trace, process, stage) for process in range(2))
        ops = [event["name"] for event in measured if event["cat"] in "FBW"]
        assert ops == [event["name"] for event in planned]
        assert len(ops) == 6 and {event["cat"] for event in planned} == set("FBW")
        assert [event["cat"] for event in measured[-2:]] == ["reduction", "update"]
        for before, after in itertools.pairwise(measured):
            assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=1e-3)
        # The plan is drawn with what was measured: the same work, less waiting.
        work = {
            name: sum(event["dur"] for event in events if event["cat"] in "FBW")
            for name, events in (("measured", measured), ("planned", planned))
        }
        assert work["measured"] == pytest.approx(work["planned"], rel=1e-6)


def test_every_rank_is_in_the_trace_with_what_it_does_with_others(folder: Path) -> None:
    trace = json.loads((folder / "timelines" / "step_00000004.json").read_text())
    titles = {
        event["args"]["name"]: event["pid"]
        for event in trace["traceEvents"]
        if event["name"] == "process_name"
    }
    measured = [titles[f"step 4, measured, ranks {ranks}"] for ranks in ("0, 2", "1, 3")]
    assert measured[0] == 0 and len(titles) == 3
    for process, stage in itertools.product(measured, range(2)):
        spans = _spans(trace, process, stage)
        waits = _spans(trace, process, stage, waits=True)
        names = Counter(event["name"] for event in waits)
        # Of four layers all but the first have experts. Of two microbatches: rows there and back,
        # forward and backward, and how many there will be.
        num_layers = 1 + stage
        assert (names["combine"], names["dispatch"]) == (4 * num_layers, 6 * num_layers), names
        for wait in waits:
            assert wait["ts"] >= spans[0]["ts"] - 1e-3
            assert wait["ts"] + wait["dur"] <= spans[-1]["ts"] + spans[-1]["dur"] + 1e-3
        for exchange in (event for event in waits if event["name"] in ("dispatch", "combine")):
            (around,) = (
                event
                for event in spans
                if event["ts"] - 1e-3 <= exchange["ts"]
                and exchange["ts"] + exchange["dur"] <= event["ts"] + event["dur"] + 1e-3
            )
            assert around["cat"] in "FB"


def test_an_op_of_known_duration_has_it_in_the_measured_timeline(folder: Path) -> None:
    trace = json.loads((folder / "timelines" / "step_00000004.json").read_text())
    waiting, slowed = (_spans(trace, 0, stage) for stage in range(2))
    durations_s = {event["name"]: event["dur"] / 1e6 for event in slowed}
    for kind, slept_s in SLEEPS_S.items():
        assert durations_s[f"{kind}1.0"] >= slept_s - 1e-5  # rounding of the trace
    # The other stage's B has nothing of it: that stage waits.
    place = [event["name"] for event in waiting].index("B1.0")
    assert waiting[place - 1]["cat"] == "wait"
    assert waiting[place]["dur"] / 1e6 < SLEEPS_S["B"]


def test_a_window_of_torch_s_profiler_that_the_run_ends_in_is_written(folder: Path) -> None:
    [path] = (folder / "torch_profile").iterdir()
    assert path.name == "rank_00001.json"
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mm" in names
