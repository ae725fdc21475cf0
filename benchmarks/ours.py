"""This project's model, optimizer and schedule, built as a training run builds them."""

from collections.abc import Iterator
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.contender import Batch, Contender
from dsv2_train.config.run import RunConfig
from dsv2_train.optim.adam import choose_adam
from dsv2_train.optim.build import build_optimizer, wrap
from dsv2_train.pipeline.build import build_executor


class Ours(Contender):
    """One rank's training step, without data loading and logging.

    Args:
        config: the workload.
        model: from `build_model`; it is trained in place.
        groups: process groups of one rank.
    """

    name = "dsv2_train"

    def __init__(self, config: RunConfig, model: GPTModel, groups: ProcessGroupCollection) -> None:
        device = next(model.parameters()).device
        self.chunk = wrap(model, config.parallel, config.recipe.precision, groups)
        adam = choose_adam(config.optim.adam, device)
        self.optimizer = build_optimizer([self.chunk], config.optim, adam, groups)
        self.executor = build_executor(config, [self.chunk], device, timeout_s=60.0)
        self.config = config

    @override
    def forward_backward(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        reported = self.executor(
            forward_step_func=_forward_step,
            data_iterator=[iter([batch])],
            num_microbatches=1,
            seq_length=self.config.recipe.sequence_length,
            micro_batch_size=self.config.recipe.micro_batch_size,
            forward_only=False,
        )
        return reported[0]["loss"].item()

    @override
    def update(self) -> None:
        norm = self.optimizer.measure()[0]
        self.optimizer.update(self.config.optim.lr, norm)

    @override
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.chunk.parameters())


def _forward_step(data: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Any]:
    batch = next(data)
    token_losses = chunk(batch.tokens, position_ids=None, attention_mask=None, labels=batch.labels)

    def mean(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.mean()
        return loss, {"loss": loss.detach()}

    return token_losses, mean
