"""Where the tokens are."""

from typing import Annotated

from pydantic import Field

from dsv2_train.config.section import Section

SampleId = Annotated[int, Field(ge=0, lt=1 << 62)]  # sums of two still are int64
SampleRange = Annotated[tuple[SampleId, SampleId], Field(strict=False)]


class DataConfig(Section):
    """A folder written by `dsv2 prepare`: train and validation .bin/.idx, tokenizer, manifest.

    `skip`: samples that a run is not to train on, ranges `[first, end)` of sample ids. What a run
    skips it skips for ever: the ranges of a resumed run are added to those of its checkpoint.
    """

    path: str = Field(min_length=1)
    skip: Annotated[tuple[SampleRange, ...], Field(strict=False)] = ()
