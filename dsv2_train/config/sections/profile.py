"""Which steps are looked at closely."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from dsv2_train.config.sections.base import Section


class ProfileConfig(Section):
    """Pictures and traces of chosen steps; they cost those steps some time.

    `timeline_steps`: steps whose pipeline is drawn beside its plan, in `<run>/timelines/`.
    `torch_first_step` to `torch_last_step`: window of torch's profiler on `torch_ranks`, traces in
    `<run>/torch_profile/`.
    """

    timeline_steps: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    torch_first_step: PositiveInt | None = None
    torch_last_step: PositiveInt | None = None
    torch_ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] = (0,)
