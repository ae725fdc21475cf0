"""How a preflight judges what ranks found, where no test machine has it: GPUs, many hosts."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.checkpoint.disk.layout import MARKER, step_folder
from dsv2_train.cli.preflight import verb
from dsv2_train.cli.preflight.clocks import Skew, judge_clocks
from dsv2_train.cli.preflight.device import Device, counted, judge_devices
from dsv2_train.cli.preflight.disk import Disk, Room, judge_disks, room_needed
from dsv2_train.cli.preflight.links import Link, Speed, judge_links, links_of, phases
from dsv2_train.cli.preflight.report import Report, Row, name_ranks
from dsv2_train.cli.preflight.versions import judge_versions
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.sections.cluster import PreflightConfig
from tests.helpers.tiny import tiny_config

HOSTS = ["a", "a", "b", "b"]
H800 = Device("cuda", "NVIDIA H800", 2, 80 << 30, 79 << 30, "", True, 600.0)


def devices(rank: int, changed: Device) -> list[Row]:
    found = [changed if each == rank else H800 for each in range(4)]
    return list(judge_devices(found, HOSTS, 2, "h800"))


def failures(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.what, row.found) for row in rows if row.verdict == "FAILED"]


def test_gpus_that_are_alike_and_healthy_pass() -> None:
    rows = devices(0, H800)
    assert {row.verdict for row in rows} == {"ok"}
    assert len(rows) == 7


@pytest.mark.parametrize(
    ("odd", "what", "told"),
    [
        (replace(H800, name="NVIDIA A800"), "device", "NVIDIA A800, rank 3 (b)"),
        (replace(H800, count=1), "GPUs of a node", "1 on rank 3 (b)"),
        (replace(H800, memory_bytes=40 << 30), "memory of a GPU, GiB", "40 on rank 3 (b)"),
        (replace(H800, free_bytes=60 << 30), "memory before the run", "taken on rank 3 (b)"),
        (replace(H800, health="3 x"), "GPU memory errors", "3 x, rank 3 (b)"),
        (replace(H800, is_right=False), "products of whole numbers", "wrong on rank 3 (b)"),
        (
            replace(H800, tflops=470.0),
            "slowest large product",
            "470 TFLOP/s, rank 3 (b); median 600",
        ),
    ],
)
def test_the_odd_gpu_is_named(odd: Device, what: str, told: str) -> None:
    assert failures(devices(3, odd)) == [(what, told)]


def test_gpus_that_are_all_slow_fail_by_their_peak() -> None:
    slow = replace(H800, tflops=400.0)  # of 989
    rows = list(judge_devices([slow] * 4, HOSTS, 2, "h800"))
    assert [what for what, _ in failures(rows)] == ["slowest large product"]


def test_ranks_without_a_gpu_fail_where_a_cluster_has_them() -> None:
    cpu = Device("cpu", "cpu", 0, 0, 0, None, True, 0.1)
    rows = list(judge_devices([cpu] * 4, HOSTS, 2, "h800"))
    assert [what for what, _ in failures(rows)] == ["device"]
    assert failures(list(judge_devices([cpu] * 4, HOSTS, 2, "cpu"))) == []


def test_health_that_is_not_known_is_not_judged() -> None:
    [row] = [row for row in devices(1, replace(H800, health=None)) if "errors" in row.what]
    assert row.verdict == "-"


def test_what_nvidia_smi_counts() -> None:
    assert counted("0, No, No\n") == ""
    assert counted("[N/A], [N/A], [N/A]\n") == ""
    told = "3 uncorrected memory errors; Yes rows of memory to be remapped, reset it"
    assert counted("3, Yes, No\n") == told


def test_every_version_that_differs_is_a_row_and_the_usual_one_is_not_blamed() -> None:
    usual = {"torch": "1", "python": "3"}
    found = [usual, {"torch": "2", "python": "3", "apex": "0"}, usual, {**usual, "python": "4"}]
    told = dict(failures(list(judge_versions(found, HOSTS))))
    assert told == {
        "version of apex": "0 on rank 1 (a); absent on 3 others",
        "version of python": "4 on rank 3 (b); 3 on 3 others",
        "version of torch": "2 on rank 1 (a); 1 on 3 others",
    }


def test_a_clock_is_not_blamed_for_a_slow_message() -> None:
    fast, unsure = Skew(0.6, 0.01), Skew(0.6, 0.2)
    still = Skew(0.0, 0.0)
    assert failures(list(judge_clocks([still, unsure, still, still], HOSTS, 0.5))) == []
    [(_, told)] = failures(list(judge_clocks([still, unsure, fast, still], HOSTS, 0.5)))
    assert told == "+0.6000 s (+- 0.0100), rank 2 (b)"


SINGLE = tiny_config().parallel
LAYOUTS = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])


@given(LAYOUTS, st.lists(st.sampled_from("abc"), min_size=8, max_size=8))
def test_every_link_is_measured_once_and_never_two_at_a_rank(
    layout: tuple[int, int], hosts: list[str]
) -> None:
    pp, ep = layout
    links = links_of(hosts, SINGLE.model_copy(update={"world_size": 8, "pp": pp, "ep": ep}))
    measured = [link for phase in phases(links) for link in phase]
    assert sorted(map(repr, measured)) == sorted(map(repr, links))
    for phase in phases(links):
        ends = [rank for link in phase for rank in (link.source, link.target)]
        assert len(ends) == len(set(ends))
    # All ranks send and receive on their node, and to the next stage where there is one.
    for rank in range(8):
        in_a_node = [link for link in links if "node" in link.what and link.source == rank]
        assert len(in_a_node) == (hosts.count(hosts[rank]) > 1)
        assert all(hosts[link.target] == hosts[rank] for link in in_a_node)
    stages = [link for link in links if "stage" in link.what]
    assert len(stages) == (8 if pp > 1 else 0)
    assert all((link.target - link.source) % 8 == 8 // pp for link in stages)


def test_a_long_ring_takes_few_phases() -> None:
    ring = [Link("link in a node", rank, (rank + 1) % 2048) for rank in range(2048)]
    assert len(phases(ring)) == 2
    assert len(phases([*ring[:6], Link("link in a node", 6, 0)])) == 3


def test_several_slow_links_are_counted_and_the_slowest_is_named() -> None:
    speeds = [Speed("link in a node", ends, s) for ends, s in (((0, 1), 9.0), ((1, 0), 8.0))]
    speeds.append(Speed("link in a node", (2, 3), 150.0))
    expected = PreflightConfig(within_node_gb_per_s=160.0)
    [(_, told)] = failures(list(judge_links(speeds, HOSTS, expected)))
    assert told == "8 GB/s, rank 1 (a) -> rank 0 (a); 2 of 3 are too slow"


DISK = Disk("runs", 1.0, 2.0, 100, "")


def test_the_slowest_disk_and_the_fullest_are_named() -> None:
    found = {0: DISK, 2: replace(DISK, write_gb_per_s=0.3, free_bytes=50)}
    expected = PreflightConfig(disk_gb_per_s=1.0)
    told = dict(failures(list(judge_disks(found, HOSTS, Room(30, 2), expected))))
    assert list(told) == ["disk, write", "disk, room"]
    assert all("rank 2 (b)" in found for found in told.values())
    assert failures(list(judge_disks(found, HOSTS, Room(25, 2), PreflightConfig()))) == []


def test_room_for_the_paper_s_checkpoints() -> None:
    """236B parameters: bf16 weights, fp32 masters and two moments, 14 bytes each."""
    room = room_needed(resolve(["experiment=dsv2_236b_pretrain"], need_data=False))
    assert room.checkpoint_bytes == pytest.approx(14 * 235.74e9, rel=1e-3)


def test_room_counts_what_is_there_already(tmp_path: Path) -> None:
    config = tiny_config(f"run.dir={tmp_path}", "checkpoint.keep_last=2")
    assert room_needed(config).num_checkpoints == 3
    for step in (1, 2, 3, 4):
        folder = step_folder(config.run.checkpoint_folder, step)
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("digest\n")
        assert room_needed(config).num_checkpoints == max(1, 3 - step)
    assert (
        room_needed(tiny_config(f"run.dir={tmp_path}", "checkpoint.keep_last=null")).num_checkpoints
        == 2
    )


def test_many_ranks_are_named_in_few_words() -> None:
    told = name_ranks(range(100), ["h"] * 100)
    assert told.startswith("rank 0 (h), rank 1 (h)") and told.endswith("rank 7 (h), 92 more")


def test_the_verdict_counts_what_was_judged() -> None:
    rows = [Row("a", "1", "1", "ok"), Row("b", "2", "", "-"), Row("c", "3", "4", "FAILED")]
    assert Report(rows, 1.0).verdict() == (
        "preflight FAILED: 1 of 2 checks in 1.0 s\n  c: 3; expected 4"
    )
    assert Report(rows[:2], 1.0).verdict() == "preflight passed: 1 checks in 1.0 s"


def test_the_verb_starts_one_node_s_ranks_or_a_rank_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = resolve(["experiment=dsv2_236b_pretrain"], need_data=False)
    monkeypatch.setattr(verb, "num_usable", lambda: 0)
    assert verb._num_ranks(config) == 8
    monkeypatch.setattr(verb, "num_usable", lambda: 7)
    assert verb._num_ranks(config) == 7
