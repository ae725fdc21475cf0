"""The AdamW over shards against torch's, and which implementation a run gets."""

import re
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_train.config.problems import ConfigError
from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.optim.adam import Adam, FusedAdamW, choose_adam, make_adam, set_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def values(sizes: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def groups_of(params: list[Tensor], decay: float) -> list[dict[str, object]]:
    half = len(params) // 2
    return [
        {"params": params[:half], "weight_decay": decay},
        {"params": params[half:], "weight_decay": 0.0},
    ]


def train(adam: Adam | torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for param, gradient in zip(params, values([p.numel() for p in params], step), strict=True):
            param.grad = gradient
        for group in adam.param_groups:
            group["lr"] = 0.01 * (step + 1)
        adam.step()


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    beta1=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    num_steps=st.integers(1, 4),
)
def test_same_bits_as_torch_s_fused_adamw(
    sizes: list[int], beta1: float, decay: float, num_steps: int
) -> None:
    config = OptimConfig(lr=1.0, beta1=beta1, weight_decay=decay)
    ours, theirs = values(sizes, seed=99), values(sizes, seed=99)
    adam = make_adam(choose_adam("torch", CPU), groups_of(ours, decay), config)
    reference = torch.optim.AdamW(
        groups_of(theirs, decay), betas=(beta1, config.beta2), eps=config.eps, fused=True
    )
    train(adam, ours, range(num_steps))
    train(reference, theirs, range(num_steps))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adam.state[one][moment], reference.state[other][moment])


def test_bias_correction_follows_the_step_that_is_set() -> None:
    config = OptimConfig(lr=1.0)
    straight, resumed = values([50, 20], seed=1), values([50, 20], seed=1)
    one = make_adam(choose_adam("torch", CPU), groups_of(straight, 0.1), config)
    other = make_adam(choose_adam("torch", CPU), groups_of(resumed, 0.1), config)
    train(one, straight, range(2))
    for mine, theirs in zip(resumed, straight, strict=True):
        mine.copy_(theirs)
        for moment in ("exp_avg", "exp_avg_sq"):
            other.state[mine][moment].copy_(one.state[theirs][moment])
    set_step(other, 2)
    train(one, straight, range(2, 3))
    train(other, resumed, range(2, 3))
    assert all(map(torch.equal, straight, resumed))


def test_a_rank_without_shards_steps() -> None:
    adam = make_adam(choose_adam("torch", CPU), groups_of([], 0.1), OptimConfig(lr=1.0))
    adam.step()


def test_auto_on_a_cpu_is_torch() -> None:
    choice = choose_adam("auto", CPU)
    assert choice.implementation == "torch"
    assert choice.make is FusedAdamW
    assert choice.reason == "torch's fused AdamW serves the CPU"


@pytest.mark.parametrize(
    ("there", "chosen", "reason"),
    [
        (["te", "apex"], "te", "CUDA and te are there"),
        (["apex"], "apex", r"transformer_engine\.\S+ does not import.*; CUDA and apex are there"),
        ([], "torch", r"transformer_engine\.\S+ does not import.*; apex\.\S+ does not import.*"),
    ],
)
def test_auto_on_cuda_is_the_best_that_imports(
    monkeypatch: pytest.MonkeyPatch, there: list[str], chosen: str, reason: str
) -> None:
    modules = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}
    for name, path in modules.items():
        parts = path.split(".")
        for depth in range(len(parts)):
            module = ModuleType(".".join(parts[: depth + 1]))
            module.FusedAdam = f"{name}'s class"  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module if name in there else None)
    choice = choose_adam("auto", CUDA)
    assert choice.implementation == chosen
    assert choice.make == (FusedAdamW if chosen == "torch" else f"{chosen}'s class")
    assert re.fullmatch(reason, choice.reason)


@pytest.mark.parametrize(
    ("asked", "device", "why"),
    [
        ("te", CPU, "transformer_engine.pytorch.optimizers needs a CUDA device"),
        ("te", CUDA, "install the extra gpu"),
        ("apex", CUDA, "it comes with NVIDIA's PyTorch image"),
        ("deepspeed_cpu", CPU, "install the extra offload"),
    ],
)
def test_what_is_asked_for_and_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: torch.device, why: str
) -> None:
    for module in (
        "transformer_engine.pytorch.optimizers",
        "apex.optimizers",
        "deepspeed.ops.adam",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as raised:
        choose_adam(asked, device)
    (problem,) = raised.value.problems
    assert str(problem).startswith(f"optim.adam: found '{asked}'; not possible here: ")
    assert str(problem).endswith(why)
