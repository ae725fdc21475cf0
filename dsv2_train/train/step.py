"""One optimizer step, up to its update."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dsv2_train.data.loader import Batch, batches
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase, Place
from dsv2_train.recipe.clock import Point
from dsv2_train.recipe.exemption import is_exempt
from dsv2_train.train.run import Run
from dsv2_train.train.telemetry.telemetry import StepResult


def measure(run: Run, point: Point) -> StepResult:
    """Forward, backward and reduction of one global batch, up to its update.

    Args:
        run: the rank's run; the data position is its clock.
        point: what the recipe asks of this step.

    Returns:
        Loss and gradient norm, with which all ranks can decide the same.

    Note:
        Collective over all ranks; reads two numbers from the device, at once.
    """
    activity.begin_step(run.clock.step + 1)
    run.optimizer.zero_grad()
    num_microbatches = run.num_microbatches(point.global_batch_size)
    data = batches(
        run.train_split,
        consumed_samples=run.clock.consumed_samples,
        num_microbatches=num_microbatches,
        micro_batch_size=run.config.recipe.micro_batch_size,
        dp_rank=run.groups.dp.rank(),
        dp_size=run.groups.dp.size(),
    )
    with activity.phase(Phase.TRAINING):
        reported = forward_backward(
            run, run.telemetry.stopwatch.timed(data), num_microbatches, forward_only=False
        )
    with activity.phase(Phase.OPTIMIZER):
        measured = run.optimizer.measure(mean_loss(run, reported))
    grad_norm, loss = measured.tolist()
    return StepResult(
        loss=loss / run.groups.dp.size(),
        grad_norm=grad_norm,
        norm=measured[0],
        microbatch_losses=tuple(losses["loss"] for losses in reported),
    )


def forward_backward(
    run: Run, data: Iterator[Batch], num_microbatches: int, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Run microbatches through the pipeline; on the last stage, the loss of each."""
    return run.executor(
        forward_step_func=partial(_forward_step, run=run),
        data_iterator=itertools.tee(data, len(run.chunks)),
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
    data: Iterator[Batch], chunk: torch.nn.Module, run: Run
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """megatron-core's contract: the chunk's output, and how to make a loss of the last one's."""
    device = run.env.device
    with activity.working(Place.DATA):
        batch = next(data)
    output = chunk(
        batch.tokens.to(device),
        position_ids=None,
        attention_mask=None,
        labels=batch.labels.to(device),
        exempt=_exempt(batch, run) if chunk.training else None,
    )
    return output, _loss


def _exempt(batch: Batch, run: Run) -> Tensor | None:
    """[b] bool, samples of which no assignment is dropped; None where no sample loses any."""
    recipe, seed = run.config.recipe, run.config.run.seed
    if recipe.capacity_factor is None:
        return None
    flags = [is_exempt(sample, seed, recipe.exempt_share) for sample in batch.sample_ids.tolist()]
    return torch.tensor(flags, device=run.env.device)


def _loss(token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """[b, s] losses -> their mean, to differentiate and to report."""
    loss = token_losses.mean()
    return loss, {"loss": loss.detach().clone()}
