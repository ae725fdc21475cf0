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
_SAME = 1e-5


@dataclass(frozen=True)
class StepTimes:
    """One contender's repeats.

    Attributes:
        first_loss: nats a token, before the first update.
        forward_backward: seconds to the last gradient.
        update: seconds to clip and step.
    """

    first_loss: float
    forward_backward: Times
    update: Times

    @property
    def step(self) -> Times:
        """Seconds of the full step."""
        return self.forward_backward + self.update


def compare(
    num_experts: int,
    sequence_length: int,
    peers: tuple[str, ...],
    groups: ProcessGroupCollection,
    repeats: int,
) -> dict[str, StepTimes]:
    """Time full steps of ours and of `peers` on one workload.

    Returns:
        By name; ours first.

    Raises:
        AssertionError: if a peer does not start from our loss or has other parameters.
    """
    config = workload(num_experts, sequence_length)
    device = torch.device("cpu")
    model = build_model(config, groups, choose(config.parallel, device), device)
    contenders = {name: PEERS[name](config, model, groups) for name in peers}
    runners = {"dsv2_train": _Runner(Ours(config, model, groups), config)}
    runners |= {name: _Runner(peer, config) for name, peer in contenders.items()}
    alternate([runner.step for runner in runners.values()], repeats)
    times = {name: runner.times() for name, runner in runners.items()}
    _check_fairness(times, [runner.contender for runner in runners.values()])
    return times


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
            first_loss=self.losses[0],
            forward_backward=Times(tuple(pair[0] for pair in measured)),
            update=Times(tuple(pair[1] for pair in measured)),
        )


def _check_fairness(times: dict[str, StepTimes], contenders: list[Contender]) -> None:
    sizes = {contender.num_parameters() for contender in contenders}
    assert len(sizes) == 1, f"parameters differ: {sizes}"
    ours = times["dsv2_train"].first_loss
    for name, one in times.items():
        allowed = MAX_LOSS_DIFFERENCE.get(name, _SAME)
        difference = abs(one.first_loss - ours)
        assert difference <= allowed, f"{name} starts {difference} nats away, allowed {allowed}"
