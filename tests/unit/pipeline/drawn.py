"""Layouts, costs and plans that hypothesis draws."""

from collections.abc import Sequence
from random import Random

from hypothesis import strategies as st

from dsv2_train.config.placement import Placement
from dsv2_train.config.schedules import SCHEDULES, TRAITS, placement_shape
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.build import build_forward_plan
from dsv2_train.pipeline.schedules.search import search

FIXED = [schedule for schedule in SCHEDULES if not TRAITS[schedule].is_searched]
CHUNKS = {"1f1b": [1], "zb_h1": [1], "zb_v": [2], "search": [1, 2, 3, 4]}


def placement(schedule: str, num_stages: int, num_chunks: int) -> Placement:
    return Placement(num_stages, num_chunks, placement_shape(schedule, num_chunks))


def v2_costs(place: Placement, communication_s: float = 0.0) -> Costs:
    """DeepSeek-V2's F : B : W with what it recomputes, chunks of equal cost."""
    return Costs.equal(place, 1.27, 2.02, 1.0, communication_s)


def bubble_of(idle: float, num_microbatches: int, work: float = 4.29) -> float:
    """Share of a step that is this idle on every stage."""
    return idle / (num_microbatches * work + idle)


@st.composite
def costs(draw: st.DrawFn, place: Placement) -> Costs:
    """Every virtual stage with costs of its own, some of them zero."""
    random = Random(draw(st.integers(0, 2**32)))
    zeros = draw(st.sampled_from([0.0, 0.1, 0.5]))

    def drawn() -> tuple[float, ...]:
        count = range(place.num_virtual_stages)
        return tuple(0.0 if random.random() < zeros else random.uniform(0, 10) for _ in count)

    return Costs(drawn(), drawn(), drawn(), draw(st.sampled_from([0.0, 0.1, 3.0])))


@st.composite
def placements(draw: st.DrawFn, schedule: str, max_stages: int = 32) -> Placement:
    num_stages = draw(st.integers(1, max_stages))
    return placement(schedule, num_stages, draw(st.sampled_from(CHUNKS.get(schedule, [2, 3, 4]))))


@st.composite
def fixed_plans(
    draw: st.DrawFn, max_microbatches: int = 128, schedules: Sequence[str] = FIXED
) -> Plan:
    """A schedule with a formula, for training or for evaluation."""
    schedule = draw(st.sampled_from(schedules))
    place, num_microbatches = draw(placements(schedule)), draw(st.integers(1, max_microbatches))
    if draw(st.integers(0, 5)) == 0:
        return build_forward_plan(place, num_microbatches)
    return fixed.build(schedule, place, num_microbatches)


@st.composite
def searched_plans(
    draw: st.DrawFn, max_placed: int, max_microbatches: int = 128
) -> tuple[Plan, Costs, int]:
    """A searched plan, what it was searched for, and how many activations a stage may hold."""
    place = draw(placements("search"))
    most = draw(st.integers(place.num_chunks, 2 * place.num_virtual_stages))
    num_microbatches, drawn = draw(st.integers(1, max_microbatches)), draw(costs(place))
    return search(place, num_microbatches, drawn, most, max_placed), drawn, most
