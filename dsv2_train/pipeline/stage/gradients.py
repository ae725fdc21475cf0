"""When a chunk's gradients are reduced and its weights are gathered: as early as a plan allows."""

from collections.abc import Iterable
from typing import Protocol

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.ops.main_grad import Deferred


class GradientSync(Protocol):
    """Hears from a stage where a step is with a chunk's gradients and weights."""

    def gather_weights(self) -> None:
        """Start to gather weights: they are about to be read."""

    def begin(self) -> None:
        """Take the gradients that come from now on for incomplete ones."""

    def before_last_backward(self) -> None:
        """Take those of the next backward pass for the last: the chunk's last op is a BW."""

    def add_last(self, pending: Iterable[Deferred]) -> None:
        """Add these, which are the last: the chunk's last op is a W."""

    def finish(self) -> None:
        """Wait until gradients can be read."""


class ChunkSync:
    """A `GradientSync` for megatron-core's data-parallel wrapper of a chunk.

    The wrapper's hooks count a gradient as complete at the backward pass of the last microbatch,
    when a W that comes later has not added to it. So they are held back until the op that completes
    the chunk's gradients: a BW lets them go, a W counts weight by weight as it adds.

    Args:
        chunk: read against megatron-core 0.16.1.
    """

    def __init__(self, chunk: DistributedDataParallel) -> None:
        self._chunk = chunk
        self._has_peers = chunk.dp_group.size() > 1
        self._groups = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]

    def gather_weights(self) -> None:
        """Start to gather what the last update changed, layer by layer in the order of the forward
        pass, dense weights before those of experts.

        Note:
            Modules wait for their weights when they run. Over dp groups, where gathering overlaps;
            elsewhere the optimizer has gathered.
        """
        if not self._chunk.ddp_config.overlap_param_gather:
            return
        for groups in (self._chunk.bucket_groups, self._chunk.expert_parallel_bucket_groups):
            for group in reversed(groups):
                if not group.param_gather_dispatched:
                    group.start_param_sync()

    def begin(self) -> None:
        """Before the first gradient of a step."""
        self._set_last(False)

    def before_last_backward(self) -> None:
        """Before the BW that completes the gradients."""
        self._set_last(True)

    def add_last(self, pending: Iterable[Deferred]) -> None:
        """Add the last gradients; a bucket's reduction starts with the last weight in it."""
        gradients = list(pending)
        self._set_last(True)
        if not self._chunk.ddp_config.overlap_grad_reduce:
            for gradient in gradients:
                gradient.add()
            return
        deferred = {id(gradient.weight) for gradient in gradients}
        for parameter in self._chunk.params_with_grad:
            if id(parameter) not in deferred:
                self._count(parameter)
        for gradient in gradients:
            gradient.add()
            self._count(gradient.weight)

    def finish(self) -> None:
        """Wait until the gradients are reduced; start it where it does not overlap."""
        if self._has_peers:
            with activity.waiting(Place.GRADIENTS):
                self._chunk.finish_grad_sync()

    def _count(self, parameter: Tensor) -> None:
        self._chunk.param_to_bucket_group[parameter].register_grad_ready(parameter)

    def _set_last(self, is_last: bool) -> None:
        for group in self._groups:
            group.is_last_microbatch = is_last
