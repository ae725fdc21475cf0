"""Learning rate as a function of step and consumed tokens (DeepSeek-V2, section 3.1.2)."""

import math
from fractions import Fraction

from dsv2_train.config.sections.recipe import RecipeConfig


def learning_rate(
    recipe: RecipeConfig, max_lr: float, *, step: int, consumed_tokens: int, budget_tokens: int
) -> float:
    """Learning rate of the step that starts after `step` steps and `consumed_tokens` tokens.

        max_lr * min(1, (step + 1) / warmup_steps) * decay_factor ^ (milestones reached)

    Warm-up counts from 1: the first step already learns, at 1 / warmup_steps of the peak, and step
    number `warmup_steps` is the first at the peak. A milestone is reached by the step that starts
    with at least that many tokens consumed.

    Args:
        recipe: warm-up length, decay factor and milestones.
        max_lr: peak learning rate.
        step: steps done before, >= 0.
        consumed_tokens: tokens consumed before, >= 0.
        budget_tokens: what the milestones are shares of.
    """
    warmup = 1.0 if step >= recipe.warmup_steps else (step + 1) / recipe.warmup_steps
    reached = sum(consumed_tokens >= at for at in decay_milestones(recipe, budget_tokens))
    return max_lr * warmup * recipe.decay_factor**reached


def decay_milestones(recipe: RecipeConfig, budget_tokens: int) -> tuple[int, ...]:
    """Consumed tokens at which the rate is multiplied by decay_factor; 4.86T and 7.29T of 8.1T.

    A share is taken as the decimal that the config gives, so that 0.07 of 100 is 7 exactly.
    """
    return tuple(math.ceil(Fraction(str(share)) * budget_tokens) for share in recipe.decay_at)
