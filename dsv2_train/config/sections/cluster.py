"""The machines, for launchers, planner and a searched schedule."""

from pydantic import Field, PositiveInt

from dsv2_train.config.section import Section


class ClusterConfig(Section):
    """Nodes are alike; ranks are placed on them in order.

    `device`: its peak is what a plan is held against, its speeds are what a schedule is searched
    for; what a rank computes on is not chosen by it.
    """

    ranks_per_node: PositiveInt
    device: str = Field(default="cpu", min_length=1)
