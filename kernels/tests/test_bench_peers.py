"""Peers of the benchmark compute what ours does: no library is timed at something else.

On a CPU ours are the emulated kernels, and libraries what they have for a CPU; on a GPU, all that
is installed there.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_kernels.reference import grouped_linear as reference
from dsv2_kernels.testing import numeric
from dsv2_kernels.testing.case import Case, Missing

KERNELS = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (KERNELS / "bench").glob("[!_]*.py"))
TOKENS = 4
# Up to eight results one after another, six rows to add for example, that a peer rounds to the
# dtype of its inputs, each by half a unit; ours rounds once.
UNITS = 4
# A bound of the product, without its result.
BOUND = "one matrix"
ROPE = 64

# Other people's, when they are imported and when they are called.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(KERNELS)


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    """The mathematics is the same, and takes seconds less each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def cases(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    module = importlib.import_module(f"bench.{op}")
    if op == "device_limited_topk":
        # One of each group, so that libraries rank a group by its best one as well.
        monkeypatch.setattr(module, "TOP_K", 3)
    torch.manual_seed(0)
    found: Iterator[Case] = module.cases(TOKENS, device)
    return found


def as_libraries_do(case: Case, ours: Any) -> tuple[Tensor, ...]:
    """Gates and counts by expert; no gradient of gates where there are none."""
    if case.name == "device_limited_topk forward":
        gates = torch.zeros_like(ours.affinities).scatter(1, ours.experts, ours.gates)
        return gates, ours.expert_counts[0], ours.affinity_sums[0]
    if case.name == "swiglu_gate backward, no gates":
        return ours[0], ours[2]
    return as_tuple(ours)


def as_ours_does(case: Case, theirs: Any) -> tuple[Tensor, ...]:
    """No index beside the rows; the channels of a rotated pair side by side."""
    if case.name == "dispatch_index and gather_rows":
        return (theirs[0],)
    if case.name == "mla_rope forward":
        return pairs_together(theirs[0]), pairs_together(theirs[1]), theirs[2]
    if case.name == "mla_rope backward":
        return theirs[0], theirs[1], theirs[2].squeeze(2)
    return as_tuple(theirs)


def pairs_together(heads: Tensor) -> Tensor:
    first, second = heads[..., -ROPE:].chunk(2, dim=-1)
    return torch.cat([heads[..., :-ROPE], torch.stack([first, second], -1).flatten(-2)], dim=-1)


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def assert_same(theirs: tuple[Tensor, ...], ours: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for found, expected in zip(theirs, ours, strict=True):
        assert found.shape == expected.shape
        assert numeric.error(found, expected.double()) <= UNITS * torch.finfo(dtype).eps


@pytest.mark.parametrize("op", OPS)
def test_a_peer_returns_what_ours_does(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if op == "device_limited_topk" else torch.bfloat16
    for case in cases(op, device, monkeypatch):
        ours = case.ours()
        for name, peer in case.peers.items():
            # What is added to main_grad has a test of its own.
            if isinstance(peer, Missing) or name == BOUND or ours is None:
                continue
            if name.startswith(("megatron-core", "transformer-engine", "liger-kernel")):
                assert_same(as_ours_does(case, peer()), as_libraries_do(case, ours), dtype)
            else:
                assert_same(as_tuple(peer()), as_tuple(ours), dtype)


def test_a_library_adds_to_main_grad_what_ours_does(device: torch.device) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([5, 16], dtype=torch.int32, device=device)
    weights, grad_y, x = (
        torch.randn(*shape, device=device).bfloat16() for shape in ((2, 64, 32), (16, 64), (16, 32))
    )
    ours, theirs = torch.ones(2, *weights.shape, device=device)
    module = importlib.import_module("bench.peers.transformer_engine")
    peer = module.grouped_linear_wgrad_(theirs, weights, grad_y, x, ends)
    if isinstance(peer, Missing):
        assert device.type == "cpu" or "is not installed" in peer.why
        return
    for _ in range(2):
        peer()
        reference.grouped_linear_wgrad_(ours, grad_y, x, ends)
    assert_same((theirs,), (ours,), torch.bfloat16)


def test_why_a_peer_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = importlib.import_module("bench.peers.needs")
    x = torch.ones(2)

    def double(x: Tensor, *, fused: bool = False) -> Any:
        return lambda: x + x

    monkeypatch.setitem(sys.modules, "absent_library", None)
    for name in ("absent_library", "absent_library.part", "no_such_library.part"):
        assert libraries.needs("torch", name)(double)(x) == Missing(f"{name} is not installed")
    assert libraries.needs("torch", gpu=True)(double)(x) == Missing("runs on a GPU only")
    assert libraries.needs("torch.nn")(double)(x)().tolist() == [2, 2]
    # Its call fails, not the case.
    broken = libraries.needs("torch")(lambda x: x.no_such_function)(x)
    with pytest.raises(AttributeError, match="no_such_function"):
        broken()
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    found = libraries.plain_and_fused(double, x, note=" (twice)")
    assert found.pop("transformer-engine (twice)") == Missing("transformer_engine is not installed")
    assert {name: call().tolist() for name, call in found.items()} == {
        "megatron-core (twice)": [2, 2]
    }
