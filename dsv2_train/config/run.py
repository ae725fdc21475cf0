"""The whole configuration of a run: one frozen record, one field per Hydra group."""

from pathlib import Path

from pydantic import Field, NonNegativeInt

from dsv2_train.config.section import Section
from dsv2_train.config.sections.checkpoint import CheckpointConfig
from dsv2_train.config.sections.cluster import ClusterConfig
from dsv2_train.config.sections.data import DataConfig
from dsv2_train.config.sections.guards import GuardsConfig
from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.config.sections.monitor import MonitorConfig
from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.config.sections.recipe import RecipeConfig


class RunSection(Section):
    """Identity of a run: its folder and the seed of its weights and its data order."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    dir: str = Field(default="runs", min_length=1)
    seed: NonNegativeInt = 1234

    @property
    def folder(self) -> Path:
        """Where everything this run writes is."""
        return Path(self.dir) / self.name

    @property
    def checkpoint_folder(self) -> Path:
        """Where its checkpoints are."""
        return self.folder / "checkpoints"


class RunConfig(Section):
    """Everything that decides what a run does."""

    run: RunSection
    model: ModelConfig
    parallel: ParallelConfig
    recipe: RecipeConfig
    optim: OptimConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    guards: GuardsConfig
    monitor: MonitorConfig
    cluster: ClusterConfig
