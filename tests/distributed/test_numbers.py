"""Bad numbers: all ranks skip, roll back or stop together, and what follows is what should."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.integrity import newest_intact
from dsv2_train.checkpoint.disk.state import GuardState
from dsv2_train.config.run import RunConfig
from dsv2_train.data.sampler import SkipList
from dsv2_train.monitor.rows import read_rows
from dsv2_train.train import loop
from dsv2_train.train.guards.replicas import ReplicaError
from tests.helpers.corpus import synthetic_folder
from tests.helpers.poison import flip_a_bit, incidents, omit_update, poison
from tests.helpers.run import Owned, add_up, close_run, open_run, owned, run_config
from tests.helpers.world import World

LAYOUTS = {
    "PP2 EP2": (4, ("parallel.pp=2", "parallel.ep=2")),
    "DP2": (2, ()),
    "DP2, gathered at once": (2, ("parallel.overlap_param_gather=false",)),
}
SPIKES = ("guards.spike.action=rollback", "guards.spike.window=3", "guards.spike.factor=8")


@dataclass(frozen=True)
class Ended:
    """How a rank's run ended."""

    step: int
    adam_step: int
    guard: GuardState
    skip_list: SkipList
    error: str
    alerts: list[str]
    state: list[Owned]


@dataclass(frozen=True)
class Fault:
    """What is done to a run.

    Attributes:
        samples: that are bad.
        kind: of bad samples.
        omitted: step whose update is left out.
        flipped: rank, step and parameter of a bit.
        stop_at: step after which the run is asked to stop.
    """

    samples: Sequence[int] = ()
    kind: str = "nan"
    omitted: int = 0
    flipped: tuple[int, int, str] | None = None
    stop_at: int | None = None


def _train(rank: int, config: RunConfig, fault: Fault) -> Ended:
    run = open_run(rank, config)
    alerts: list[str] = []
    if run.monitor is not None:
        # The run is the test's and ends with it: nothing has to be put back.
        run.monitor.alert = lambda _, text: alerts.append(text)  # type: ignore[method-assign]
    poison(run, fault.samples, fault.kind)
    omit_update(run, fault.omitted)
    if fault.flipped is not None and fault.flipped[0] == rank:
        flip_a_bit(run, *fault.flipped[1:])
    if fault.stop_at is not None:
        run.signals.agreed = lambda: run.clock.step >= fault.stop_at  # type: ignore[method-assign]
    error = ""
    try:
        loop.train(run)
    except (FloatingPointError, ReplicaError) as raised:
        error = str(raised)
    ended = Ended(
        run.clock.step,
        run.optimizer.adam_step,
        run.guard,
        run.train_split.skip_list,
        error,
        alerts,
        owned(run),
    )
    close_run(run)
    return ended


def _config(folder: Path, name: str, layout: str, *overrides: str) -> RunConfig:
    size, more = LAYOUTS[layout]
    common = (f"run.name={name}", f"parallel.world_size={size}", *more, *overrides)
    return run_config(folder / "runs", synthetic_folder(folder / "data"), *common)


def _whole(ended: list[Ended]) -> dict[str, int]:
    """Checksums of all tensors; the ranks agree on all else."""
    first = ended[0]
    for each in ended:
        assert (each.step, each.adam_step, each.guard) == (first.step, first.adam_step, first.guard)
        assert (each.skip_list, each.error) == (first.skip_list, first.error)
    return add_up([each.state for each in ended])


def _rows(config: RunConfig) -> list[dict[str, float]]:
    """What does not depend on the clock on the wall, nor on what the guards did."""
    others = ("perf/", "mem/", "guard/")
    return [
        {key: value for key, value in row.items() if not key.startswith(others)}
        for row in read_rows(config.run.folder / "metrics.jsonl")
    ]


def _incident(config: RunConfig, step: int, number: int = 1) -> dict[str, Any]:
    path = config.run.folder / "incidents" / f"step_{step:08d}_{number}.json"
    record = json.loads(path.read_text())
    assert isinstance(record, dict)
    return record


def _run(world: World, config: RunConfig, fault: Fault) -> list[Ended]:
    return world.run(_train, config.parallel.world_size, config, fault)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_is_one_whose_update_is_omitted(
    world: World, tmp_path: Path, layout: str
) -> None:
    """Sample 19 is in the third step, in the second microbatch of the second pipeline."""
    skipping = _config(tmp_path, "skipping", layout)
    skipped = _run(world, skipping, Fault([19]))
    omitting = _config(tmp_path, "omitting", layout)
    expected = _run(world, omitting, Fault(omitted=3))
    assert _whole(skipped) == _whole(expected)
    assert (skipped[0].step, skipped[0].adam_step, skipped[0].error) == (6, 5, "")
    assert skipped[0].guard == GuardState(last_bad_step=3, skipped_steps=1)
    after, known = _rows(skipping), _rows(omitting)
    assert [one for one in after if one["step"] != 3] == [one for one in known if one["step"] != 3]
    assert math.isnan(after[2]["train/loss"])
    rows = read_rows(skipping.run.folder / "metrics.jsonl")
    assert [row.get("guard/skipped_steps") for row in rows] == [None, None, 1, 1, 1, 1]
    untouched = _run(world, _config(tmp_path, "untouched", layout), Fault())
    assert _whole(untouched) != _whole(expected)


def test_what_is_known_of_a_bad_step_is_written_down(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "skipping", "PP2 EP2")
    ended = _run(world, config, Fault([19]))
    assert incidents(config.run.folder) == ["step_00000003_1.json"]
    record = _incident(config, 3)
    assert (record["step"], record["consumed_samples"], record["action"]) == (3, 16, "skip")
    assert (record["loss"], record["grad_norm"]) == ("NaN", "NaN")
    found = sorted(one for each in record["microbatches"] for one in each["sample_ids"])
    assert found == list(range(16, 24))
    bad = [each for each in record["microbatches"] if each["loss"] == "NaN"]
    assert bad == [{"rank": 3, "sample_ids": [19], "loss": "NaN"}]
    # The embedding's NaN reaches the first mixture on the rank of that microbatch.
    assert record["router_logits_not_finite"][0] == {"layer": 1, "rank": 1, "num_tokens": 24}
    gradients = record["gradients"]
    assert gradients["embedding.word_embeddings.weight"]["num_not_finite"] > 0
    assert "moe/expert_load_max_over_mean/layer_01" in record["routing"]
    [alert] = ended[0].alerts
    assert alert.startswith("step 3: the loss is nan, the gradient norm is nan; layer 1 on rank 1")
    assert "its update is omitted" in alert
    assert alert.endswith(f"written down in {config.run.folder}/incidents/step_00000003_1.json")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rolled_back_is_as_if_the_samples_had_been_skipped_from_there(
    world: World, tmp_path: Path, layout: str
) -> None:
    """The fifth step is bad, the checkpoint before it is that of the third."""
    rolling = _config(
        tmp_path, "rolling", layout, "guards.non_finite=rollback", "checkpoint.every_steps=3"
    )
    rolled = _run(world, rolling, Fault([35]))
    assert rolled[0].skip_list == ((35, 36),)
    skipping = _config(tmp_path, "skipping", layout, "data.skip=[[35,36]]")
    expected = _run(world, skipping, Fault([35]))
    assert _whole(rolled) == _whole(expected)
    assert (rolled[0].step, rolled[0].adam_step) == (6, 6)
    assert rolled[0].guard == GuardState(last_bad_step=5, rollbacks=1)
    assert _rows(rolling) == _rows(skipping)
    assert _incident(rolling, 5)["skipped_samples"] == [[35, 36]]
    assert [path.name for path in (rolling.run.folder / "logs").glob("metrics_*")] == [
        "metrics_after_step_00000003_1.jsonl"
    ]
    state = newest_intact(rolling.run.checkpoint_folder).state
    assert state is not None
    assert (state.skip_list, state.guard) == (((35, 36),), rolled[0].guard)


def test_a_spike_costs_the_samples_before_it_too(world: World, tmp_path: Path) -> None:
    """Those of steps 5 and 6 go, the checkpoint of step 5 moves aside, that of step 4 is used."""
    common = ("checkpoint.every_steps=1", *SPIKES)
    more = "guards.spike.offending_steps=2"
    rolling = _config(tmp_path, "rolling", "DP2", more, *common)
    rolled = _run(world, rolling, Fault([44], "spike"))
    assert rolled[0].skip_list == ((32, 48),)
    record = _incident(rolling, 6)
    assert record["reason"].startswith(f"the loss is {record['loss']:.4f}, above ")
    assert record["where"] == ""
    skip = "data.skip=[[32,48]]"
    expected = _run(world, _config(tmp_path, "skipping", "DP2", skip, *common), Fault())
    assert _whole(rolled) == _whole(expected)
    assert rolled[0].guard.losses == expected[0].guard.losses, "those of the checkpoint, and two"
    names = sorted(path.name for path in rolling.run.checkpoint_folder.iterdir())
    aside = [name for name in names if not name.startswith("step_")]
    assert aside == ["rolled_back_step_00000005"]


def test_a_window_ends_at_the_only_checkpoint_there_is(world: World, tmp_path: Path) -> None:
    more = ("guards.spike.offending_steps=5", "checkpoint.every_steps=3", "recipe.num_steps=7")
    config = _config(tmp_path, "rolling", "DP2", *more, *SPIKES)
    rolled = _run(world, config, Fault([44], "spike"))
    assert rolled[0].skip_list == ((24, 48),)
    assert (rolled[0].step, rolled[0].error) == (7, "")


def test_without_a_rule_a_spike_is_trained_on(world: World, tmp_path: Path) -> None:
    ended = _run(world, _config(tmp_path, "plain", "DP2"), Fault([44], "spike"))
    assert (ended[0].adam_step, ended[0].guard) == (6, GuardState())


def test_a_spike_is_skipped(world: World, tmp_path: Path) -> None:
    spikes = ("guards.spike.action=skip", *SPIKES[1:])
    skipped = _run(world, _config(tmp_path, "skipping", "DP2", *spikes), Fault([36], "spike"))
    expected = _run(world, _config(tmp_path, "omitting", "DP2"), Fault(omitted=5))
    assert _whole(skipped) == _whole(expected)
    assert skipped[0].guard.skipped_steps == 1
    assert len(skipped[0].guard.losses) == 3


def test_too_many_bad_steps_in_a_row_stop_the_run(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "bad", "PP2 EP2", "guards.max_in_a_row=2")
    ended = _run(world, config, Fault(range(16, 48)))
    _whole(ended)
    assert ended[0].step == 4
    assert ended[0].error.startswith(
        "step 5: the loss is nan, the gradient norm is nan; bad step 3 in a row"
    )
    assert "guards.max_in_a_row is 2" in ended[0].error
    assert _incident(config, 5)["action"] == "stop"
    assert layout.complete_checkpoints(config.run.checkpoint_folder) == []


def test_rollbacks_that_lead_nowhere_stop_the_run(world: World, tmp_path: Path) -> None:
    """Step 3 is bad, then again with other samples, and again."""
    more = ("guards.non_finite=rollback", "guards.max_in_a_row=2", "checkpoint.every_steps=1")
    config = _config(tmp_path, "bad", "DP2", *more)
    ended = _run(world, config, Fault(range(16, 48)))
    _whole(ended)
    assert (ended[0].step, ended[0].guard.rollbacks) == (2, 2)
    assert ended[0].skip_list == ((16, 32),)
    assert "bad step 3 in a row" in ended[0].error
    assert len(incidents(config.run.folder)) == 3


def test_nothing_to_go_back_to_stops_the_run(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "bad", "DP2", "guards.non_finite=rollback")
    ended = _run(world, config, Fault([19]))
    _whole(ended)
    assert "there is no checkpoint of step 2 or an earlier one" in ended[0].error


def test_a_resumed_run_remembers(world: World, tmp_path: Path) -> None:
    """Bad steps in a row, and the losses that spikes are held against, in another layout too."""
    spikes = ("guards.spike.action=skip", *SPIKES[1:])
    fault = Fault([36], "spike")
    straight = _config(tmp_path, "straight", "DP2", *spikes)
    expected = _run(world, straight, fault)
    resumed = _config(tmp_path, "resumed", "DP2", *spikes)
    halfway = _run(world, resumed, Fault([36], "spike", stop_at=4))
    state = newest_intact(resumed.run.checkpoint_folder).state
    assert state is not None
    assert state.guard == halfway[0].guard
    assert len(state.guard.losses) == 3
    ended = _run(world, resumed, fault)
    assert _whole(ended) == _whole(expected)
    assert (ended[0].guard, _rows(resumed)) == (expected[0].guard, _rows(straight))
    again = _config(tmp_path, "resumed", "PP2 EP2", *spikes, "recipe.num_steps=7")
    assert _run(world, again, Fault(stop_at=6))[0].guard == ended[0].guard


OURS = "decoder.final_layernorm.weight"
EXPERTS = "decoder.layers.1.mlp.experts.fc1"


@pytest.mark.parametrize(
    ("size", "overrides", "rank", "name", "said"),
    [
        (4, (), 2, OURS, "on rank 2 differ from those of its replicas"),
        (2, (), 1, OURS, "on ranks 0, 1 differ between replicas"),
        (4, ("parallel.ep=2",), 3, OURS, "on rank 3 differ from those of its replicas"),
        (4, ("parallel.ep=2",), 3, EXPERTS, "on ranks 1, 3 differ between replicas"),
        (4, ("parallel.pp=2",), 3, OURS, "on ranks 2, 3 differ between replicas"),
    ],
    ids=["DP4", "DP2", "EP2 DP4", "experts of EP2 DP4", "second stage of PP2 DP2"],
)
def test_one_flipped_bit_names_the_rank(
    world: World,
    tmp_path: Path,
    size: int,
    overrides: tuple[str, ...],
    rank: int,
    name: str,
    said: str,
) -> None:
    data = synthetic_folder(tmp_path / "data")
    common = (f"parallel.world_size={size}", *overrides)
    checked = run_config(tmp_path, data, "guards.replica_check_every_steps=2", *common)
    ended = world.run(_train, size, checked, Fault(flipped=(rank, 4, name)))
    for each in ended:
        assert each.step == 3
        assert each.error.startswith(f"step 4: parameters {said}: {name}. The run stops")
    assert _incident(checked, 4)["tensors"][0]["name"] == name
    assert layout.complete_checkpoints(checked.run.checkpoint_folder) == []
    unchecked = run_config(tmp_path, data, "run.name=unchecked", *common)
    assert world.run(_train, size, unchecked, Fault(flipped=(rank, 4, name)))[0].error == ""


def test_replicas_agree_while_nothing_happens(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "checked", "PP2 EP2", "guards.replica_check_every_steps=1")
    assert [each.error for each in _run(world, config, Fault())] == [""] * 4


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


def _reads(rank: int, config: RunConfig) -> Counter[str]:
    """Which functions of the trainer read a tensor on a step that is no row, and how often."""
    run = open_run(rank, config)
    found: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *rest: Any) -> Any:
            found[_caller()] += 1
            return original(tensor, *rest)

        return read

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(torch.Tensor, name, counted(name)))
        loop.train(run)
    close_run(run)
    return found


def _caller() -> str:
    """Of a read: the file and the function."""
    import sys  # noqa: PLC0415

    code = sys._getframe(2).f_code
    return f"{Path(code.co_filename).name}:{code.co_name}"


def test_guards_read_one_vector_a_step_and_nothing_else(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "read", "DP2", "monitor.log_every_steps=100", *SPIKES)
    [reads, _] = world.run(_reads, 2, config)
    assert reads["step.py:measure"] == 6
    of_guards = {"rule.py", "numbers.py", "incident.py", "replicas.py", "router.py"}
    assert [place for place in reads if place.split(":")[0] in of_guards] == []
    assert reads["zero.py:measure"] == 0
