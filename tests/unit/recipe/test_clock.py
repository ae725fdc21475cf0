"""A run driven by its clock against a run replayed from the paper's words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.config.run import RunConfig
from dsv2_train.recipe.clock import Clock, Schedule
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain")
LITE = preset("dsv2_lite_pretrain")
QUICKSTART = preset("quickstart")

# A run with everything the paper's has, in some fifty steps.
SHORT = preset(
    "quickstart",
    "recipe.num_steps=null",
    "recipe.num_tokens=200000",
    "recipe.batch_ramp={start_batch_size:4,ramp_tokens:60000,multiple_of:4}",
    "recipe.global_batch_size=24",
    "recipe.warmup_steps=7",
    "recipe.micro_batch_size=2",
    "optim.lr=3e-3",
)


def schedule_of(config: RunConfig) -> Schedule:
    return Schedule(config.recipe, config.optim)


def clocks(schedule: Schedule) -> list[Clock]:
    seen = [Clock()]
    while not schedule.is_done(seen[-1]):
        seen.append(seen[-1].advance(schedule.at(seen[-1])))
    return seen


def test_a_short_run_replayed() -> None:
    schedule = schedule_of(SHORT)
    step, samples, seen = 0, 0, clocks(schedule)
    for clock in seen[:-1]:
        tokens = samples * 256
        size = min(4 + 4 * (samples * 5 // 234), 24)
        lr = 3e-3 * min(1.0, (step + 1) / 7)
        lr *= 0.316 ** ((tokens >= 120_000) + (tokens >= 180_000))
        point = schedule.at(clock)
        assert clock == Clock(step, samples)
        assert (point.global_batch_size, point.num_tokens) == (size, size * 256)
        # The same handful of float64 products in another order.
        assert point.lr == pytest.approx(lr, rel=1e-14)
        step, samples = step + 1, samples + size
    assert (samples - size) * 256 < 200_000 <= samples * 256
    assert schedule.last_step(Clock()) == step == seen[-1].step
    stages = [schedule.at(clock).recipe_stage for clock in seen]
    assert list(dict.fromkeys(stages)) == ["warm-up", "batch ramp", "peak", "decay 1", "decay 2"]


def test_every_clock_of_a_run_foresees_its_end() -> None:
    schedule = schedule_of(SHORT)
    seen = clocks(schedule)
    assert {schedule.last_step(clock) for clock in seen} == {seen[-1].step}
    assert {schedule.end(clock) for clock in seen} == {seen[-1]}


@given(st.integers(0, 250_000))
def test_clock_at_is_the_first_with_enough_tokens(num_tokens: int) -> None:
    schedule = schedule_of(SHORT)
    clock = schedule.clock_at(num_tokens)
    assert schedule.consumed_tokens(clock) >= num_tokens
    assert clock == schedule.clock_at_step(clock.step)
    if clock.step:
        assert schedule.consumed_tokens(schedule.clock_at_step(clock.step - 1)) < num_tokens


def test_num_steps_ends_a_run_and_gives_the_budget() -> None:
    schedule = schedule_of(QUICKSTART)
    steps = QUICKSTART.recipe.num_steps
    assert steps is not None
    budget = steps * QUICKSTART.recipe.global_batch_size * QUICKSTART.recipe.sequence_length
    assert schedule.budget_tokens == budget
    assert schedule.last_step(Clock()) == len(clocks(schedule)) - 1 == steps


def test_a_budget_of_whole_steps_ends_with_the_last_of_them() -> None:
    tokens = 10 * QUICKSTART.recipe.global_batch_size * QUICKSTART.recipe.sequence_length
    schedule = schedule_of(
        preset("quickstart", "recipe.num_steps=null", f"recipe.num_tokens={tokens}")
    )
    assert schedule.last_step(Clock()) == len(clocks(schedule)) - 1 == 10


def test_a_stage_begins_with_the_step_that_reaches_it() -> None:
    """60% of 400 steps of one size are 240, warm-up is 40."""
    schedule = schedule_of(preset("quickstart", "recipe.num_steps=400", "recipe.warmup_steps=40"))
    stages = [schedule.at(schedule.clock_at_step(step)).recipe_stage for step in (39, 40, 239, 240)]
    assert stages == ["warm-up", "peak", "peak", "decay 1"]


def test_num_steps_ends_a_run_before_its_budget() -> None:
    schedule = schedule_of(preset("dsv2_236b_pretrain", "recipe.num_steps=5"))
    assert schedule.budget_tokens == 8_100_000_000_000
    assert [clock.step for clock in clocks(schedule)] == [0, 1, 2, 3, 4, 5]
    assert schedule.last_step(Clock(3, 6912)) == 5
    assert schedule.end(Clock(3, 6912)) == Clock(5, 11_520)


@pytest.mark.parametrize("recipe", [("num_steps=5",), ("num_steps=null", "num_tokens=10240")])
def test_a_run_past_its_end_ends_where_it_is(recipe: tuple[str, ...]) -> None:
    schedule = schedule_of(preset("quickstart", *(f"recipe.{each}" for each in recipe)))
    assert schedule.last_step(Clock()) == 5
    assert schedule.is_done(Clock(9, 72))
    assert schedule.last_step(Clock(9, 72)) == 9


def test_a_new_ramp_applies_from_the_current_clock_on() -> None:
    old, new = schedule_of(LITE), schedule_of(V2)
    clock = old.clock_at_step(3000)
    size = new.at(clock).global_batch_size
    # 13,824,000 of 54,931,640 samples: 27 increments x 0.25166 = 6 whole ones.
    assert size == 2304 + 6 * 256
    assert new.at(clock.advance(new.at(clock))).global_batch_size == size
    replayed = clock
    while replayed.consumed_samples < 54_931_640:
        replayed = replayed.advance(new.at(replayed))
    left = -(-(1_977_539_063 - replayed.consumed_samples) // 9216)
    assert new.last_step(clock) == replayed.step + left


def test_the_length_of_the_published_runs() -> None:
    """Facts 4.1: about 218K steps, the exact number depending on the ramp, and 302.0K."""
    v2, lite = schedule_of(V2), schedule_of(LITE)
    assert v2.clock_at(225_000_000_000).step == pytest.approx(11_000, rel=0.05)
    assert v2.last_step(Clock()) == pytest.approx(218_000, rel=0.01)
    # 7.875e12 tokens at full batch: 208,616 steps of 37,748,736 tokens, one ends inside the ramp.
    assert v2.last_step(Clock()) - v2.clock_at(225_000_000_000).step in (208_616, 208_617)
    assert lite.last_step(Clock()) == 301_997
    assert [lite.clock_at(tokens).step for tokens in lite.milestones] == [241_598, 271_798]
    assert v2.clock_at_step(2000).consumed_samples >= 2000 * 2304


def test_a_recipe_without_an_end_is_refused() -> None:
    recipe = QUICKSTART.recipe.model_copy(update={"num_steps": None})
    with pytest.raises(ValueError, match="neither num_steps nor num_tokens"):
        Schedule(recipe, QUICKSTART.optim)
