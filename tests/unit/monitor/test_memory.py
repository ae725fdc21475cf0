"""Peak memory of a rank."""

import resource

import torch

from dsv2_train.monitor.memory import peak_memory


def test_cpu_rank_reports_its_resident_set() -> None:
    row = peak_memory(torch.device("cpu"))
    assert list(row) == ["mem/peak_rss_gib"]
    with open("/proc/self/status") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    # Other pages may have come in between the two readings.
    assert abs(row["mem/peak_rss_gib"] - peak_kib / 2**20) < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
