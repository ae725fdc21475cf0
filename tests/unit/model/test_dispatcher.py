"""A dispatch where nothing travels: plans by kernels, and what the host reads for them."""

from pathlib import Path

import pytest
import torch

from dsv2_kernels.native.library import emulated
from dsv2_train.model.moe.dispatcher import LocalDispatch
from dsv2_train.ops.kernels import TorchOrKernel
from tests.helpers.host_reads import host_reads

TOKENS, NUM_EXPERTS, HIDDEN = 70, 40, 16


def _passed(
    routed: torch.Tensor, implementation: TorchOrKernel, num_rows: int | None = None
) -> tuple[list[torch.Tensor], list[str]]:
    """Rows, counts, gates, output and gradients of a dispatch; what was read for them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    gates = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).requires_grad_()
    with host_reads() as reads:
        dispatch = LocalDispatch(hidden, gates, routed, implementation, num_rows)
        rows = dispatch.arrived()
        dispatch.issue_combine(rows.rows * rows.gates.unsqueeze(1))
        output = dispatch.combined()
        gradients = torch.autograd.grad(output.square().sum(), [hidden, gates])
    return [*vars(rows).values(), output, *gradients], reads


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_a_plan_by_a_kernel_gives_the_same_dispatch(emulated_library: Path, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    routed = torch.rand(TOKENS, NUM_EXPERTS, generator=generator) < share
    expected, _ = _passed(routed, "torch")
    with emulated(emulated_library):
        found, _ = _passed(routed, "kernel", int(routed.sum()))
    for one, other in zip(found, expected, strict=True):
        # Sums of at most 40 terms of size one.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_number_of_rows_is_read_where_it_is_not_known(emulated_library: Path) -> None:
    routed = torch.arange(TOKENS).unsqueeze(1) % NUM_EXPERTS == torch.arange(NUM_EXPERTS)
    with emulated(emulated_library):
        assert _passed(routed, "kernel", TOKENS)[1] == []
        assert _passed(routed, "kernel")[1] == ["_local_scalar_dense"]
    assert _passed(routed, "torch", TOKENS)[1] == ["nonzero"]
