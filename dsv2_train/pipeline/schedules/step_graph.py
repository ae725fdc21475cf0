"""What is to be ordered, for a list scheduler: the ops of a step and what each of them needs.

The ops of one kind on one virtual stage, one for each microbatch, run in ascending order on one
stage: they are a queue. So a graph of queues is enough, and an order of a stage is a sequence of
queues.

A step with its time reversed is a step again. What needed an op is needed by it, the last
microbatch is the first, and an activation is held from W until F. So a scheduler that knows one
direction can pack a step from its end: it schedules the mirrored graph, and what it made is
mirrored back.
"""

import itertools
from dataclasses import dataclass, replace

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind

Queue = tuple[Kind, int]  # kind, virtual stage


@dataclass(frozen=True)
class StepGraph:
    """A step, forwards or mirrored in time.

    Attributes:
        placement: where the virtual stages are.
        num_microbatches: m, ops of a queue.
        costs: durations by virtual stage.
        max_activations: chunk activations that a stage may hold, at least the number of chunks.
        queues: all; of ops equally urgent a stage starts that of the earlier queue.
        edges: predecessor and successor: an op needs the predecessor's of the same microbatch.
        acquires: kind whose ops take room for an activation, from their start.
        releases: kind whose ops give it back.
    """

    placement: Placement
    num_microbatches: int
    costs: Costs
    max_activations: int
    queues: tuple[Queue, ...]
    edges: tuple[tuple[Queue, Queue], ...]
    acquires: Kind
    releases: Kind

    @property
    def num_ops(self) -> int:
        """Of all queues."""
        return len(self.queues) * self.num_microbatches

    def mirrored(self) -> "StepGraph":
        """The same step with its time reversed."""
        edges = tuple((after, before) for before, after in self.edges)
        return replace(self, edges=edges, acquires=self.releases, releases=self.acquires)


def step_graph(
    placement: Placement, num_microbatches: int, costs: Costs, max_activations: int
) -> StepGraph:
    """The graph of a training step; arguments as its attributes."""
    virtual_stages = range(placement.num_virtual_stages)
    weight_grads = (((Kind.B, idx), (Kind.W, idx)) for idx in virtual_stages)
    return StepGraph(
        placement,
        num_microbatches,
        costs,
        max_activations,
        queues=tuple(itertools.product((Kind.F, Kind.B, Kind.W), virtual_stages)),
        edges=(*itertools.pairwise(microbatch_path(placement)), *weight_grads),
        acquires=Kind.F,
        releases=Kind.W,
    )


def microbatch_path(placement: Placement) -> list[Queue]:
    """A microbatch's way through the model and back; each op needs the one before."""
    virtual_stages = range(placement.num_virtual_stages)
    forwards = [(Kind.F, idx) for idx in virtual_stages]
    return forwards + [(Kind.B, idx) for idx in reversed(virtual_stages)]
