"""Full training steps: ours, transformers' and megatron-core's, alternating in one process."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.contender import Batch, Contender
from benchmarks.megatron_peer import MegatronPeer
from benchmarks.ours import Ours
from benchmarks.timing import Times, alternate
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.workload import batches, workload
from dsv2_train.config.run import RunConfig
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose

OURS = "dsv2_train"

Make = Callable[[RunConfig, GPTModel, ProcessGroupCollection], Contender]

PEERS: dict[str, Make] = {
    "transformers": lambda config, model, groups: TransformersPeer(config, model),
    "transformers, foreach AdamW": lambda config, model, groups: TransformersPeer(
        config, model, adam="foreach"
    ),
    "transformers, eager experts": lambda config, model, groups: TransformersPeer(
        config, model, experts="eager"
    ),
    "megatron-core": MegatronPeer,
}

# Losses before the first step, from the same weights. megatron-core ranks device groups by a sum
# instead of the maximum, so that some tokens see other experts.
MAX_LOSS_DIFFERENCE = {"megatron-core": 1e-3}
# By precision: other orders of the same sums; in bf16 a logit is known to three digits.
_SAME = {"fp32": 1e-5, "bf16": 2e-3}


@dataclass(frozen=True)
class StepTimes:
    """One contender's repeats.

    Attributes:
        forward_backward: seconds to the last gradient.
        update: seconds to clip and step.
    """

    forward_backward: Times
    update: Times

    @property
    def step(self) -> Times:
        """Seconds of the full step."""
        return self.forward_backward + self.update


def compare(
    config: RunConfig, peers: tuple[str, ...], groups: ProcessGroupCollection, repeats: int
) -> dict[str, StepTimes]:
    """Time full steps of ours and of `peers` on one workload.

    Returns:
        By name; ours first.

    Raises:
        AssertionError: if a peer does not start from our loss or has other parameters.
    """
    runners = _runners(config, peers, groups)
    alternate([runner.step for runner in runners.values()], repeats)
    _check_fairness(runners)
    return {name: runner.times() for name, runner in runners.items()}


def compare_experts(
    num_experts: tuple[int, ...],
    sequence_length: int,
    peers: tuple[str, ...],
    groups: ProcessGroupCollection,
    repeats: int,
) -> dict[str, dict[int, Times]]:
    """Time forward and backward as experts are added that each token uses no more of.

    All sizes of all contenders alternate, so that sizes can be compared as contenders can.

    Returns:
        By name, then by number of experts.

    Raises:
        AssertionError: as `compare`.
    """
    by_experts = {
        count: _runners(workload(count, sequence_length), peers, groups) for count in num_experts
    }
    alternate(
        [runner.step for runners in by_experts.values() for runner in runners.values()], repeats
    )
    times: dict[str, dict[int, Times]] = {}
    for count, runners in by_experts.items():
        _check_fairness(runners)
        for name, runner in runners.items():
            times.setdefault(name, {})[count] = runner.times().forward_backward
    return times


def _runners(
    config: RunConfig, peers: tuple[str, ...], groups: ProcessGroupCollection
) -> dict[str, "_Runner"]:
    """Contenders on the same weights by name, ours first."""
    device = torch.device("cpu")
    model = build_model(config, groups, choose(config.parallel, device), device)
    contenders = {name: PEERS[name](config, model, groups) for name in peers}
    return {
        name: _Runner(contender, config)
        for name, contender in {OURS: Ours(config, model, groups), **contenders}.items()
    }


@dataclass
class _Runner:
    """A contender that notes when its gradients were ready."""

    contender: Contender
    config: RunConfig
    losses: list[float] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    data: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.data = batches(self.config, 4)

    def step(self) -> None:
        batch = self.data[len(self.losses) % len(self.data)]
        start_s = time.process_time()
        self.losses.append(self.contender.forward_backward(batch))
        middle_s = time.process_time()
        self.contender.update()
        self.seconds.append((middle_s - start_s, time.process_time() - middle_s))

    def times(self) -> StepTimes:
        measured = self.seconds[1:]  # the first turn of `alternate` warms up
        return StepTimes(
            forward_backward=Times(tuple(pair[0] for pair in measured)),
            update=Times(tuple(pair[1] for pair in measured)),
        )


def _check_fairness(runners: dict[str, _Runner]) -> None:
    sizes = {runner.contender.num_parameters() for runner in runners.values()}
    assert len(sizes) == 1, f"parameters differ: {sizes}"
    ours = runners[OURS]
    for name, runner in runners.items():
        allowed = MAX_LOSS_DIFFERENCE.get(name, _SAME[ours.config.recipe.precision])
        difference = abs(runner.losses[0] - ours.losses[0])
        assert difference <= allowed, f"{name} starts {difference} nats away, allowed {allowed}"
