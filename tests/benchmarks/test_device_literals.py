"""megatron-core's functions that name CUDA: rewritten, or reported when they no longer do."""

import pytest
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.moe import moe_utils

from benchmarks.device_literals import rewrite_constants, schedules_on_cpu


def test_a_function_without_the_literal_is_reported() -> None:
    with pytest.raises(LookupError, match="none of \\['cuda'\\] in it any more"):
        rewrite_constants({"cuda": "cpu"}, moe_utils.router_gating_linear)


def test_every_schedule_is_rewritten() -> None:
    schedules_on_cpu()
    for schedule in (
        schedules.forward_backward_no_pipelining,
        schedules.forward_backward_pipelining_without_interleaving,
        schedules.forward_backward_pipelining_with_interleaving,
    ):
        assert "cuda" not in schedule.__code__.co_consts
        assert "cpu" in schedule.__code__.co_consts
