"""The base of every config section: frozen, strict, no unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One Hydra group as a typed record; a default is stated here and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
