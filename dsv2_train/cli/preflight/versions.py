"""What software a rank runs, and which ranks run another."""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import dsv2_train
from dsv2_train.cli.preflight.report import Row, judged, name_ranks

# Distributions; those that are not installed must be absent everywhere.
_PACKAGES = (
    *("torch", "megatron-core", "numpy", "dsv2_train"),
    *("transformer-engine", "apex", "deepspeed", "deep_ep"),
)
_ABSENT = "absent"

Versions = dict[str, str]


def versions() -> Versions:
    """Of this process, by name. `code` is a hash of this package's files, as they are on disk."""
    found = {"python": platform.python_version(), "code": _code_hash()}
    found |= {name: _version(name) for name in _PACKAGES}
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def judge_versions(found: Sequence[Versions], hosts: Sequence[str]) -> Iterator[Row]:
    """One row if all ranks run the same, else one for each name that differs.

    Args:
        found: by rank.
        hosts: by rank.
    """
    names = sorted(set().union(*found))
    differing = [name for name in names if len({_of(each, name) for each in found}) > 1]
    for name in differing:
        yield _odd_ones(name, [_of(each, name) for each in found], hosts)
    if not differing:
        same = ", ".join(f"{name} {found[0][name]}" for name in names if _is_there(found[0], name))
        yield judged("versions", same, "the same on all ranks", is_good=True)


def _odd_ones(name: str, values: Sequence[str], hosts: Sequence[str]) -> Row:
    (usual, count), *_ = Counter(values).most_common()
    groups = [
        f"{value} on {name_ranks((rank for rank, v in enumerate(values) if v == value), hosts)}"
        for value in dict.fromkeys(values)
        if value != usual
    ]
    told = f"{'; '.join(groups)}; {usual} on {count} others"
    return judged(f"version of {name}", told, "the same on all ranks", is_good=False)


def _of(found: Versions, name: str) -> str:
    return found.get(name, _ABSENT)


def _is_there(found: Versions, name: str) -> bool:
    return _of(found, name) != _ABSENT


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return _ABSENT


def _code_hash() -> str:
    root = Path(dsv2_train.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
