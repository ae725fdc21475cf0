import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv2_kernels.native import library
from dsv2_kernels.testing.numeric import assert_as_good
from dsv2_train.ops.kernels import TorchOrKernel
from dsv2_train.ops.latent_heads import latent_heads

S, B, HEADS, NOPE, ROPE, VALUE = 3, 2, 2, 3, 4, 2


def turn_one_pair_at_a_time(x: Tensor, angles: Tensor) -> Tensor:
    """Facts of the released model: adjacent channels rotate together."""
    turned = torch.empty_like(x)
    for position in range(x.size(0)):
        for pair in range(x.size(-1) // 2):
            cos, sin = math.cos(angles[position, pair]), math.sin(angles[position, pair])
            first, second = x[position, ..., 2 * pair], x[position, ..., 2 * pair + 1]
            turned[position, ..., 2 * pair] = first * cos - second * sin
            turned[position, ..., 2 * pair + 1] = first * sin + second * cos
    return turned


def random_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, kv, k_rope, angles."""
    torch.manual_seed(0)
    shapes = ((S, B, HEADS, NOPE + ROPE), (S, B, HEADS, NOPE + VALUE), (S, B, ROPE))
    q, kv, k_rope = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, kv, k_rope, torch.randn(S, ROPE // 2, dtype=torch.float64)


def test_equals_the_equations() -> None:
    q, kv, k_rope, angles = random_inputs()
    q_heads, k_heads, v_heads = latent_heads(q, kv, k_rope, angles.cos(), angles.sin())
    shared = turn_one_pair_at_a_time(k_rope, angles)
    for head in range(HEADS):
        turned_q = turn_one_pair_at_a_time(q[:, :, head, NOPE:], angles)
        expected = (
            torch.cat([q[:, :, head, :NOPE], turned_q], dim=-1),
            torch.cat([kv[:, :, head, :NOPE], shared], dim=-1),
            kv[:, :, head, NOPE:],
        )
        for heads, one in zip((q_heads, k_heads, v_heads), expected, strict=True):
            # Two products and a sum in fp64.
            torch.testing.assert_close(heads[:, :, head], one, rtol=0, atol=1e-14)


def test_gradients_are_those_of_the_outputs() -> None:
    q, kv, k_rope, angles = random_inputs()

    def run(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return latent_heads(q, kv, k_rope, angles.cos(), angles.sin())

    assert torch.autograd.gradcheck(run, (q, kv, k_rope))


def test_positions_of_a_head_are_consecutive_in_memory() -> None:
    q, kv, k_rope, angles = random_inputs()
    for heads in latent_heads(q, kv, k_rope, angles.cos(), angles.sin()):
        assert heads.permute(1, 2, 0, 3).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotates_in_the_precision_of_the_angles(dtype: torch.dtype) -> None:
    q, kv, k_rope, angles = random_inputs(dtype)
    q_heads, k_heads, _ = latent_heads(q, kv, k_rope, angles.cos().float(), angles.sin().float())
    assert q_heads.dtype == k_heads.dtype == dtype
    expected = turn_one_pair_at_a_time(q[..., NOPE:].double(), angles)
    # One rounding to the dtype of numbers below 8, and fp32 before it.
    torch.testing.assert_close(
        q_heads[..., NOPE:].double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps
    )
    (q_heads.sum() + k_heads.sum()).backward()
    assert q.grad is not None and q.grad.dtype == dtype
    assert k_rope.grad is not None and k_rope.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_is_as_good_as_torch(emulated_library: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = ((3, 2, 4, 24), (3, 2, 4, 24), (3, 2, 32))
    # Values that every dtype holds.
    parts = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    angles = torch.randn(3, 4)

    def run(implementation: TorchOrKernel, dtype: torch.dtype) -> list[Tensor]:
        q, kv, latents = (part.to(dtype, copy=True).requires_grad_() for part in parts)
        turns = [turn.to(torch.promote_types(dtype, torch.float32)) for turn in cosines_and_sines]
        heads = latent_heads(q, kv, latents[..., 24:], *turns, implementation)
        # Not ones: their sum over heads has no rounding.
        sum((each * each.detach()).sum() for each in heads).backward()
        return [*(each.detach() for each in heads), *(leaf.grad for leaf in (q, kv, latents))]

    cosines_and_sines = angles.cos(), angles.sin()
    with library.emulated(emulated_library):
        found = run("kernel", dtype)
    for ours, naive, exact in zip(
        found, run("torch", dtype), run("torch", torch.float64), strict=True
    ):
        assert ours.stride() == naive.stride()
        assert_as_good(ours, naive, exact)
