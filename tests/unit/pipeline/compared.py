"""A plan as it is proved, against the event simulation."""

from collections import defaultdict

from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.messages import with_messages
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.simulate import Simulation, simulate
from tests.unit.pipeline.events import World


def runs_as_simulated(plan: Plan, costs: Costs, receives_ahead: int) -> Simulation:
    """All its ops are there; both simulations end, with the same times and activations held."""
    for ops in plan.ops:
        assert_whole(plan, [(op.microbatch, op.chunk, op.kind) for op in ops])
    world = World(plan, costs, receives_ahead)
    assert world.run()
    found = simulate(plan, costs, with_messages(plan, receives_ahead))
    stages = zip(found.starts_s, found.ends_s, strict=True)
    # The same sums and maxima in the same order: equal to the bit.
    assert [list(zip(*spans, strict=True)) for spans in stages] == world.spans
    assert found.step_s == max(spans[-1][1] for spans in world.spans)
    held = [0] * len(plan.ops) if plan.forward_only else world.most_held
    assert found.peak_activations == tuple(held)
    return found


def assert_whole(plan: Plan, ops: list[tuple[int, int, Kind]]) -> None:
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    for microbatch, chunk, kind in ops:
        assert microbatch in range(plan.num_microbatches)
        assert chunk in range(plan.placement.num_chunks)
        kinds[microbatch, chunk].append(kind.value)
    assert len(kinds) == plan.num_microbatches * plan.placement.num_chunks
    allowed = [["F"]] if plan.forward_only else [["F", "B", "W"], ["F", "BW"]]
    assert all(each in allowed for each in kinds.values())
