"""The experts of every token, and what balance losses and telemetry count of them.

`device_limited_topk(logits, ...) -> DeviceLimitedTopk`
"""

# T = S * B tokens, token s * B + b at position s of sequence b, E experts in D groups of E / D, M
# groups and K experts a token

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments
from dsv2_kernels.native.library import launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.native.workspace import zeros
from dsv2_kernels.reference import device_limited_topk as reference

# csrc/device_limited_topk.cu has the same: 16 slots a lane (FOR_SLOTS) of 32 lanes, and kMaxGroups.
MAX_EXPERTS, MAX_GROUPS = 512, 64
# Lane k holds the k-th expert: 32 would fit, 16 are tested.
MAX_TOP_K = 16
# Entropies below 8 in units of 2^-40 add up to less than 2^63 in a 64-bit word.
_MAX_POSITIONS = 2**20

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class DeviceLimitedTopk(NamedTuple):
    """Where tokens go. Gradient flows through `gates` and `affinity_sums`.

    Attributes:
        affinities: [T, E] float32, softmax over all experts.
        experts: [T, K] int64, best first.
        gates: [T, K] float32, affinities of `experts` times the scaling factor.
        expert_counts: [B, E] int32, tokens of the sequence that selected the expert.
        group_visits: [B, D] int32, tokens of the sequence with an expert in the group.
        affinity_sums: [B, E] float32, sums of affinities over the sequence; what a loss adds to
            their gradient is added to every token's affinities. NaN where a token's are.
        entropy_sums: [B] float32, sums over the sequence of the affinities' entropy in nats.
        bad_token_counts: [B] int32, tokens of the sequence whose affinities are NaN. They go to
            the lowest experts.
    """

    affinities: Tensor
    experts: Tensor
    gates: Tensor
    expert_counts: Tensor
    group_visits: Tensor
    affinity_sums: Tensor
    entropy_sums: Tensor
    bad_token_counts: Tensor


def device_limited_topk(
    logits: Tensor,
    *,
    num_sequences: int,
    num_groups: int,
    num_limited: int,
    top_k: int,
    scaling_factor: float,
) -> DeviceLimitedTopk:
    """The K best experts of the M groups that hold a token's best ones (DeepSeek-V2, section 2.2).

    Ties go to the lower index, of groups and of experts.

    Args:
        logits: [T, E] float32, bfloat16 or float16; computed in fp32. For kernels E is up to 512.
        num_sequences: B; for kernels up to 2^20 positions each.
        num_groups: D, for kernels up to 64.
        num_limited: M.
        top_k: K, up to M * E / D, for kernels up to 16.
        scaling_factor: of the gates, finite.

    Raises:
        TypeError, ValueError: a dtype, shape or number that is not supported; for kernels also a
            stride or an address.

    Note:
        Deterministic. Saves affinities and experts. No communication; one launch each way.
    """
    return DeviceLimitedTopk(
        *_forward(logits, num_sequences, num_groups, num_limited, top_k, scaling_factor)
    )


def device_limited_topk_backward(
    grad_gates: Tensor,
    affinities: Tensor,
    experts: Tensor,
    grad_affinity_sums: Tensor | None,
    *,
    scaling_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits.

    Args:
        grad_gates: [T, K] float32.
        affinities: [T, E] float32.
        experts: [T, K] int64.
        grad_affinity_sums: [B, E] float32, or None.
        scaling_factor: of the gates, finite.
        dtype: of the logits.

    Returns:
        [T, E] in `dtype`.

    Raises:
        TypeError, ValueError: as above; on a CPU also an expert that does not exist.
    """
    grad_logits: Tensor = _backward(
        grad_gates, affinities, experts, grad_affinity_sums, scaling_factor, dtype
    )
    return grad_logits


def _check_forward(
    arguments: Arguments,
    logits: Tensor,
    num_sequences: int,
    num_groups: int,
    num_limited: int,
    top_k: int,
    scaling_factor: float,
) -> None:
    arguments.tensor("logits", logits, [None, None], arguments.floats)
    num_tokens, num_experts = logits.shape
    _check_experts(arguments, "logits", num_experts)
    _check_sequences(arguments, "num_sequences", num_sequences, num_tokens)
    positions = num_tokens // num_sequences
    arguments.at_most("logits", positions, _MAX_POSITIONS, "positions of a sequence")
    divides = num_groups >= 1 and num_experts % num_groups == 0
    supported = f"divisors of {num_experts} experts"
    arguments.require(divides, "num_groups", num_groups, supported)
    arguments.at_most("num_groups", num_groups, MAX_GROUPS)
    limits = 1 <= num_limited <= num_groups
    arguments.require(limits, "num_limited", num_limited, f"1 to {num_groups} groups")
    reachable = num_limited * (num_experts // num_groups)
    arguments.require(1 <= top_k <= reachable, "top_k", top_k, f"1 to {reachable}")
    arguments.at_most("top_k", top_k, MAX_TOP_K)
    _check_factor(arguments, scaling_factor)


def _check_backward(
    arguments: Arguments,
    grad_gates: Tensor,
    affinities: Tensor,
    experts: Tensor,
    grad_affinity_sums: Tensor | None,
    scaling_factor: float,
    dtype: torch.dtype,
) -> None:
    arguments.tensor("affinities", affinities, [None, None], arguments.wide)
    (num_tokens, num_experts), device = affinities.shape, affinities.device
    _check_experts(arguments, "affinities", num_experts)
    arguments.tensor("experts", experts, [num_tokens, None], [torch.int64], device)
    top_k, dtypes = experts.size(1), [affinities.dtype]
    arguments.at_least_one("experts", top_k, "columns")
    arguments.at_most("experts", top_k, MAX_TOP_K, "columns")
    arguments.indices("experts", experts, num_experts)
    arguments.tensor("grad_gates", grad_gates, [num_tokens, top_k], dtypes, device)
    if grad_affinity_sums is not None:
        name, shape = "grad_affinity_sums", [None, num_experts]
        arguments.tensor(name, grad_affinity_sums, shape, dtypes, device)
        _check_sequences(arguments, name, grad_affinity_sums.size(0), num_tokens, "sequences")
    _check_factor(arguments, scaling_factor)
    arguments.dtype("dtype", dtype, arguments.floats)


def _check_experts(arguments: Arguments, name: str, num_experts: int) -> None:
    arguments.at_least_one(name, num_experts, "experts")
    arguments.at_most(name, num_experts, MAX_EXPERTS, "experts")


def _check_sequences(
    arguments: Arguments, name: str, num_sequences: int, num_tokens: int, what: str = ""
) -> None:
    divides = num_sequences >= 1 and num_tokens % num_sequences == 0
    found = f"{num_sequences} {what}".strip()
    arguments.require(divides, name, found, f"divisors of {num_tokens} tokens")


def _check_factor(arguments: Arguments, scaling_factor: float) -> None:
    finite = isfinite(scaling_factor)
    arguments.require(finite, "scaling_factor", scaling_factor, "finite numbers")


def _launch_forward(
    logits: Tensor,
    num_sequences: int,
    num_groups: int,
    num_limited: int,
    top_k: int,
    scaling_factor: float,
) -> Outputs:
    outputs = _fake_forward(logits, num_sequences, num_groups, num_limited, top_k, scaling_factor)
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        for output in outputs:
            output.zero_()
        return outputs
    words = num_sequences * (2 * num_experts + num_groups + 3)
    with zeros(words, logits.device) as workspace:
        launch(
            "device_limited_topk_forward",
            logits,
            *outputs,
            workspace,
            num_tokens // num_sequences,
            num_sequences,
            num_experts,
            num_groups,
            num_limited,
            top_k,
            scaling_factor,
            logits.dtype,
        )
    return outputs


def _launch_backward(
    grad_gates: Tensor,
    affinities: Tensor,
    experts: Tensor,
    grad_affinity_sums: Tensor | None,
    scaling_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    (num_tokens, num_experts), top_k = affinities.shape, experts.size(1)
    num_sequences = 1 if grad_affinity_sums is None else grad_affinity_sums.size(0)
    grad_logits = torch.empty_like(affinities, dtype=dtype)
    if num_tokens:
        launch(
            "device_limited_topk_backward",
            grad_gates,
            affinities,
            experts,
            grad_affinity_sums,
            grad_logits,
            num_tokens // num_sequences,
            num_sequences,
            num_experts,
            top_k,
            scaling_factor,
            dtype,
        )
    return grad_logits


def _fake_forward(
    logits: Tensor,
    num_sequences: int,
    num_groups: int,
    num_limited: int,
    top_k: int,
    scaling_factor: float,
) -> Outputs:
    num_tokens, num_experts = logits.shape
    floats = torch.promote_types(logits.dtype, torch.float32)

    def new(*shape: int, dtype: torch.dtype = floats) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return (
        new(num_tokens, num_experts),
        new(num_tokens, top_k, dtype=torch.int64),
        new(num_tokens, top_k),
        new(num_sequences, num_experts, dtype=torch.int32),
        new(num_sequences, num_groups, dtype=torch.int32),
        new(num_sequences, num_experts),
        new(num_sequences),
        new(num_sequences, dtype=torch.int32),
    )


def _fake_backward(
    grad_gates: Tensor,
    affinities: Tensor,
    experts: Tensor,
    grad_affinity_sums: Tensor | None,
    scaling_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(affinities, dtype=dtype)


_forward = register(
    "device_limited_topk",
    _check_forward,
    _launch_forward,
    reference.device_limited_topk,
    _fake_forward,
)
_backward = register(
    "device_limited_topk_backward",
    _check_backward,
    _launch_backward,
    reference.device_limited_topk_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    logits, *_, scaling_factor = inputs
    affinities, experts, _, _, _, _, entropy_sums, _ = output
    ctx.mark_non_differentiable(affinities, entropy_sums)
    # The gradient of an output that no loss uses is None, not zeros as large as the output.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(affinities, experts)
    ctx.scaling_factor, ctx.dtype = scaling_factor, logits.dtype


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    affinities, experts = ctx.saved_tensors
    grad_gates, grad_sums = grads[2], grads[5]
    if grad_gates is None:
        grad_gates = torch.zeros_like(experts, dtype=affinities.dtype)
    grad_logits = device_limited_topk_backward(
        grad_gates.contiguous(),
        affinities,
        experts,
        None if grad_sums is None else grad_sums.contiguous(),
        scaling_factor=ctx.scaling_factor,
        dtype=ctx.dtype,
    )
    return grad_logits, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
