"""The base of every config section: frozen, strict, no unknown keys."""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict


class Absent(AttributeError):
    """A declared field is not in the record: its value was wrong or missing."""


class Section(BaseModel):
    """One Hydra group as a typed record; a default is stated here and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # A type checker that saw it would accept any name.

        def __getattr__(self, name: str) -> Any:
            """Tell a field that a partly built record lacks from a name that no record has."""
            if name in type(self).model_fields:
                raise Absent(f"{type(self).__name__}.{name} was wrong or missing")
            return super().__getattr__(name)
