"""The machines, for launchers, planner and a searched schedule."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from dsv2_train.config.sections.base import Section


class PreflightConfig(Section):
    """What machines are held against; a figure that is null is shown, not judged.

    `before_training`: a run begins with a preflight; `dsv2 preflight` is one alone.
    `within_node_gb_per_s`, `between_nodes_gb_per_s`: from a rank to another, one way; the bus
    bandwidth of collectives as well.
    `disk_gb_per_s`: what a node writes to the run's folder, and reads back.
    `min_share`: of these; less fails. A link that has lost lanes, or goes another way, is at half
    or below; what protocols take is less than a third.
    `max_clock_skew_s`: of a rank against rank 0. Heartbeats and logs of nodes are compared.
    """

    before_training: bool = False
    within_node_gb_per_s: PositiveFloat | None = None
    between_nodes_gb_per_s: PositiveFloat | None = None
    disk_gb_per_s: PositiveFloat | None = None
    min_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    max_clock_skew_s: PositiveFloat = 0.5


class ClusterConfig(Section):
    """Nodes are alike; ranks are placed on them in order.

    `device`: its peak is what a plan is held against, its speeds are what a schedule is searched
    for; what a rank computes on is not chosen by it. A preflight expects GPUs of that name.
    `hang_timeout_s`: how long a rank may stand still before all ranks are ended, with a report of
    who is missing where; null does not watch. The longest pipeline op, and the longest wait for
    the disk, must be shorter.
    `group_timeout_s`: how long a collective of any process group may wait for its peers. The first
    ones wait for ranks that still build or read, later ones for the slowest step.
    """

    ranks_per_node: PositiveInt
    device: str = Field(default="cpu", min_length=1)
    preflight: PreflightConfig = PreflightConfig()
    hang_timeout_s: PositiveFloat | None = 600.0
    group_timeout_s: PositiveFloat = 1800.0
