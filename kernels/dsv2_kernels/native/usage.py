"""What a kernel uses of a GPU, as ptxas tells it."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    source: str
    kernel: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def parse_usage(source: str, said: str) -> list[Usage]:
    """Read ptxas' -v output.

    Args:
        source: the file that was compiled.
        said: one or more kernels, each for one or more architectures.

    Raises:
        ValueError: it says it otherwise than expected.
    """
    usages = []
    for block in said.split("Compiling entry function '")[1:]:
        head = re.match(r"(\w+)' for 'sm_(\w+)'", block)
        used = re.search(r"Used (\d+) registers([^\n]*)", block)
        if head is None or used is None:
            raise ValueError(f"{source}: what ptxas says of a kernel cannot be read:\n{block}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        usages.append(
            Usage(
                source=source,
                kernel=head[1],
                architecture=head[2],
                registers=int(used[1]),
                spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", block))),
                stack_bytes=max(map(int, re.findall(r"(\d+) bytes stack frame", block)), default=0),
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return usages


def table(usages: Sequence[Usage]) -> str:
    """A line a kernel and architecture, with the names of C++ where c++filt is there."""
    rows: list[tuple[str, ...]] = [
        ("source", "kernel", "sm", "registers", "shared bytes", "stack bytes", "spilled bytes")
    ]
    names = _demangle([usage.kernel for usage in usages])
    for usage, name in zip(usages, names, strict=True):
        used = (usage.registers, usage.shared_bytes, usage.stack_bytes, usage.spill_bytes)
        numbers = map(str, used)
        rows.append((usage.source, name, usage.architecture, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _demangle(names: list[str]) -> list[str]:
    """Names with their template arguments, without those of the call."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return names
    said = subprocess.run(
        [program], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [_short(line) for line in said.splitlines()]


def _short(signature: str) -> str:
    signature = re.sub(r"dsv2::\w+::", "", signature).removeprefix("void ")
    depth = 0
    for place, letter in enumerate(signature):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return signature[:place]
    return signature
