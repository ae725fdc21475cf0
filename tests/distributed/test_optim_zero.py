"""ZeRO-1 against an unsharded AdamW that is given the same gradients, in fp64."""

import dataclasses
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.toy import SHAPES
from tests.helpers.world import World
from tests.helpers.zero import Case, assemble, largest_error, reference, resume, train

Layout = tuple[int, int, int]

# World size, pipeline stages, expert-parallel ranks. Stages 0 and 3 of four have no experts.
LAYOUTS = [(1, 1, 1), (4, 1, 1), (2, 1, 2), (4, 1, 2), (4, 1, 4), (2, 2, 1), (4, 2, 2), (4, 4, 1)]

# A few ulps of fp32 (6e-8) per step, three steps. Weights hardly notice a wrong gradient scale
# (Adam divides it out), moments do.
TOLERANCE = 1e-6
KINDS = ("weight", "exp_avg", "exp_avg_sq")

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed (extra: offload)"
)


def kinds_of(precision: str) -> tuple[str, ...]:
    """What AdamW updates; bf16 weights are rounded masters."""
    return ("weight" if precision == "fp32" else "master", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlapped"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sharded_step_is_the_unsharded_step(world: World, layout: Layout, overlap: bool) -> None:
    case = Case(layout, overlap=overlap)
    results = world.run(train, layout[0], case, range(3))
    norms, expected = reference(case, 3)
    for found, _, _ in results:
        assert found == results[0][0]
        # Gradients are exact in fp32 here, so that the norm differs by fp64 rounding alone.
        assert found == pytest.approx(norms, rel=1e-13)
    for kind in KINDS:
        assert largest_error(results, expected, kind) < TOLERANCE, kind


@needs_deepspeed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_s_cpu_adam_serves_as_well(world: World, precision: str) -> None:
    case = Case((2, 1, 2), precision=precision, adam="deepspeed_cpu")
    straight = world.run(train, 2, case, range(3), timeout_s=400)  # it compiles its kernel
    _, expected = reference(case, 3)
    for kind in kinds_of(precision):
        assert largest_error(straight, expected, kind) < TOLERANCE, kind


@needs_deepspeed
@pytest.mark.parametrize(
    ("before", "after"),
    [("torch", "deepspeed_cpu"), ("deepspeed_cpu", "torch"), ("deepspeed_cpu", "deepspeed_cpu")],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_under_another_back_end(
    world: World, precision: str, before: str, after: str
) -> None:
    """Weights, moments and the count behind the bias correction mean the same to both."""
    first = Case((2, 1, 2), precision=precision, adam=before)
    saved = [state for _, state, _ in world.run(train, 2, first, range(2), timeout_s=400)]
    then = dataclasses.replace(first, adam=after)
    resumed = world.run(resume, 2, then, saved, range(2, 3), timeout_s=400)
    norms, expected = reference(then, 3)
    assert [found for found, _, _ in resumed] == [pytest.approx(norms[2:], rel=1e-13)] * 2
    for kind in kinds_of(precision):
        assert largest_error(resumed, expected, kind) < TOLERANCE, kind
    forgetful = [{**state, "adam_step": 0} for state in saved]
    wrong = world.run(resume, 2, then, forgetful, range(2, 3))
    assert largest_error(wrong, expected, kinds_of(precision)[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("layout", [(4, 2, 2), (4, 1, 2)], ids=str)
def test_bf16_weights_follow_fp32_masters(world: World, layout: Layout) -> None:
    case = Case(layout, precision="bf16")
    results = world.run(train, layout[0], case, range(3))
    _, expected = reference(case, 3)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert largest_error(results, expected, kind) < TOLERANCE, kind
    masters, _ = assemble(results, "master")
    rounded, _ = assemble(results, "weight")
    for name, master in masters.items():
        assert torch.equal(master.bfloat16().float(), rounded[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_element_has_one_owner_and_every_rank_the_same_weights(
    world: World, layout: Layout, precision: str
) -> None:
    results = world.run(train, layout[0], Case(layout, precision=precision), range(1))
    numels = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    for kind in (*KINDS, "master"):
        _, counts = assemble(results, kind)
        if kind == "master" and precision == "fp32":
            assert not counts, "an fp32 weight is its own master"
            continue
        assert {name: count.numel() for name, count in counts.items()} == numels
        assert all((count == 1).all() for count in counts.values()), kind
    whole, _ = assemble(results, "weight")
    for _, _, weights in results:
        for (name, offset), weight in weights.items():
            expected = whole[name][offset : offset + weight.numel()]
            assert torch.equal(weight.flatten().float(), expected), name


def test_a_gradient_below_the_threshold_is_not_clipped(world: World) -> None:
    case = Case((2, 1, 2), clip_grad_norm=1e6)
    results = world.run(train, 2, case, range(2))
    norms, expected = reference(case, 2)
    _, clipped = reference(dataclasses.replace(case, clip_grad_norm=norms[0] / 2), 2)
    assert max(norms) < 1e6
    assert largest_error(results, expected, "exp_avg") < TOLERANCE
    assert largest_error(results, clipped, "exp_avg") > 0.1


@pytest.mark.parametrize("bucket_size", [1, None])
def test_buckets_of_any_size(world: World, bucket_size: int | None) -> None:
    case = Case((4, 1, 2), bucket_size=bucket_size)
    results = world.run(train, 4, case, range(3))
    _, expected = reference(case, 3)
    for kind in KINDS:
        assert largest_error(results, expected, kind) < TOLERANCE, kind
    # With a bucket for each parameter, the first rank owns the beginning of all of them.
    owned_by_first = {key for key, *_ in results[0][1]["pieces"]}
    owns_of_all = {f"weight/{name}" for name in SHAPES} <= owned_by_first
    assert owns_of_all is (bucket_size == 1)


@pytest.mark.parametrize("sabotage", ["expert scale", "missing bucket"])
def test_the_comparison_sees_what_is_wrong(world: World, sabotage: str) -> None:
    case = Case((4, 1, 2), overlap=False, sabotage=sabotage)
    results = world.run(train, 4, case, range(1))
    norms, expected = reference(case, 1)
    assert results[0][0] != pytest.approx(norms, rel=1e-4)
    assert largest_error(results, expected, "exp_avg") > 0.1


@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlapped"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [(4, 2, 2), (4, 1, 2)], ids=str)
def test_resumed_is_straight_through_bit_for_bit(
    world: World, layout: Layout, precision: str, overlap: bool
) -> None:
    case = Case(layout, precision=precision, overlap=overlap)
    straight = world.run(train, layout[0], case, range(3))
    saved = [state for _, state, _ in world.run(train, layout[0], case, range(2))]
    resumed = world.run(resume, layout[0], case, saved, range(2, 3))
    for before, after in zip(straight, resumed, strict=True):
        (norms, state, weights), (norms_again, state_again, weights_again) = before, after
        assert norms_again == norms[2:]
        assert state_again["adam_step"] == state["adam_step"] == 3
        for one, other in zip(state["pieces"], state_again["pieces"], strict=True):
            assert one[:3] == other[:3]
            assert torch.equal(one[3], other[3]), one[0]
        for place, weight in weights.items():
            assert torch.equal(weight, weights_again[place]), place
