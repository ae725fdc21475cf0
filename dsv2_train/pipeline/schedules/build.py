"""The plan of a schedule by its name."""

from dsv2_train.config.placement import Placement
from dsv2_train.config.schedules import TRAITS, placement_shape
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.search import search


def build_plan(
    schedule: str,
    placement: Placement,
    num_microbatches: int,
    *,
    costs: Costs,
    max_activations: int | None = None,
) -> Plan:
    """Make the plan of a schedule; equal arguments give equal plans, on every rank.

    Args:
        schedule: a name of `config.schedules`.
        placement: where the chunks are, as the schedule has them (`placement_shape`).
        num_microbatches: m.
        costs: durations by virtual stage; `search` orders ops by them.
        max_activations: chunk activations that a stage of `search` may hold; p v if not given.

    Raises:
        ValueError: the schedule cannot run this.
    """
    p, v, traits = placement.num_stages, placement.num_chunks, TRAITS[schedule]
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches: found {num_microbatches}; must be at least 1")
    if not traits.runs(v):
        raise ValueError(f"num_chunks: found {v}; must be {traits.allowed_chunks} for {schedule}")
    shape = placement_shape(schedule, v)
    if placement.shape != shape:
        raise ValueError(f"shape: found {placement.shape}; must be {shape} for {schedule}")
    if not traits.is_searched:
        return fixed.build(schedule, placement, num_microbatches)
    room = p * v if max_activations is None else max_activations
    if room < v:
        raise ValueError(f"max_activations: found {room}; must be at least num_chunks = {v}")
    return search(placement, num_microbatches, costs, room)


def build_forward_plan(placement: Placement, num_microbatches: int) -> Plan:
    """Make the plan of an evaluation: every microbatch forward through every chunk, no gradients.

    It is a training plan without its gradients, since no forward needs one.
    """
    schedule = "zb_v" if placement.shape == "v" else "interleaved_zb"
    plan = fixed.build(schedule, placement, num_microbatches)
    forwards = tuple(tuple(op for op in ops if op.kind is Kind.F) for ops in plan.ops)
    return Plan("forward", placement, num_microbatches, forwards)
