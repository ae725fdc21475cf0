"""Every AdamW that can serve a run, against the paper's equations in fp64."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dsv2_train.config.problems import ConfigError
from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.optim.adam import Adam, choose_adam, make_adam

NUM_STEPS = 20
CONFIG = OptimConfig(lr=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

# Size and scale of the gradient of each tensor, decayed or not: sizes around a vector register's,
# gradients that are zero, and as small as eps.
DECAYED = ((1, 1.0), (5, 1e-8), (1023, 1e-4), (16, 0.0))
UNDECAYED = ((1, 1e-8), (37, 1.0), (4096, 1e-2), (3, 0.0))

# At each of 20 steps about four roundings of 6e-8 reach a weight or a moment: 5e-6. Powers of beta
# and 1 - beta in fp32 add 6e-8 / (1 - 0.95), 1e-6.
TOLERANCE = 6e-6

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed (extra: offload)"
)
BACK_ENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("deepspeed_cpu", "cpu", marks=needs_deepspeed),
    pytest.param("torch", "cuda", marks=pytest.mark.gpu),
    pytest.param("te", "cuda", marks=pytest.mark.gpu),
    pytest.param("apex", "cuda", marks=pytest.mark.gpu),
]


def learning_rate(step: int) -> float:
    """Up, then down by a factor, as in a recipe."""
    return 1e-2 * min(step / 8, 1.0) * (0.316 if step > 15 else 1.0)


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size, _ in DECAYED + UNDECAYED]


def gradients(step: int) -> list[Tensor]:
    """fp32; all zero at one step."""
    generator = torch.Generator().manual_seed(100 + step)
    present = step != 11
    return [
        torch.randn(size, generator=generator) * scale * present
        for size, scale in DECAYED + UNDECAYED
    ]


@dataclass(frozen=True)
class Reading:
    """A way to read the paper; the defaults are the right one."""

    decay: str = "decoupled"
    counts_from: int = 1
    eps: str = "outside the root"


KINDS = ("exp_avg", "exp_avg_sq")
State = tuple[list[Tensor], list[Tensor], list[Tensor]]


def by_the_equations(reading: Reading) -> State:
    """Weights and both moments, fp64: algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101).

    The schedule multiplier times alpha is the learning rate, which multiplies the decay as well, as
    it does in every implementation here.
    """
    beta1, beta2 = CONFIG.beta1, CONFIG.beta2
    weights = [weight.double() for weight in start()]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    for step in range(1, NUM_STEPS + 1):
        count = step - 1 + reading.counts_from
        for index, gradient in enumerate(gradients(step)):
            decay = CONFIG.weight_decay if index < len(DECAYED) else 0.0
            weight, g = weights[index], gradient.double()
            if reading.decay == "in the gradient":
                g, decay = g + decay * weight, 0.0
            first[index] = m = beta1 * first[index] + (1 - beta1) * g
            second[index] = v = beta2 * second[index] + (1 - beta2) * g * g
            m, v = m / (1 - beta1**count), v / (1 - beta2**count)
            root = v.sqrt() + CONFIG.eps
            if reading.eps == "inside the root":
                root = (v + CONFIG.eps).sqrt()
            weights[index] = weight - learning_rate(step) * (m / root + decay * weight)
    return weights, first, second


def by(implementation: str, device: torch.device) -> State:
    """Weights and both moments after as many steps of an implementation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's packages, when they are imported
        try:
            choice = choose_adam(implementation, device)
        except ConfigError as error:
            pytest.skip(f"not run: {error}")
        params = [weight.to("cpu" if choice.on_host else device) for weight in start()]
        adam: Adam = make_adam(
            choice,
            [
                {"params": params[: len(DECAYED)], "weight_decay": CONFIG.weight_decay},
                {"params": params[len(DECAYED) :], "weight_decay": 0.0},
            ],
            CONFIG,
        )
    for step in range(1, NUM_STEPS + 1):
        for param, gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient.to(param.device)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step)
        adam.step()
    states = [adam.state[param] for param in params]
    assert {state[kind].dtype for state in states for kind in KINDS} == {torch.float32}
    return params, *([state[kind] for state in states] for kind in KINDS)


def largest_error(found: State, expected: State) -> float:
    """Of any element, relative to the largest of its tensor; of zeros, absolute."""
    errors = []
    for kind, expected_kind in zip(found, expected, strict=True):
        for some, true in zip(kind, expected_kind, strict=True):
            scale = true.abs().max().item() or 1.0
            errors.append((some.cpu() - true).abs().max().item() / scale)
    return max(errors)


@pytest.mark.parametrize(("implementation", "device"), BACK_ENDS)
def test_twenty_steps_are_the_paper_s(implementation: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("not run: no CUDA device")
    found = by(implementation, torch.device(device))
    assert largest_error(found, by_the_equations(Reading())) < TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [Reading(decay="in the gradient"), Reading(counts_from=2), Reading(eps="inside the root")],
    ids=str,
)
@pytest.mark.parametrize(("implementation", "device"), BACK_ENDS[:2])
def test_other_readings_are_seen(implementation: str, device: str, wrong: Reading) -> None:
    """Against a wrong reading the same comparison fails, by far."""
    found = by(implementation, torch.device(device))
    assert largest_error(found, by_the_equations(wrong)) > 100 * TOLERANCE
