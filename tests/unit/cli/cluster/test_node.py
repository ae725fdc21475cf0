"""A node's place in a job, from what Slurm says; how its ranks' end becomes a status."""

from pathlib import Path

import pytest

from dsv2_train.cli.cluster import node
from dsv2_train.cli.cluster.node import first_host, place_in_job
from dsv2_train.cli.launch import start
from dsv2_train.cli.launch.place import Place, fits, num_nodes_of
from dsv2_train.cli.launch.torchrun import Outcome
from dsv2_train.config.load import to_yaml
from tests.helpers.tiny import tiny_config
from tests.unit.cli.folders import write_checkpoint

JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "localhost,other",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n0", "n0"),
        ("n0,n1", "n0"),
        ("n[0-1]", "n0"),
        ("gpu[007-012,020],login1", "gpu007"),
        ("gpu[3,5-9]", "gpu3"),
        ("rack[1-2]n[03-14]", "rack1n03"),
        ("rack[1-2]-gpu.site", "rack1-gpu.site"),
        ("a-b1,c", "a-b1"),
    ],
)
def test_the_first_host_of_a_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_a_place_is_what_slurm_says() -> None:
    assert place_in_job(JOB) == Place(2, 1, "localhost:23456", "job_123456_0")
    assert place_in_job({**JOB, "SLURM_RESTART_COUNT": "2"}).launch_id == "job_123456_2"


def test_a_host_that_no_resolver_knows_is_met_at_its_address() -> None:
    place = place_in_job({**JOB, "SLURM_STEP_NODELIST": "no-such-host[1-2]"})
    assert place.endpoint == "10.0.0.1:23456"


def test_one_node_meets_alone_and_several_at_node_0() -> None:
    assert Place().rendezvous == ["--standalone"]
    options = [Place(2, at, "host:1", "id").rendezvous for at in range(2)]
    assert ["is_host=1" in str(each) for each in options] == [True, False]
    assert "--nnodes=2" in options[0] and "--rdzv-endpoint=host:1" in options[1]


@pytest.mark.parametrize(("num_nodes", "is_right"), [(1, False), (2, True), (3, False), (4, True)])
def test_ranks_are_equally_many_on_each_node(num_nodes: int, is_right: bool) -> None:
    config = tiny_config("parallel.world_size=4", "cluster.ranks_per_node=2")
    assert num_nodes_of(config) == 2
    assert (not list(fits(num_nodes)(config))) == is_right


@pytest.mark.parametrize(
    ("outcome", "last_step", "status"),
    [
        (Outcome(0, False), 40, 0),
        (Outcome(0, True), 40, 0),
        (Outcome(0, True), 20, 3),
        (Outcome(0, False), 20, 3),  # another node was asked
        (Outcome(1, True), 20, 1),
        (Outcome(2, False), 20, 2),
    ],
)
def test_a_status_says_whether_the_run_is_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, last_step: int, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("recipe.num_steps=40", "parallel.world_size=4", "parallel.pp=2", "parallel.ep=2")
    config = tiny_config(*words, "cluster.ranks_per_node=2", "data.path=data")
    Path("c.yaml").write_text(to_yaml(config))

    def run_ranks(_worker: object, num_ranks: int, log_dir: Path, *_: object) -> Outcome:
        assert (num_ranks, log_dir) == (2, config.run.folder / "logs/job_123456_0/node_1")
        write_checkpoint(config, last_step)
        return outcome

    monkeypatch.setattr(start, "run_ranks", run_ranks)
    for name, value in {**JOB, node.REFUSED: "refused"}.items():
        monkeypatch.setenv(name, value)
    assert node.main(["--config", "c.yaml"]) == status
    assert Path("refused").exists() == (status == 2)
    if last_step == 40:
        monkeypatch.setattr(start, "run_ranks", None)
        assert node.main(["--config", "c.yaml"]) == 0  # finished: nothing is started


def test_a_configuration_that_is_none_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert node.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: found None; must be a YAML file" in capsys.readouterr().err
