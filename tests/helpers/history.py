"""What a run has left in its folder, to be held against that of another run."""

import json
from pathlib import Path
from typing import Any

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.integrity import open_verified


def trace(run_folder: Path) -> list[dict[str, Any]]:
    """Every row of a run's metrics without what depends on the clock on the wall."""
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k[:5] not in ("perf/", "mem/p")} for row in rows]


def last_step(run_folder: Path) -> int:
    """The step of the last row of metrics that is whole, 0 without one."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return next((int(json.loads(line)["step"]) for line in lines[::-1] if line.endswith("\n")), 0)


def final_tensors(run_folder: Path, num_steps: int) -> dict[str, int]:
    """Checksums of every tensor of the checkpoint at the end, which is at this step."""
    path = layout.latest_complete(run_folder / "checkpoints")
    assert path is not None and layout.step_of(path) == num_steps, path
    manifest, _ = open_verified(path)
    return {key: entry.checksum for key, entry in manifest.tensors.items()}
