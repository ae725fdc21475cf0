"""The balance losses against equations 23 to 31, summed term by term."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.model.moe.balance_losses import balance_losses
from dsv2_train.model.moe.routing import routing_map, select_experts


def by_equation(s: torch.Tensor, chosen: torch.Tensor, d: int, m: int) -> tuple[float, ...]:
    """One sequence; s [T, N], chosen [T, K] expert ids."""
    t_count, n = s.shape
    k = chosen.size(1)
    size = n // d
    rows = [set(row) for row in chosen.tolist()]
    f = [n / (k * t_count) * sum(i in row for row in rows) for i in range(n)]
    p = [sum(float(s[t, i]) for t in range(t_count)) / t_count for i in range(n)]
    members = [range(g * size, (g + 1) * size) for g in range(d)]
    f_dev = [sum(f[j] for j in group) / size for group in members]
    p_dev = [sum(p[j] for j in group) for group in members]
    f_comm = [
        d / (m * t_count) * sum(any(j in row for j in group) for row in rows) for group in members
    ]
    return (
        sum(a * b for a, b in zip(f, p, strict=True)),
        sum(a * b for a, b in zip(f_dev, p_dev, strict=True)),
        sum(a * b for a, b in zip(f_comm, p_dev, strict=True)),
    )


@given(
    d=st.sampled_from([1, 2, 4]),
    size=st.integers(1, 4),
    tokens=st.integers(1, 7),
    sequences=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
@settings(max_examples=80)
def test_losses_equal_the_equations(
    d: int, size: int, tokens: int, sequences: int, seed: int, data: st.DataObject
) -> None:
    m = data.draw(st.integers(1, d))
    k = data.draw(st.integers(1, m * size))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, sequences, d * size, generator=generator, dtype=torch.float64)
    s = (2 * logits).softmax(-1)
    chosen = select_experts(s.flatten(0, 1), d, m, k)
    selected = routing_map(chosen, d * size).view(s.shape)
    ours = balance_losses(s, selected, m, d)
    per_sequence = [
        by_equation(s[:, b], chosen.view(tokens, sequences, k)[:, b], d, m)
        for b in range(sequences)
    ]
    expected = torch.tensor(per_sequence, dtype=torch.float64).mean(0)
    got = torch.stack([ours.expert, ours.device, ours.communication])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_perfect_balance_gives_one_each() -> None:
    # 24 tokens over 8 experts in 4 groups, each token two experts in two groups, all used evenly.
    experts = torch.tensor([[t % 4 * 2 + t // 12, (t + 1) % 4 * 2 + t // 12] for t in range(24)])
    selected = routing_map(experts, 8).unsqueeze(1)
    assert selected.sum(0).unique().tolist() == [6]
    losses = balance_losses(torch.full((24, 1, 8), 1 / 8), selected, 2, 4)
    assert [losses.expert.item(), losses.device.item(), losses.communication.item()] == (
        pytest.approx([1.0, 1.0, 1.0])
    )


def test_all_tokens_on_one_device() -> None:
    # f' = D and f'' = D / M there, and the whole probability is on it.
    selected = routing_map(torch.tensor([[0, 1]] * 5), 8).unsqueeze(1)
    affinities = torch.zeros(5, 1, 8)
    affinities[..., :2] = 0.5
    losses = balance_losses(affinities, selected, 2, 4)
    assert losses.device.item() == pytest.approx(4.0)
    assert losses.communication.item() == pytest.approx(2.0)


def test_the_published_model_in_perfect_balance_loses_0_073_a_layer() -> None:
    # Token t selects experts 2 t, 2 t + 60, 2 t + 120 (mod 160) and the one after each: two in each
    # of three groups of 20.
    experts = torch.tensor(
        [[(2 * t + 60 * j + i) % 160 for j in range(3) for i in range(2)] for t in range(160)]
    )
    selected = routing_map(experts, 160).unsqueeze(1)
    assert selected.sum(0).unique().tolist() == [6]
    losses = balance_losses(torch.full((160, 1, 160), 1 / 160), selected, 3, 8)
    weighted = 0.003 * losses.expert + 0.05 * losses.device + 0.02 * losses.communication
    assert weighted.item() == pytest.approx(0.073, rel=1e-6)


def test_values_worked_by_hand() -> None:
    # Four experts in two groups, K = 2, M = 2, two tokens. Token 0 has 0.5 0.1 0.3 0.1 and selects
    # experts 0 and 2; token 1 has 0.4 0.3 0.2 0.1 and selects 0 and 1.
    affinities = torch.tensor([[[0.5, 0.1, 0.3, 0.1]], [[0.4, 0.3, 0.2, 0.1]]])
    selected = routing_map(torch.tensor([[0, 2], [0, 1]]), 4).unsqueeze(1)
    losses = balance_losses(affinities, selected, 2, 2)
    # f = 4 / (2 * 2) * (2, 1, 1, 0), P = (0.45, 0.2, 0.25, 0.1).
    assert losses.expert.item() == pytest.approx(2 * 0.45 + 0.2 + 0.25)
    # f' = (3 / 2, 1 / 2), P' = (0.65, 0.35).
    assert losses.device.item() == pytest.approx(1.5 * 0.65 + 0.5 * 0.35)
    # f'' = 2 / (2 * 2) * (2, 1).
    assert losses.communication.item() == pytest.approx(0.65 + 0.5 * 0.35)


def test_gradient_flows_through_probabilities_only() -> None:
    """d L / d s_it is (f_i + f'_d + f''_d) / T of its sequence, over the sequences: counts stay."""
    generator = torch.Generator().manual_seed(3)
    affinities = torch.randn(6, 2, 8, generator=generator, dtype=torch.float64).softmax(-1)
    selected = routing_map(select_experts(affinities.flatten(0, 1), 4, 2, 3), 8).view(6, 2, 8)

    def total(x: torch.Tensor) -> torch.Tensor:
        losses = balance_losses(x, selected, 2, 4)
        return losses.expert + losses.device + losses.communication

    x = affinities.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(x), x)
    f = selected.sum(0) * 8 / (3 * 6)
    f_dev = f.view(2, 4, 2).mean(-1)
    f_comm = selected.view(6, 2, 4, 2).any(-1).sum(0) * 4 / (2 * 6)
    expected = (f + (f_dev + f_comm).repeat_interleave(2, dim=-1)) / (6 * 2)
    torch.testing.assert_close(gradient, expected.expand(6, 2, 8).double(), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(total, x)  # finite differences


def test_the_unrestricted_map_is_another_loss() -> None:
    # The trap: megatron-core computes its loss on a plain top-k map that ignores the device limit.
    generator = torch.Generator().manual_seed(0)
    affinities = torch.randn(64, 1, 16, generator=generator).softmax(-1)
    flat = affinities.flatten(0, 1)
    routed = routing_map(select_experts(flat, 4, 1, 3), 16).view(64, 1, 16)
    unrestricted = routing_map(flat.topk(3, dim=-1).indices, 16).view(64, 1, 16)
    on_routed = balance_losses(affinities, routed, 1, 4).communication
    assert on_routed.item() == pytest.approx(1.0, abs=0.05)
    assert balance_losses(affinities, unrestricted, 1, 4).communication > 2 * on_routed
