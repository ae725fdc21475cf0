"""The batch ramp against a run replayed step by step, and against megatron-core's own ramp."""

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from dsv2_train.config.sections.recipe import BatchRampConfig, RecipeConfig
from dsv2_train.recipe.batch_ramp import BatchTrace, batch_size_at, ramp_samples
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain").recipe


def recipe_of(start: int, end: int, multiple: int, ramp_tokens: int, length: int) -> RecipeConfig:
    return RecipeConfig(
        sequence_length=length,
        global_batch_size=end,
        batch_ramp=BatchRampConfig(
            start_batch_size=start, ramp_tokens=ramp_tokens, multiple_of=multiple
        ),
        num_steps=1,
        warmup_steps=0,
        decay_factor=1.0,
        decay_at=(),
        expert_balance_alpha=0.0,
        device_balance_alpha=0.0,
        communication_balance_alpha=0.0,
        capacity_factor=None,
        precision="fp32",
        eval_every_steps=1,
        eval_num_samples=1,
    )


@st.composite
def recipes(draw: st.DrawFn) -> RecipeConfig:
    multiple = draw(st.integers(1, 5))
    start = draw(st.integers(1, 6))
    increments = draw(st.integers(0, 8))
    length = draw(st.integers(1, 7))
    ramp_tokens = draw(st.integers(1, 3000))
    return recipe_of(
        start * multiple, (start + increments) * multiple, multiple, ramp_tokens, length
    )


def size_by_formula(recipe: RecipeConfig, consumed_samples: int) -> int:
    """The straight line through (0, start) and (ramp, end), rounded down to the multiple."""
    ramp = recipe.batch_ramp
    assert ramp is not None
    whole = ramp.ramp_tokens // recipe.sequence_length
    if consumed_samples >= whole:
        return recipe.global_batch_size
    rise = recipe.global_batch_size - ramp.start_batch_size
    on_line = ramp.start_batch_size + rise * Fraction(consumed_samples, whole)
    return floor(on_line / ramp.multiple_of) * ramp.multiple_of


def replay(recipe: RecipeConfig, num_steps: int, consumed_samples: int = 0) -> list[int]:
    """Samples consumed after 0, 1, ... steps."""
    trace = [consumed_samples]
    for _ in range(num_steps):
        trace.append(trace[-1] + size_by_formula(recipe, trace[-1]))
    return trace


@given(recipes(), st.integers(0, 4000))
def test_batch_size_is_the_line_rounded_down(recipe: RecipeConfig, consumed_samples: int) -> None:
    assert batch_size_at(recipe, consumed_samples) == size_by_formula(recipe, consumed_samples)


@given(recipes(), st.integers(0, 300))
def test_lookups_equal_a_replay(recipe: RecipeConfig, step: int) -> None:
    replayed = replay(recipe, step)
    trace = BatchTrace(recipe)
    assert [trace.consumed_samples(n) for n in range(step + 1)] == replayed
    assert [trace.steps_done(samples) for samples in replayed] == list(range(step + 1))
    assert trace.consumed_tokens(step) == replayed[-1] * recipe.sequence_length


@given(recipes(), st.integers(0, 2000))
def test_samples_between_two_steps(recipe: RecipeConfig, samples: int) -> None:
    trace = BatchTrace(recipe)
    step = trace.steps_done(samples)
    assert trace.consumed_samples(step) <= samples < trace.consumed_samples(step + 1)


@given(recipes(), st.integers(0, 5000))
def test_steps_to_consume_is_the_first_step_with_enough(
    recipe: RecipeConfig, num_tokens: int
) -> None:
    trace = BatchTrace(recipe)
    step = trace.steps_to_consume(num_tokens)
    assert trace.consumed_tokens(step) >= num_tokens
    assert step == 0 or trace.consumed_tokens(step - 1) < num_tokens


@given(recipes(), st.integers(0, 100), st.integers(0, 100))
def test_a_trace_from_the_middle_of_a_run_is_the_rest_of_it(
    recipe: RecipeConfig, middle: int, further: int
) -> None:
    whole = BatchTrace(recipe)
    rest = BatchTrace(recipe, middle, whole.consumed_samples(middle))
    assert rest.consumed_samples(middle + further) == whole.consumed_samples(middle + further)


@given(recipes(), st.integers(0, 2000), st.integers(0, 100))
def test_a_trace_from_anywhere_follows_the_recipe_from_there(
    recipe: RecipeConfig, consumed_samples: int, num_steps: int
) -> None:
    trace = BatchTrace(recipe, 7, consumed_samples)
    replayed = replay(recipe, num_steps, consumed_samples)
    assert [trace.consumed_samples(7 + n) for n in range(num_steps + 1)] == replayed


@given(recipes())
def test_segments_are_as_few_as_the_sizes(recipe: RecipeConfig) -> None:
    sizes = [segment.batch_size for segment in BatchTrace(recipe).segments]
    assert all(small < large for small, large in pairwise(sizes))
    assert sizes[-1] == recipe.global_batch_size


def test_the_paper_ramp_equals_megatron_core_at_every_step() -> None:
    megatron = RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size=9216,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=1,
        start_global_batch_size=2304,
        batch_size_increment=256,
        ramup_samples=54_931_640,
    )
    consumed_samples, trace = 0, BatchTrace(V2)
    for step in range(11_500):
        assert trace.consumed_samples(step) == consumed_samples
        megatron.update(consumed_samples, consistency_check=False)
        consumed_samples += megatron.get_current_running_global_batch_size()


def test_the_paper_ramp_by_hand() -> None:
    assert ramp_samples(V2) == 54_931_640
    assert batch_size_at(V2, 0) == 2304
    assert batch_size_at(V2, 54_931_639) == 9216 - 256
    assert batch_size_at(V2, 54_931_640) == 9216
    # Half-way the line is at 5760 = 22.5 x 256, so at 22 x 256.
    assert batch_size_at(V2, 54_931_640 // 2) == 5632
    assert [segment.batch_size for segment in BatchTrace(V2).segments] == list(
        range(2304, 9217, 256)
    )


def test_without_a_ramp_there_is_one_segment() -> None:
    trace = BatchTrace(preset("dsv2_lite_pretrain").recipe)
    assert trace.consumed_tokens(1) == 18_874_368
    assert len(trace.segments) == 1


def test_a_ramp_shorter_than_a_sample_is_over_at_once() -> None:
    trace = BatchTrace(recipe_of(2, 8, 2, ramp_tokens=5, length=6))
    assert [segment.batch_size for segment in trace.segments] == [8]


def test_nothing_is_known_before_a_trace_begins() -> None:
    trace = BatchTrace(V2, first_step=10, first_sample=30_000)
    assert trace.steps_to_consume(0) == 10
    with pytest.raises(ValueError, match="step: found 9; the trace begins at 10"):
        trace.consumed_samples(9)
    with pytest.raises(ValueError, match="consumed_samples: found 29999"):
        trace.steps_done(29_999)
