"""The import contracts of pyproject.toml hold, and each one catches a violation of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, ROOT

LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

# Number of the contract, a file, and an import that only this contract forbids.
PLANTED = [
    (1, "model/build.py", "import dsv2_train.optim.build"),
    (1, "distributed/sharding.py", "import dsv2_train.data.sampler"),
    (1, "planner/report.py", "import dsv2_train.cli.compose"),
    (2, "recipe/yarn.py", "import torch"),
    (3, "monitor/metrics.py", "import megatron.core"),
    (3, "ops/attention.py", "import megatron.core"),
    (4, "data/corpus.py", "import hydra"),
    (5, "train/loop.py", "import wandb"),
    (6, "train/loop.py", "import omegaconf"),
    (7, "recipe/clock.py", "import pydantic"),
    (8, "cli/validate.py", "import torch"),
    (8, "planner/report.py", "import torch"),
    (9, "checkpoint/hf/mapping/names.py", "import transformers"),
    (10, "model/gpt.py", "import dsv2_kernels"),
    (11, "../kernels/dsv2_kernels/swiglu_gate.py", "import dsv2_train.ops"),
]


def broken_contracts(folder: Path) -> set[int]:
    done = subprocess.run(
        [LINT_IMPORTS, "--no-cache", "--config", "pyproject.toml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "kernels")},
        capture_output=True,
        text=True,
    )
    verdicts = re.findall(r"^(\d+) .* (KEPT|BROKEN)", done.stdout, flags=re.MULTILINE)
    assert len(verdicts) == len({number for number, _, _ in PLANTED}), done.stdout + done.stderr
    assert (done.returncode == 0) == all(verdict == "KEPT" for _, verdict in verdicts)
    return {int(number) for number, verdict in verdicts if verdict == "BROKEN"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in (PACKAGE, ROOT / "kernels" / "dsv2_kernels"):
        target = tmp_path / package.relative_to(ROOT)
        shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__", "built"))
    return tmp_path


def test_contracts_hold() -> None:
    assert broken_contracts(ROOT) == set()


@pytest.mark.parametrize(("number", "file", "line"), PLANTED)
def test_a_planted_import_breaks_its_contract_alone(
    copy: Path, number: int, file: str, line: str
) -> None:
    path = copy / "dsv2_train" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert broken_contracts(copy) == {number}
