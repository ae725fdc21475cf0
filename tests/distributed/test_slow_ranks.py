"""A rank that is slow in one part of its steps is named, with that part; those who wait are not."""

import re
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from dsv2_train.config.run import RunConfig
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.ranks.parts import PARTS
from dsv2_train.monitor.rows import read_rows
from dsv2_train.train import loop
from tests.helpers import odd_ranks
from tests.helpers.corpus import synthetic_folder
from tests.helpers.odd_ranks import Oddity
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.world import World

ODD = 2
LAYOUTS = {
    "expert parallel": ("parallel.pp=1", "parallel.ep=2"),
    "pipeline": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=zb_h1"),
}
# A pause of 0.25 s makes a part of some milliseconds many times as long, also on slow cores. A rank
# can be slow by chance, not as much as that in two measured steps in a row.
RULE = (
    "monitor.slow_ranks.every_steps=2",
    "monitor.slow_ranks.min_ratio=3.0",
    "monitor.slow_ranks.min_share=0.05",
    "monitor.slow_ranks.patience=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_folder(tmp_path_factory.mktemp("slow") / "data")


def _train(rank: int, config: RunConfig, oddity: Oddity | None) -> list[str]:
    """The alerts of rank 0."""
    alerts: list[str] = []
    with ExitStack() as stack:
        if rank == ODD and oddity is not None:
            stack.enter_context(oddity())
        note = patch.object(Monitor, "alert", lambda _self, title, text: alerts.append(text))
        stack.enter_context(note)
        run = open_run(rank, config)
        loop.train(run)
        close_run(run)
    return [text for text in alerts if "is slow" in text]


def _alerts(
    world: World, folder: Path, data: Path, layout: str, oddity: Oddity | None
) -> tuple[list[str], RunConfig]:
    config = run_config(
        folder, data, "parallel.world_size=4", *LAYOUTS[layout], *RULE, "recipe.num_steps=9"
    )
    return world.run(_train, 4, config, oddity)[0], config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("oddity", "part"),
    [
        (odd_ranks.slow_data, "data"),
        (odd_ranks.slow_forward, "forward"),
        (odd_ranks.slow_backward, "backward"),
        (odd_ranks.slow_update, "optimizer"),
    ],
)
def test_the_slow_rank_and_its_part_are_told_once(
    world: World, tmp_path: Path, data: Path, layout: str, oddity: Oddity, part: str
) -> None:
    alerts, config = _alerts(world, tmp_path, data, layout, oddity)
    # Measured: steps 2, 4, 6 and 8; the second time in a row is enough.
    [told] = alerts
    found = re.match(rf"step ([468]): rank 2 \(\S+\) is slow: {part} takes ", told)
    assert found is not None, told
    rows = {row["step"]: row for row in read_rows(config.run.folder / "metrics.jsonl")}
    key = f"perf/{part}_max_over_median"
    assert [step for step, row in rows.items() if key in row] == [2, 4, 6, 8]
    assert rows[int(found[1])][key] > 3


def test_nobody_is_named_where_all_are_alike(world: World, tmp_path: Path, data: Path) -> None:
    alerts, config = _alerts(world, tmp_path, data, "pipeline", None)
    assert alerts == []
    measured = read_rows(config.run.folder / "metrics.jsonl")[1]
    assert {f"perf/{part}_max_over_median" for part in PARTS} <= set(measured)
