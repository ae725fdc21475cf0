"""Where the tokens are."""

from pydantic import Field

from dsv2_train.config.sections.base import Section


class DataConfig(Section):
    """A folder written by `dsv2 prepare`: train and validation .bin/.idx, tokenizer, manifest."""

    path: str = Field(min_length=1)
