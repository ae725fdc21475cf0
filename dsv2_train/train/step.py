"""One optimizer step."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dsv2_train.data.loader import Batch, batches
from dsv2_train.recipe.clock import Point
from dsv2_train.train.run import Run
from dsv2_train.train.telemetry import StepResult


def train_step(run: Run, point: Point) -> StepResult:
    """Forward, backward, reduction, clipping and update of one global batch.

    Args:
        run: the rank's run; the data position is its clock.
        point: what the recipe asks of this step.

    Returns:
        Losses and gradient norm; nothing is read back to the host here.
    """
    run.optimizer.zero_grad()
    data = batches(
        run.train_split,
        consumed_samples=run.clock.consumed_samples,
        num_microbatches=run.num_microbatches,
        micro_batch_size=run.config.recipe.micro_batch_size,
        dp_rank=run.groups.dp.rank(),
        dp_size=run.groups.dp.size(),
    )
    reported = forward_backward(
        run, run.telemetry.data(data), run.num_microbatches, forward_only=False
    )
    update = run.optimizer.step(point.lr)
    return StepResult(loss=mean_loss(run, reported), grad_norm=update.grad_norm)


def forward_backward(
    run: Run, data: Iterator[Batch], num_microbatches: int, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Run micro-batches through the pipeline; on the last stage, the loss of each."""
    return run.forward_backward(
        forward_step_func=partial(_forward_step, device=run.env.device),
        data_iterator=data,
        num_microbatches=num_microbatches,
        seq_length=run.config.recipe.sequence_length,
        micro_batch_size=run.config.recipe.micro_batch_size,
        forward_only=forward_only,
    )


def mean_loss(run: Run, reported: list[dict[str, Tensor]]) -> Tensor:
    """[] mean of the reported losses; 0 on a stage that reports none."""
    if not reported:
        return torch.zeros((), device=run.env.device)
    return torch.stack([losses["loss"] for losses in reported]).mean()


def _forward_step(
    data: Iterator[Batch], chunk: torch.nn.Module, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """megatron-core's contract: the stage's output, and how to make a loss of the last one's."""
    batch = next(data)
    output = chunk(
        batch.tokens.to(device),
        position_ids=None,
        attention_mask=None,
        labels=batch.labels.to(device),
    )
    return output, _loss


def _loss(token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """[b, s] losses -> their mean, to differentiate and to report."""
    loss = token_losses.mean()
    return loss, {"loss": loss.detach().clone()}
