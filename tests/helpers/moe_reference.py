"""The mixture-of-experts layer in one process, written from the paper's equations, token by token.

It sees the concatenated microbatch of an expert-parallel group. Nothing of dsv2_train is used.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

# B sequences of S tokens, h hidden size, E experts, f width of one, F of the shared ones


@dataclass(frozen=True)
class Weights:
    """Of the whole layer: gate [E, h], fc1 [E, 2f, h] and fc2 [E, h, f], shared [2F, h], [h, F]."""

    gate: Tensor
    fc1: Tensor
    fc2: Tensor
    shared_fc1: Tensor
    shared_fc2: Tensor


@dataclass(frozen=True)
class Rules:
    """What the paper calls N_r, K_r, D, M, lambda, and the three alphas; the capacity factor."""

    top_k: int
    num_device_groups: int
    num_limited_devices: int
    routed_scaling_factor: float
    alphas: tuple[float, float, float]
    capacity_factor: float | None


def select(affinities: list[float], rules: Rules) -> list[int]:
    """Experts of one token, best first; ties to the lower index."""
    size = len(affinities) // rules.num_device_groups
    best = [
        max(affinities[group * size : (group + 1) * size])
        for group in range(rules.num_device_groups)
    ]
    groups = sorted(range(len(best)), key=lambda group: -best[group])[: rules.num_limited_devices]
    inside = [expert for expert in range(len(affinities)) if expert // size in groups]
    return sorted(inside, key=lambda expert: -affinities[expert])[: rules.top_k]


def dropped(
    chosen: list[list[int]], affinities: list[list[float]], exempt: list[bool], rules: Rules
) -> set[tuple[int, int]]:
    """(token, expert) pairs that exceed the budget of their device group (facts 3.4)."""
    if rules.capacity_factor is None:
        return set()
    num_groups, num_experts = rules.num_device_groups, len(affinities[0])
    mean = Fraction(rules.top_k * len(chosen), num_groups)
    budget = math.ceil(Fraction(str(rules.capacity_factor)) * mean)
    lost: set[tuple[int, int]] = set()
    for group in range(num_groups):
        pairs = [
            (token, expert)
            for token, experts in enumerate(chosen)
            for expert in experts
            if expert * num_groups // num_experts == group
        ]
        pairs.sort(key=lambda pair: (not exempt[pair[0]], -affinities[pair[0]][pair[1]]))
        lost |= {pair for pair in pairs[budget:] if not exempt[pair[0]]}
    return lost


def forward(
    hidden: Tensor, weights: Weights, exempt: list[bool], rules: Rules
) -> tuple[Tensor, Tensor, int]:
    """Run the layer.

    Args:
        hidden: [B, S, h], the sequences of the whole group.
        weights: of the whole layer.
        exempt: of each sequence.
        rules: see there.

    Returns:
        Output [B, S, h], the weighted balance losses [] (mean over sequences), and how many pairs
        were dropped.
    """
    length = hidden.size(1)
    tokens = hidden.flatten(0, 1)
    affinities = (tokens @ weights.gate.T).softmax(-1)
    rows = affinities.float().tolist()  # the order that decides is that of fp32
    chosen = [select(row, rules) for row in affinities.tolist()]
    of_token = [exempt[token // length] for token in range(len(chosen))]
    lost = dropped(chosen, rows, of_token, rules)
    outputs = []
    for token, experts in enumerate(chosen):
        x = tokens[token]
        output = _ffn(x, weights.shared_fc1, weights.shared_fc2)
        for expert in experts:
            if (token, expert) not in lost:
                gate = rules.routed_scaling_factor * affinities[token, expert]
                output = output + gate * _ffn(x, weights.fc1[expert], weights.fc2[expert])
        outputs.append(output)
    losses = [
        _balance(affinities[start : start + length], chosen[start : start + length], rules)
        for start in range(0, len(chosen), length)
    ]
    loss = torch.stack(losses).mean()
    return torch.stack(outputs).view(hidden.shape), loss, len(lost)


def _ffn(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = (fc1 @ x).chunk(2)
    return fc2 @ (gate * torch.sigmoid(gate) * up)


def _balance(affinities: Tensor, chosen: list[list[int]], rules: Rules) -> Tensor:
    """Equations 23 to 31 of one sequence, weighted."""
    length, num_experts = affinities.shape
    groups, size = rules.num_device_groups, num_experts // rules.num_device_groups
    share = affinities.mean(dim=0)
    expert = device = communication = affinities.new_zeros(())
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        f = [
            num_experts / (rules.top_k * length) * sum(i in experts for experts in chosen)
            for i in members
        ]
        sent = sum(any(i in experts for i in members) for experts in chosen)
        group_share = share[list(members)].sum()
        expert = expert + sum(f[i - members[0]] * share[i] for i in members)
        device = device + sum(f) / size * group_share
        scale = groups / (rules.num_limited_devices * length)
        communication = communication + scale * sent * group_share
    first, second, third = rules.alphas
    return first * expert + second * device + third * communication
