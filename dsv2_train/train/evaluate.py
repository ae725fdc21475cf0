"""Validation loss."""

import math

import torch

from dsv2_train.data.loader import batches
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase
from dsv2_train.distributed.collectives import all_sum
from dsv2_train.train.run import Run
from dsv2_train.train.step import forward_backward, mean_loss


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss per token of the first `recipe.eval_num_samples` validation samples.

    The same samples at any layout and any step; no token is dropped; the balance losses are not
    part of it. Collective.
    """
    recipe, dp = run.config.recipe, run.groups.dp
    num_microbatches = run.num_microbatches(recipe.eval_num_samples)
    data = batches(
        run.validation_split,
        consumed_samples=0,
        num_microbatches=num_microbatches,
        micro_batch_size=recipe.micro_batch_size,
        dp_rank=dp.rank(),
        dp_size=dp.size(),
    )
    for chunk in run.chunks:
        chunk.eval()
    with activity.phase(Phase.EVALUATION):
        reported = forward_backward(run, data, num_microbatches, forward_only=True)
        loss = all_sum(mean_loss(run, reported), run.world).item() / dp.size()
    for chunk in run.chunks:
        chunk.train()
    if run.monitor is not None and not math.isfinite(loss):
        run.monitor.alert("validation", f"step {run.clock.step}: the validation loss is {loss}")
    return loss
