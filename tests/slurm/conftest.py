"""One Slurm for all of these tests; they are skipped where it is not installed."""

import os
from collections.abc import Iterator

import pytest

from tests.helpers.slurm import Slurm, missing_programs
from tests.helpers.slurm_run import SlurmRun

# Nodes that no process is: sbatch --test-only places a job on them, as on a cluster that is asleep.
FAKE_NODES = """\
GresTypes=gpu
NodeName=f[0-255] NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=gpu Nodes=f[0-255] MaxTime=2-0
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_programs()
    for item in items:
        if "slurm" in item.keywords:
            if missing:
                item.add_marker(pytest.mark.skip(f"no Slurm here: no {', '.join(missing)}"))
            elif os.geteuid():
                item.add_marker(pytest.mark.skip("the daemons of Slurm need root"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), FAKE_NODES)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A run that was submitted and left alone until its end."""
    run = SlurmRun(slurm, tmp_path_factory.mktemp("undisturbed"))
    slurm.wait(run.submit(), "COMPLETED", timeout_s=run.PATIENCE_S)
    return run
