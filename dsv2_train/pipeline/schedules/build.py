"""The plan of a schedule by its name."""

from dsv2_train.config.placement import Placement
from dsv2_train.config.schedules import TRAITS, Layout, placement_shape, why_impossible
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.search import search
from dsv2_train.pipeline.simulate import peak_activations


def build_plan(
    schedule: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int,
    costs: Costs | None = None,
    max_activations: int | None = None,
) -> Plan:
    """Make the plan of a schedule; equal arguments give equal plans, on every rank.

    Args:
        schedule: a name of `config.schedules`.
        num_stages: p.
        num_microbatches: m.
        num_chunks: v, chunks on each stage.
        costs: durations by virtual stage, read by `search` alone, which needs them.
        max_activations: chunk activations that a stage may hold; for `search` p v if not given.

    Raises:
        ValueError: the schedule cannot run this, with what can; or it holds more activations.
    """
    refusal = why_impossible(
        Layout(schedule, num_stages, num_chunks, num_microbatches, max_activations=max_activations)
    )
    if refusal is not None:
        raise ValueError(str(refusal))
    place = Placement(num_stages, num_chunks, placement_shape(schedule, num_chunks))
    if TRAITS[schedule].is_searched:
        if costs is None:
            raise ValueError("costs: found None; search orders ops by their durations")
        most = place.num_virtual_stages if max_activations is None else max_activations
        return search(place, num_microbatches, costs, most)
    plan = fixed.build(schedule, place, num_microbatches)
    held = max(peak_activations(plan))
    if max_activations is not None and held > max_activations:
        raise ValueError(f"max_activations: found {max_activations}; {schedule} holds {held}")
    return plan


def build_forward_plan(placement: Placement, num_microbatches: int) -> Plan:
    """Make the plan of an evaluation: every microbatch forward through every chunk, no gradients.

    It is a training plan without its gradients, since no forward needs one.
    """
    schedule = "zb_v" if placement.shape == "v" else "interleaved_zb"
    plan = fixed.build(schedule, placement, num_microbatches)
    forwards = tuple(tuple(op for op in ops if op.kind is Kind.F) for ops in plan.ops)
    return Plan("forward", placement, num_microbatches, forwards)
