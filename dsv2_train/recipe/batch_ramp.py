"""Global batch size as a function of consumed samples (DeepSeek-V2, section 3.1.2).

The paper gives the ends of the ramp, 2304 -> 9216 sequences over the first 225B tokens. Its shape
is ours: linear in samples, rounded down to a multiple that the config gives.
"""

from bisect import bisect_right
from dataclasses import dataclass

from dsv2_train.config.sections.recipe import BatchRampConfig, RecipeConfig


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one batch size.

    Attributes:
        first_step: steps done when the segment begins.
        first_sample: samples consumed when the segment begins.
        batch_size: samples of each of its steps.
    """

    first_step: int
    first_sample: int
    batch_size: int


def ramp_samples(recipe: RecipeConfig) -> int:
    """Whole samples in the tokens of the ramp, 54,931,640 in 225B tokens at 4096; 0 without one."""
    ramp = recipe.batch_ramp
    return 0 if ramp is None else ramp.ramp_tokens // recipe.sequence_length


def batch_size_at(recipe: RecipeConfig, consumed_samples: int) -> int:
    """Samples of the step that starts when `consumed_samples` have been consumed.

        start + multiple_of * floor(consumed_samples / ramp_samples * num_increments)

    until `ramp_samples` are consumed, the global batch size from there on.
    """
    ramp, length = recipe.batch_ramp, ramp_samples(recipe)
    if ramp is None or consumed_samples >= length:
        return recipe.global_batch_size
    increments_done = consumed_samples * _num_increments(recipe, ramp) // length
    return ramp.start_batch_size + ramp.multiple_of * increments_done


class BatchTrace:
    """Steps <-> consumed samples <-> consumed tokens, for a run that follows the recipe.

    Precomputed as a few segments, so that each lookup is one bisection and a resumed run replays
    nothing. A run whose ramp was changed follows the new one from its current point on: give that
    point as `first_step` and `first_sample`. The trace knows nothing earlier.

    Attributes:
        segments: in order; the last one never ends.
    """

    def __init__(self, recipe: RecipeConfig, first_step: int = 0, first_sample: int = 0) -> None:
        self._sequence_length = recipe.sequence_length
        self.segments = _segments(recipe, first_step, first_sample)
        self._first_steps = [segment.first_step for segment in self.segments]
        self._first_samples = [segment.first_sample for segment in self.segments]

    def consumed_samples(self, step: int) -> int:
        """Samples consumed when `step` steps are done.

        Raises:
            ValueError: for a step before the trace.
        """
        segment = self._segment(self._first_steps, step, "step")
        return segment.first_sample + (step - segment.first_step) * segment.batch_size

    def consumed_tokens(self, step: int) -> int:
        """Tokens consumed when `step` steps are done; errors as in `consumed_samples`."""
        return self.consumed_samples(step) * self._sequence_length

    def steps_done(self, consumed_samples: int) -> int:
        """Whole steps that `consumed_samples` samples make up: the inverse of `consumed_samples`.

        Raises:
            ValueError: for a number of samples before the trace.
        """
        segment = self._segment(self._first_samples, consumed_samples, "consumed_samples")
        return segment.first_step + (consumed_samples - segment.first_sample) // segment.batch_size

    def steps_to_consume(self, num_tokens: int) -> int:
        """Fewest steps that consume at least `num_tokens` tokens, counted from step 0.

        The first step of the trace when it has consumed as many before it begins.
        """
        samples = max(_ceil_div(num_tokens, self._sequence_length), self._first_samples[0])
        step = self.steps_done(samples)
        return step if self.consumed_samples(step) == samples else step + 1

    def _segment(self, firsts: list[int], value: int, what: str) -> Segment:
        if value < firsts[0]:
            raise ValueError(f"{what}: found {value}; the trace begins at {firsts[0]}")
        return self.segments[bisect_right(firsts, value) - 1]


def _segments(recipe: RecipeConfig, step: int, sample: int) -> tuple[Segment, ...]:
    segments = [Segment(step, sample, batch_size_at(recipe, sample))]
    while recipe.batch_ramp is not None and segments[-1].batch_size < recipe.global_batch_size:
        batch_size = segments[-1].batch_size
        num_steps = _ceil_div(_end_of(recipe, recipe.batch_ramp, batch_size) - sample, batch_size)
        step, sample = step + num_steps, sample + num_steps * batch_size
        segments.append(Segment(step, sample, batch_size_at(recipe, sample)))
    return tuple(segments)


def _end_of(recipe: RecipeConfig, ramp: BatchRampConfig, batch_size: int) -> int:
    """Fewest consumed samples at which the ramp is past `batch_size`."""
    next_increment = (batch_size - ramp.start_batch_size) // ramp.multiple_of + 1
    return _ceil_div(next_increment * ramp_samples(recipe), _num_increments(recipe, ramp))


def _num_increments(recipe: RecipeConfig, ramp: BatchRampConfig) -> int:
    return (recipe.global_batch_size - ramp.start_batch_size) // ramp.multiple_of


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
