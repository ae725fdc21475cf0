"""The machines, for launchers, planner and a searched schedule."""

from pydantic import Field, PositiveFloat, PositiveInt

from dsv2_train.config.sections.base import Section


class ClusterConfig(Section):
    """Nodes are alike; ranks are placed on them in order.

    `device`: its peak is what a plan is held against, its speeds are what a schedule is searched
    for; what a rank computes on is not chosen by it.
    `hang_timeout_s`: how long a rank may stand still before all ranks are ended, with a report of
    who is missing where; null does not watch. The longest pipeline op, and the longest wait for
    the disk, must be shorter.
    `group_timeout_s`: how long a collective of any process group may wait for its peers. The first
    ones wait for ranks that still build or read, later ones for the slowest step.
    """

    ranks_per_node: PositiveInt
    device: str = Field(default="cpu", min_length=1)
    hang_timeout_s: PositiveFloat | None = 600.0
    group_timeout_s: PositiveFloat = 1800.0
