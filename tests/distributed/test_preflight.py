"""A preflight of four ranks: what is wrong with one of them is found, and it is named."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dsv2_train.cli.preflight.report import PreflightError, Report
from dsv2_train.cli.preflight.suite import preflight, require_preflight
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.env import Env
from dsv2_train.train import loop
from tests.helpers import odd_ranks
from tests.helpers.corpus import synthetic_folder
from tests.helpers.odd_ranks import Oddity
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.tiny import TINY, tiny_config
from tests.helpers.world import ROOT, World

ODD = 2
LAYOUT = ("parallel.world_size=4", "parallel.pp=2", "parallel.ep=2", "parallel.schedule=1f1b")


def _env(rank: int) -> Env:
    return Env(rank, 4, rank, torch.device("cpu"))


def _preflight(rank: int, config: RunConfig, oddities: tuple[Oddity, ...]) -> Report:
    with ExitStack() as stack:
        for oddity in oddities if rank == ODD else ():
            stack.enter_context(oddity())
        return preflight(config, _env(rank))


def _reports(world: World, folder: Path, *oddities: Oddity, overrides: str = "") -> Report:
    """The report, which is the same on all ranks."""
    config = tiny_config(*LAYOUT, f"run.dir={folder}", *overrides.split())
    first, *others = world.run(_preflight, 4, config, oddities)
    assert all(other == first for other in others)
    return first


def _failures(report: Report) -> dict[str, str]:
    return {row.what: row.found for row in report.failed}


def test_ranks_that_are_alike_pass_in_seconds(world: World, tmp_path: Path) -> None:
    report = _reports(world, tmp_path)
    assert report.failed == []
    assert report.elapsed_s < 60
    shown = {row.what for row in report.rows if row.verdict == "-"}
    assert shown == {
        *("slowest large product", "link in a node", "link to the next stage, within a node"),
        *("all-reduce in a node", "all-to-all of experts, within a node"),
        *("disk, write", "disk, read"),
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("oddity", "what", "told"),
    [
        (odd_ranks.other_torch, "version of torch", r"2\.99\.0 on rank 2 \("),
        (odd_ranks.flipped_bits, "products of whole numbers", r"wrong on rank 2 \("),
    ],
)
def test_the_odd_rank_is_named(
    world: World, tmp_path: Path, oddity: Oddity, what: str, told: str
) -> None:
    failures = _failures(_reports(world, tmp_path, oddity))
    assert list(failures) == [what]
    assert re.search(told, failures[what])


def test_the_rank_with_another_clock_is_named(world: World, tmp_path: Path) -> None:
    """As far ahead as it is, to the error that is told: a busy machine answers late."""
    failures = _failures(_reports(world, tmp_path, odd_ranks.fast_clock))
    assert list(failures) == ["clock against rank 0's"]
    told = re.search(r"\+(\S+) s \(\+- (\S+)\), rank 2 \(", failures["clock against rank 0's"])
    assert told is not None
    offset_s, error_s = map(float, told.groups())
    # Both are told to four places.
    assert abs(offset_s - odd_ranks.SKEW_S) <= error_s + 1e-3


# A message of 8 MiB that comes half a second late goes at 0.017 GB/s; any other one of this machine
# is far above 0.05, as busy as it may be.
FAST_ENOUGH = "cluster.preflight.within_node_gb_per_s=0.05"


def test_slow_links_are_those_that_the_odd_rank_sends_over(world: World, tmp_path: Path) -> None:
    report = _reports(world, tmp_path, odd_ranks.slow_sends, overrides=FAST_ENOUGH)
    failures = _failures(report)
    assert list(failures) == ["link in a node", "link to the next stage, within a node"]
    targets = {what: re.search(r"rank 2 \(\S+\) -> rank (\d)", f) for what, f in failures.items()}
    assert [match and match[1] for match in targets.values()] == ["3", "0"]
    assert not any("are too slow" in found for found in failures.values())  # one of each kind
    assert _reports(world, tmp_path, overrides=FAST_ENOUGH).failed == []


def test_a_link_to_another_host_is_held_against_its_own_figure(
    world: World, tmp_path: Path
) -> None:
    """Rank 2 is a host of its own: links to it are slow, and this is expected of them."""
    between = f"{FAST_ENOUGH} cluster.preflight.between_nodes_gb_per_s=0.005"
    odd = (odd_ranks.own_host, odd_ranks.slow_sends)
    report = _reports(world, tmp_path, *odd, overrides=between)
    assert report.failed == []
    rows = {row.what: row.found for row in report.rows}
    assert "rank 2 (other) -> rank 0" in rows["link to the next stage, between nodes"]
    assert "2 nodes" in rows["all-reduce of all ranks, between nodes"]


def test_a_full_disk_is_named_with_its_host(world: World, tmp_path: Path) -> None:
    report = _reports(world, tmp_path, odd_ranks.own_host, odd_ranks.full_disk)
    failures = _failures(report)
    assert list(failures) == ["a file of 64 MiB"]
    assert re.search(rf"File too large in {tmp_path}, rank 2 \(other\)", failures.popitem()[1])
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_next_checkpoints_fails(world: World, tmp_path: Path) -> None:
    huge = "model.moe_intermediate_size=100000000000"
    assert list(_failures(_reports(world, tmp_path, overrides=huge))) == ["disk, room"]


def _train_after(rank: int, config: RunConfig) -> int:
    require_preflight(config, _env(rank))
    run = open_run(rank, config)
    loop.train(run)
    close_run(run)
    return run.clock.step


def test_a_run_trains_after_it(world: World, tmp_path: Path) -> None:
    config = run_config(tmp_path, synthetic_folder(tmp_path / "data"), *LAYOUT)
    assert world.run(_train_after, 4, config) == [6] * 4


def _refused(rank: int, config: RunConfig) -> str:
    with pytest.raises(PreflightError) as error:
        require_preflight(config, _env(rank))
    return str(error.value)


def test_every_rank_refuses_with_the_same_words(world: World, tmp_path: Path) -> None:
    config = tiny_config(
        *LAYOUT, f"run.dir={tmp_path}", "cluster.preflight.within_node_gb_per_s=1e6"
    )
    first, *others = world.run(_refused, 4, config)
    assert first.startswith("preflight FAILED: 4 of ")
    assert others == [first] * 3


def _line(program: list[str], folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = [*program, *TINY[:1], *TINY[2:], "parallel.world_size=2", "parallel.pp=2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*words, "parallel.ep=1", f"run.dir={folder}", *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
    )


def test_the_verb_ends_with_1_and_the_reason_when_something_fails(tmp_path: Path) -> None:
    verb = [sys.executable, "-m", "dsv2_train.cli.main", "preflight"]
    done = _line(verb, tmp_path, "cluster.preflight.within_node_gb_per_s=1e6")
    assert done.returncode == 1
    assert re.search(r"link in a node .* FAILED", done.stdout)
    assert "preflight FAILED: 3 of " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_begins_with_it_does_not_train_where_it_fails(tmp_path: Path) -> None:
    data = synthetic_folder(tmp_path / "data")
    done = _line(
        [str(ROOT / "launch" / "local.sh")],
        tmp_path,
        f"data.path={data}",
        "cluster.preflight.before_training=true",
        "cluster.preflight.within_node_gb_per_s=1e6",
    )
    assert done.returncode == 1
    assert "preflight FAILED" in done.stderr
    [run] = [path for path in tmp_path.iterdir() if path != data]
    files = {path.name for path in run.iterdir()}
    assert files == {"config.yaml", "logs", "attempts.jsonl", "owner.json.lock"}
