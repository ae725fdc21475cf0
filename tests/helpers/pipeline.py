"""A step of the tiny model under any schedule, in fp64 or fp32, up to reduced gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose
from dsv2_train.optim.build import wrap
from dsv2_train.pipeline.build import build_executor
from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.plans import Op
from tests.helpers.gradients import Gradients, owned_gradients
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")
NUM_LAYERS = 8

# A hundred times the paper's: a loss that is scaled wrongly moves every gradient. Wide weights
# decide the router; some assignments are dropped.
_OVERRIDES = (
    f"model.num_layers={NUM_LAYERS}",
    "model.init_std=0.3",
    "recipe.expert_balance_alpha=0.3",
    "recipe.device_balance_alpha=5.0",
    "recipe.communication_balance_alpha=2.0",
    "recipe.capacity_factor=1.0",
    "recipe.micro_batch_size=1",
    "parallel.bucket_size=2000",
)


@dataclass(frozen=True)
class Stepped:
    """What a rank did: reduced gradients it owns, losses it saw, ops, deferred gradients.

    `num_matrices` are its weights whose gradients can be put off: all but those of norms.
    """

    gradients: Gradients
    losses: list[float]
    executed: tuple[Op, ...]
    num_deferred: int
    num_matrices: int


def pipeline_config(world_size: int, *overrides: str) -> RunConfig:
    return tiny_config(f"parallel.world_size={world_size}", *_OVERRIDES, *overrides)


class Pipeline:
    """One rank's stage, to be run step by step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.groups = process_groups.build(config.parallel, timeout_s=60)
        choices = choose(config.parallel, CPU)
        self.chunks = [
            wrap(
                build_model(config, self.groups, choices, CPU, chunk),
                config.parallel,
                config.recipe.precision,
                self.groups,
            )
            for chunk in range(config.parallel.chunks)
        ]
        self.executor: Executor = build_executor(config, self.chunks, CPU, timeout_s=60)

    def step(self, num_microbatches: int) -> Stepped:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        reported = self.executor(
            forward_step_func=self.forward_step,
            data_iterator=[iter(range(num_microbatches)) for _ in self.chunks],
            num_microbatches=num_microbatches,
            seq_length=self.config.recipe.sequence_length,
            micro_batch_size=1,
            forward_only=False,
        )
        losses = [losses["loss"].item() for losses in reported]
        num_matrices = sum(one.dim() > 1 for each in self.chunks for one in each.parameters())
        ran = self.executor.last
        assert ran is not None
        return Stepped(
            owned_gradients(self.chunks), losses, ran.executed, ran.num_deferred, num_matrices
        )

    def forward_step(self, data: object, chunk: torch.nn.Module) -> object:
        microbatch = next(data)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(1000 * self.groups.dp.rank() + microbatch)
        shape = (1, self.config.recipe.sequence_length)
        tokens, labels = (torch.randint(128, shape, generator=generator) for _ in range(2))
        output = chunk(
            tokens,
            position_ids=None,
            attention_mask=None,
            labels=labels,
            exempt=torch.tensor([microbatch % 3 == 1]),
        )

        def loss_of(token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = token_losses.mean()
            return loss, {"loss": loss.detach()}

        return output, loss_of


def run_steps(rank: int, config: RunConfig, counts: tuple[int, ...]) -> list[Stepped]:
    """Steps of so many microbatches, one after the other with the same weights."""
    pipeline = Pipeline(config)
    results = [pipeline.step(count) for count in counts]
    process_groups.destroy()
    return results
