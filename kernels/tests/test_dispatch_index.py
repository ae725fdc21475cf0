from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels import dispatch_index as op
from dsv2_kernels.native.library import LaunchError, emulated
from dsv2_kernels.permute import gather_rows, sum_rows
from dsv2_kernels.reference import dispatch_index as reference

CPU = torch.device("cpu")


def drawn(num_tokens: int, num_experts: int, share: float, device: torch.device) -> Tensor:
    """[T, E] bool, true for a share of the assignments, another at each size."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_experts)
    return (torch.rand(num_tokens, num_experts, generator=generator) < share).to(device)


def check(routing_map: Tensor) -> None:
    """The kernel equals the reference to the bit."""
    num_rows = int(routing_map.sum())
    found = op.dispatch_index(routing_map, num_rows)
    expected = reference.dispatch_index(routing_map, num_rows)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.dtype == other.dtype == torch.int64, name
        assert torch.equal(one, other), f"{name}: error: {one.tolist()}, not {other.tolist()}"


def exercise() -> None:
    """A little of everything, for the sanitizers and the deliberate mistakes."""
    check(drawn(70, 37, 0.3, CPU))
    check(drawn(33, 3, 0.7, CPU))


@settings(max_examples=40)
@given(
    num_tokens=st.integers(0, 100),
    num_experts=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.04, 0.3, 1.0]),
)
@example(num_tokens=1, num_experts=1, share=1.0)
@example(num_tokens=32, num_experts=32, share=0.3)
@example(num_tokens=64, num_experts=160, share=0.04)
@example(num_tokens=0, num_experts=160, share=1.0)
def test_equals_plain_torch(
    device: torch.device, num_tokens: int, num_experts: int, share: float
) -> None:
    check(drawn(num_tokens, num_experts, share, device))


def test_more_chunks_than_warps(device: torch.device) -> None:
    check(drawn(33 * 32 + 5, 2, 0.5, device))


def test_as_many_experts_as_are_supported(device: torch.device) -> None:
    check(drawn(40, 512, 0.02, device))


@pytest.mark.parametrize("expert", [0, 19])
def test_all_tokens_go_to_one_expert(device: torch.device, expert: int) -> None:
    routing_map = torch.zeros(50, 20, dtype=torch.bool, device=device)
    routing_map[:, expert] = True
    check(routing_map)


def test_no_experts_at_all(device: torch.device) -> None:
    check(torch.zeros(4, 0, dtype=torch.bool, device=device))


@settings(max_examples=40)
@given(
    st.integers(1, 6).flatmap(
        lambda e: st.lists(st.lists(st.booleans(), min_size=e, max_size=e), min_size=1, max_size=9)
    )
)
def test_the_reference_is_what_a_loop_finds(routed: list[list[bool]]) -> None:
    num_experts = len(routed[0])
    pairs = [(e, t) for e in range(num_experts) for t, experts in enumerate(routed) if experts[e]]
    index = op.DispatchIndex(*reference.dispatch_index(torch.tensor(routed), len(pairs)))
    assert index.tokens.tolist() == [token for _, token in pairs]
    assert index.assignments.tolist() == [token * num_experts + expert for expert, token in pairs]
    assert index.tokens_per_expert.tolist() == [sum(column) for column in zip(*routed, strict=True)]
    starts = [*index.row_starts.tolist(), len(pairs)]
    for token, experts in enumerate(routed):
        rows = index.rows[starts[token] : starts[token + 1]].tolist()
        assert [pairs[row] for row in rows] == [(e, token) for e, on in enumerate(experts) if on]


def test_rows_move_by_its_row_plan(device: torch.device) -> None:
    routing_map = drawn(40, 8, 0.3, device)
    index = op.dispatch_index(routing_map, int(routing_map.sum()))
    x = torch.arange(40.0, device=device).unsqueeze(1).repeat(1, 4)
    rows = gather_rows(x, index.row_plan)
    assert torch.equal(rows, x[index.tokens])
    assert torch.equal(sum_rows(rows, index.row_plan), x * routing_map.sum(dim=1, keepdim=True))


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    routing_map = drawn(40, 8, 0.3, device)
    arguments = (routing_map, int(routing_map.sum()))
    torch.library.opcheck(torch.ops.dsv2.dispatch_index.default, arguments)


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_rows_is_found_out(emulated_library: Path, more: int) -> None:
    """A GPU that traps is lost to its process: emulated only."""
    routing_map = drawn(40, 8, 0.3, CPU)
    num_rows = int(routing_map.sum()) + more
    with pytest.raises(ValueError, match=f"num_rows has {num_rows}; supported: {num_rows - more}"):
        op.dispatch_index(routing_map, num_rows)
    with (
        emulated(emulated_library),
        pytest.raises(LaunchError, match="another number of assignments than num_rows: found"),
    ):
        op.dispatch_index(routing_map, num_rows)


@pytest.mark.parametrize(
    ("change", "num_rows", "error", "words"),
    [
        (lambda x: x.int(), 3, TypeError, "routing_map has dtype torch.int32"),
        (lambda x: x[0], 3, ValueError, r"routing_map has shape \[16\]; supported: \[any, any\]"),
        (lambda x: x, -1, ValueError, "num_rows has -1; supported: 0 to 64"),
        (lambda x: x, 65, ValueError, "num_rows has 65; supported: 0 to 64"),
    ],
)
def test_what_is_refused(
    anywhere: torch.device, change: object, num_rows: int, error: type[Exception], words: str
) -> None:
    routing_map = torch.zeros(4, 16, dtype=torch.bool, device=anywhere)
    with pytest.raises(error, match=words) as told:
        op.dispatch_index(change(routing_map), num_rows)  # type: ignore[operator]
    assert str(told.value).startswith("dispatch_index: ")


UNREADABLE = [
    (lambda x: x.t(), "contiguous"),
    (lambda x: x.flatten()[1:-15].view(3, 16), "modulo 16"),
    (lambda x: x[:1].repeat(1, 33), "routing_map has 528 experts; supported: at most 512"),
]


@pytest.mark.parametrize(("change", "words"), UNREADABLE)
def test_what_a_kernel_cannot_read(device: torch.device, change: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        op.dispatch_index(change(drawn(4, 16, 0.5, device)), 3)  # type: ignore[operator]


@pytest.mark.parametrize("change", [change for change, _ in UNREADABLE])
def test_plain_torch_reads_it(change: object) -> None:
    routing_map = change(drawn(4, 16, 0.5, CPU))  # type: ignore[operator]
    found = op.dispatch_index(routing_map, int(routing_map.sum()))
    by_expert = routing_map.t().nonzero().tolist()
    assert found.assignments.tolist() == [t * routing_map.size(1) + e for e, t in by_expert]
