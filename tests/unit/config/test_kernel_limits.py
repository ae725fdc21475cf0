"""The largest sizes of our kernels: said by the configuration, the ops and their sources alike."""

import re

import pytest

from dsv2_kernels import device_limited_topk, dispatch_index, mla_rope
from dsv2_kernels.native.build import SOURCES
from dsv2_train.config.checks.kernels import LIMITS


def test_the_configuration_allows_what_the_ops_do() -> None:
    experts = min(device_limited_topk.MAX_EXPERTS, dispatch_index.MAX_EXPERTS)
    assert {field: most for field, (most, _) in LIMITS.items()} == {
        "num_routed_experts": experts,
        "num_device_groups": device_limited_topk.MAX_GROUPS,
        "num_experts_per_tok": device_limited_topk.MAX_TOP_K,
    }


@pytest.mark.parametrize(
    ("source", "name", "value"),
    [
        ("device_limited_topk.cu", "kMaxGroups", device_limited_topk.MAX_GROUPS),
        ("dispatch_index.cu", "kMaxExperts", dispatch_index.MAX_EXPERTS),
        ("common/launch.cuh", "kMaxThreads", mla_rope.MAX_ROPE_VECTORS),
    ],
)
def test_the_ops_allow_what_their_sources_do(source: str, name: str, value: int) -> None:
    found = re.search(rf"constexpr int {name} = (\d+);", (SOURCES / source).read_text())
    assert found is not None and int(found[1]) == value


def test_lanes_hold_as_many_experts_as_the_op_allows() -> None:
    slots = re.findall(r"kSlots = (\d+);", (SOURCES / "device_limited_topk.cu").read_text())
    assert 32 * max(map(int, slots)) == device_limited_topk.MAX_EXPERTS
