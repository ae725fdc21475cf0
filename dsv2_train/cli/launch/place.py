"""Which node of a launch this is, and how its nodes find each other."""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv2_train.cli.launch.devices import enough_devices
from dsv2_train.config.problems import Check, Problem
from dsv2_train.config.run import RunConfig

# A node may come minutes later than the others: an image is fetched first, a file system is busy.
_JOIN_TIMEOUT_S = 600


@dataclass(frozen=True)
class Place:
    """One node among those of a launch.

    Attributes:
        num_nodes: nodes of the launch, all with equally many ranks.
        node: 0 to num_nodes - 1.
        endpoint: `host:port` at which node 0 listens; not read for one node.
        launch_id: a word that all nodes of this launch have, and no other launch at that endpoint.
    """

    num_nodes: int = 1
    node: int = 0
    endpoint: str = ""
    launch_id: str = ""

    @property
    def rendezvous(self) -> list[str]:
        """Options of torchrun by which its agents find each other."""
        if self.num_nodes == 1:
            return ["--standalone"]
        conf = f"is_host={int(self.node == 0)},read_timeout={_JOIN_TIMEOUT_S}"
        return [
            f"--nnodes={self.num_nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={self.launch_id}",
            f"--rdzv-conf={conf},join_timeout={_JOIN_TIMEOUT_S}",
        ]


def on_nodes(num_nodes: int) -> tuple[Check, ...]:
    """Checks of a run against so many nodes like this one."""
    return (fits(num_nodes), enough_devices(num_nodes))


def fits(num_nodes: int) -> Check:
    """The ranks fit on so many nodes, equally many on each."""

    def check(config: RunConfig) -> Iterator[Problem]:
        world_size, per_node = config.parallel.world_size, config.cluster.ranks_per_node
        limit = num_nodes * per_node
        if world_size > limit:
            nodes = "one node" if num_nodes == 1 else f"{num_nodes} nodes"
            allowed = f"must be at most {limit}: this launches {nodes}, "
            allowed += f"with cluster.ranks_per_node = {per_node}"
            yield Problem("parallel.world_size", world_size, allowed)
        elif world_size % num_nodes:
            allowed = f"must be a multiple of {num_nodes}, the nodes: each has equally many ranks"
            yield Problem("parallel.world_size", world_size, allowed)

    return check


def num_nodes_of(config: RunConfig) -> int:
    """Nodes that a run needs."""
    return -(-config.parallel.world_size // config.cluster.ranks_per_node)
