"""The machines; read by the launchers and the planner, never by the trainer."""

from pydantic import Field, PositiveInt

from dsv2_train.config.sections.base import Section


class ClusterConfig(Section):
    """Nodes are alike; ranks are placed on them in order."""

    ranks_per_node: PositiveInt
    device: str = Field(default="cpu", min_length=1)
