"""Messages of a plan: who takes them, in which order receives are posted, and how early."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.messages import Message, post_places, with_messages
from dsv2_train.pipeline.plans import Kind, Op, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.simulate import simulate
from tests.unit.pipeline.drawn import fixed_plans, v2_costs
from tests.unit.pipeline.events import World


@settings(max_examples=40)
@given(plan=fixed_plans(max_microbatches=30), ahead=st.integers(1, 5))
def test_receives_are_posted_in_the_order_of_the_sends_and_before_they_are_waited_for(
    plan: Plan, ahead: int
) -> None:
    program = with_messages(plan, ahead)
    sent: dict[tuple[int, int], list[Message]] = {}
    posted: dict[tuple[int, int], list[Message]] = {}
    for actions in program:
        open_posts: set[Message] = set()
        kept: set[Message] = set()
        for action in actions:
            for message in action.posts:
                posted.setdefault((message.source, message.target), []).append(message)
            open_posts |= set(action.posts)
            if action.takes is not None:
                assert action.takes.taken_by == action.op
                (kept if action.takes.is_local else open_posts).remove(action.takes)
            if action.sends is not None:
                assert action.sends.made_by == action.op
                if action.sends.is_local:
                    kept.add(action.sends)
                    continue
                target = action.sends.target
                sent.setdefault((action.sends.source, target), []).append(action.sends)
        assert not open_posts and not kept
    assert posted == sent


def test_what_crosses_between_two_stages_of_a_v() -> None:
    """Activations of chunk 0 and gradients of chunk 1 go the same way; the turn stays at home."""
    program = with_messages(fixed.build("zb_v", Placement(2, 2, "v"), 1))
    sends = [action.sends for actions in program for action in actions if action.sends]
    assert [(e.source, e.target, str(e.made_by), str(e.taken_by)) for e in sends] == [
        (0, 1, "F of microbatch 0, chunk 0", "F of microbatch 0, chunk 0"),
        (0, 1, "B of microbatch 0, chunk 1", "B of microbatch 0, chunk 1"),
        (1, 1, "F of microbatch 0, chunk 0", "F of microbatch 0, chunk 1"),
        (1, 0, "F of microbatch 0, chunk 1", "F of microbatch 0, chunk 1"),
        (1, 1, "B of microbatch 0, chunk 1", "B of microbatch 0, chunk 0"),
        (1, 0, "B of microbatch 0, chunk 0", "B of microbatch 0, chunk 0"),
    ]


def test_a_backward_goes_to_whichever_the_other_stage_runs() -> None:
    place = Placement(2, 1, "loop")
    split = (Op(Kind.F, 0, 0), Op(Kind.B, 0, 0), Op(Kind.W, 0, 0))
    plan = Plan("by hand", place, 1, (split, (Op(Kind.F, 0, 0), Op(Kind.BW, 0, 0))))
    assert with_messages(plan)[1][1].sends == Message(1, 0, Op(Kind.BW, 0, 0), Op(Kind.B, 0, 0))
    simulate(plan, v2_costs(place))


@pytest.mark.parametrize(
    ("taken", "ahead", "places"),
    [
        ([1, 3, 5, 7], 1, [0, 2, 4, 6]),  # the next one when one is taken
        ([1, 3, 5, 7], 2, [0, 0, 2, 4]),
        ([5, 1, 6], 1, [0, 1, 6]),  # message 1 is needed while message 0 waits
        ([9, 1, 2, 3], 2, [0, 0, 2, 3]),  # message 0 keeps one of two places until it is taken
        ([9, 8, 1], 2, [0, 0, 1]),
        ([], 2, []),
    ],
)
def test_when_receives_are_posted(taken: list[int], ahead: int, places: list[int]) -> None:
    assert post_places(taken, ahead) == places


def test_stages_that_wait_for_their_sends_can_deadlock() -> None:
    """Why `Action.sends` lets nothing wait; four sends of a channel ahead do not help."""
    plan = fixed.build("interleaved_zb", Placement(16, 4, "loop"), 72)
    assert World(plan, v2_costs(plan.placement), 4).run()
    assert not World(plan, v2_costs(plan.placement), 4, max_unsent=4).run()
