"""What is timed of an op: ours and its peers on one shape, with what the memory must move."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One op, one direction, one shape.

    Attributes:
        name: op and direction, for example "swiglu_gate forward".
        shape: of the problem, by name, for example {"rows": 24576, "width": 1536}.
        num_bytes: that must be read and written at least, every element once.
        num_flops: of matrix products; 0 where the memory's speed is the floor.
        ours: calls the kernel once.
        peers: by name, the same through something else: "eager", "compiled", a library.
    """

    name: str
    shape: Mapping[str, int]
    num_bytes: int
    ours: Callable[[], object]
    peers: Mapping[str, Callable[[], object]]
    num_flops: int = field(default=0, kw_only=True)
