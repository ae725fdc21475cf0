from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv2_kernels import device_limited_topk as op
from dsv2_kernels.native import library
from dsv2_kernels.native.library import DTYPES
from dsv2_kernels.reference import device_limited_topk as reference
from dsv2_kernels.testing.numeric import assert_as_good

CPU = torch.device("cpu")
# positions, sequences, groups, experts of a group, limit, K
Shape = tuple[int, int, int, int, int, int]

FLOATS = ("affinities", "gates", "affinity_sums", "entropy_sums")
COUNTS = ("experts", "expert_counts", "group_visits", "bad_token_counts")
# Numbers of experts at which a lane holds more of them.
EDGES = (64, 65, 160, 161, 256, 257, 512)
# DeepSeek-V2's router on a few tokens, more than one block of a sequence.
DEEPSEEK_V2 = (17, 2, 8, 20, 3, 6)


def options_of(shape: Shape) -> dict[str, Any]:
    _, sequences, groups, _, limit, top_k = shape
    return {
        "num_sequences": sequences,
        "num_groups": groups,
        "num_limited": limit,
        "top_k": top_k,
        "scaling_factor": 2.5,
    }


def logits_of(shape: Shape, levels: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, E]; few levels make ties, of groups and of experts."""
    positions, sequences, groups, size, _, _ = shape
    torch.manual_seed(sum(shape))
    logits = 2 * torch.randn(positions * sequences, groups * size)
    if levels is not None:
        logits = torch.randint(levels, logits.shape).float()
    return logits.to(device, dtype)


def defined(logits: Tensor, shape: Shape) -> op.DeviceLimitedTopk:
    """By the reference."""
    return op.DeviceLimitedTopk(*reference.device_limited_topk(logits, *options_of(shape).values()))


def of_affinities(affinities: Tensor, shape: Shape) -> op.DeviceLimitedTopk:
    """In plain Python from the paper's words; rounding of affinities decides, so they are given.

    `sorted` is stable, so among equals the lower index comes first.
    """
    positions, sequences, groups, size, limit, top_k = shape
    experts, reached = [], torch.zeros(sequences, groups, dtype=torch.int32)
    counts = torch.zeros(sequences, groups * size, dtype=torch.int32)
    for token, row in enumerate(affinities.nan_to_num(0.0).tolist()):
        best = [max(row[group * size : (group + 1) * size]) for group in range(groups)]
        chosen = sorted(range(groups), key=lambda group, best=best: -best[group])[:limit]
        inside = [expert for expert in range(groups * size) if expert // size in chosen]
        experts.append(sorted(inside, key=lambda expert, row=row: -row[expert])[:top_k])
        counts[token % sequences, experts[-1]] += 1
        reached[token % sequences, list({expert // size for expert in experts[-1]})] += 1
    return op.DeviceLimitedTopk(
        affinities,
        torch.tensor(experts, dtype=torch.int64).view(-1, top_k),
        affinities,
        counts,
        reached,
        affinities,
        affinities,
        affinities.isnan().any(-1).view(positions, sequences).sum(0, dtype=torch.int32),
    )


def check(logits: Tensor, shape: Shape) -> None:
    """Kernel, naive and exact, forward and backward; indices by plain Python."""
    found = op.device_limited_topk(logits, **options_of(shape))
    expected = of_affinities(found.affinities.cpu(), shape)
    for name in COUNTS:
        pair = getattr(found, name).cpu(), getattr(expected, name)
        assert pair[0].dtype == pair[1].dtype and torch.equal(*pair), name
    naive, exact = defined(logits, shape), defined(logits.double(), shape)
    for name in ("affinities", "affinity_sums", "entropy_sums"):
        assert_as_good(getattr(found, name), getattr(naive, name), getattr(exact, name))
    assert torch.equal(found.gates, found.affinities.gather(1, found.experts) * 2.5)
    check_backward(found, logits.dtype, shape)


def check_backward(found: op.DeviceLimitedTopk, dtype: torch.dtype, shape: Shape) -> None:
    grad_gates, grad_sums = torch.randn_like(found.gates), torch.randn_like(found.affinity_sums)
    for sums in (grad_sums, None):
        inputs = (grad_gates, found.affinities, found.experts, sums)
        grad = op.device_limited_topk_backward(*inputs, scaling_factor=2.5, dtype=dtype)
        naive = reference.device_limited_topk_backward(*inputs, 2.5, dtype)
        wide = [each if each is None else each.double() for each in (*inputs[:2], sums)]
        exact = reference.device_limited_topk_backward(
            wide[0], wide[1], found.experts, wide[2], 2.5, torch.float64
        )
        assert_as_good(grad, naive, exact)


def exercise() -> None:
    """A little of everything, for the sanitizers and the deliberate mistakes."""
    check(logits_of(DEEPSEEK_V2, None, torch.bfloat16, CPU), DEEPSEEK_V2)
    small = (2, 2, 3, 5, 2, 4)
    for levels in (3, None):
        check(logits_of(small, levels, torch.float32, CPU), small)
    for size in EDGES[1::2]:
        edge = (1, 1, 1, size, 1, 4)
        check(logits_of(edge, None, torch.float32, CPU), edge)


def ask(device: torch.device) -> None:
    """What torch asks of an op: schema, shapes without data, autograd."""
    shape = (3, 2, 4, 3, 2, 3)
    logits = logits_of(shape, None, torch.float32, device).requires_grad_()
    arguments = (logits, *options_of(shape).values())
    torch.library.opcheck(torch.ops.dsv2.device_limited_topk.default, arguments)
    found = op.device_limited_topk(logits.detach(), **options_of(shape))
    for sums in (None, found.affinity_sums):
        torch.library.opcheck(
            torch.ops.dsv2.device_limited_topk_backward.default,
            (found.gates, found.affinities, found.experts, sums, 2.5, torch.bfloat16),
        )


def test_what_torch_asks_of_the_reference() -> None:
    ask(CPU)


def test_the_reference_against_plain_python() -> None:
    for shape in (DEEPSEEK_V2, (3, 2, 5, 3, 2, 6), (1, 1, 2, 3, 1, 2)):
        for levels in (None, 2):
            logits = logits_of(shape, levels, torch.float64, CPU)
            found = defined(logits, shape)
            expected = of_affinities(found.affinities, shape)
            assert all(torch.equal(getattr(found, n), getattr(expected, n)) for n in COUNTS)
            exp = logits.exp()
            exact = exp / exp.sum(-1, keepdim=True)
            torch.testing.assert_close(found.affinities, exact)
            by_token = exact.view(shape[0], shape[1], -1)
            torch.testing.assert_close(found.affinity_sums, by_token.sum(0))
            entropy = -(by_token * by_token.log()).sum((0, 2))
            torch.testing.assert_close(found.entropy_sums, entropy)


def test_gradients_of_the_reference() -> None:
    """By differences, in fp64, through gates and sums."""
    shape = (3, 2, 4, 3, 2, 3)
    logits = logits_of(shape, None, torch.float64, CPU).requires_grad_()

    def differentiable(logits: Tensor) -> tuple[Tensor, Tensor]:
        found = op.device_limited_topk(logits, **options_of(shape))
        return found.gates, found.affinity_sums

    assert torch.autograd.gradcheck(differentiable, (logits,))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups = draw(st.sampled_from([1, 2, 3, 8, 40, 64]))
    size = draw(st.integers(1, min(24, op.MAX_EXPERTS // groups)))
    limit = draw(st.integers(1, groups) if groups < 9 else st.sampled_from([2, groups]))
    top_k = draw(st.integers(1, min(op.MAX_TOP_K, limit * size)))
    return draw(st.integers(0, 5)), draw(st.integers(1, 3)), groups, size, limit, top_k


@settings(max_examples=30)
@given(shape=shapes(), levels=st.sampled_from([None, 1, 2, 5]), dtype=st.sampled_from(list(DTYPES)))
@example(shape=(0, 2, 8, 20, 3, 6), levels=None, dtype=torch.bfloat16)
@example(shape=(1, 1, 8, 20, 3, 6), levels=None, dtype=torch.float32)
@example(shape=(2, 1, 64, 8, 63, 16), levels=None, dtype=torch.float32)
@example(shape=(2, 1, 1, 512, 1, 16), levels=2, dtype=torch.float32)
def test_as_good_as_plain_torch(
    device: torch.device, shape: Shape, levels: int | None, dtype: torch.dtype
) -> None:
    check(logits_of(shape, levels, dtype, device), shape)


@pytest.mark.parametrize("num_experts", EDGES)
def test_experts_at_the_edges_of_a_lane(device: torch.device, num_experts: int) -> None:
    shape = (2, 1, 1, num_experts, 1, 4)
    check(logits_of(shape, None, torch.float32, device), shape)


def test_several_blocks_of_a_sequence(device: torch.device) -> None:
    shape = (40, 2, 8, 20, 3, 6)
    check(logits_of(shape, None, torch.float32, device), shape)


def test_all_tokens_to_one_expert_of_which_many_underflow(device: torch.device) -> None:
    shape = (9, 2, 4, 9, 2, 6)
    logits = logits_of(shape, None, torch.float32, device)
    logits[:, 31] += 200
    check(logits, shape)
    found = op.device_limited_topk(logits, **options_of(shape))
    assert found.experts[0].tolist() == [31, 0, 1, 2, 3, 4]  # affinities of 0 go by index
    assert found.expert_counts[:, 31].tolist() == [9, 9]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite(device: torch.device, bad: float) -> None:
    shape = (3, 2, 4, 9, 2, 6)
    logits = logits_of(shape, None, torch.float32, device)
    logits[3, 20] = bad
    logits[4] = bad
    naive = defined(logits, shape)
    found = op.device_limited_topk(logits, **options_of(shape))
    assert naive.bad_token_counts.tolist() == ([1, 0] if bad < 0 else [1, 1])
    for name in COUNTS:
        assert torch.equal(getattr(found, name), getattr(naive, name)), name
    for name in FLOATS:
        pair = getattr(found, name), getattr(naive, name)
        torch.testing.assert_close(*pair, equal_nan=True)
    assert found.experts[4].tolist() == [0, 1, 2, 3, 4, 5]


def test_no_bit_depends_on_what_was_before(device: torch.device) -> None:
    """A launch leaves its workspace as it found it, also a larger one."""
    shape, larger = (5, 2, 3, 5, 2, 4), (5, 4, 8, 20, 3, 6)
    logits = logits_of(shape, None, torch.float32, device)
    first = op.device_limited_topk(logits, **options_of(shape))
    op.device_limited_topk(logits_of(larger, None, torch.float32, device), **options_of(larger))
    for before, after in zip(
        first, op.device_limited_topk(logits, **options_of(shape)), strict=True
    ):
        assert torch.equal(before, after)


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    ask(device)


@pytest.mark.parametrize("used", ["gates", "affinity_sums", "both"])
def test_autograd_goes_through_the_kernel(device: torch.device, used: str) -> None:
    shape = (3, 2, 4, 3, 2, 3)
    logits = logits_of(shape, None, torch.bfloat16, device).requires_grad_()
    found = op.device_limited_topk(logits, **options_of(shape))
    assert not found.affinities.requires_grad and not found.entropy_sums.requires_grad
    names = ["gates", "affinity_sums"] if used == "both" else [used]
    outputs = [getattr(found, name) for name in names]
    grads = dict(zip(names, map(torch.randn_like, outputs), strict=True))
    (grad,) = torch.autograd.grad(outputs, logits, list(grads.values()))
    expected = op.device_limited_topk_backward(
        grads.get("gates", torch.zeros_like(found.gates)),
        found.affinities,
        found.experts,
        grads.get("affinity_sums"),
        scaling_factor=2.5,
        dtype=torch.bfloat16,
    )
    assert torch.equal(grad, expected) and grad.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(4, 16, dtype=torch.int32)}, TypeError, "dtype torch.int32"),
        ({"logits": torch.zeros(64)}, ValueError, r"supported: \[any, any\]"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits has 0 experts; supported: at least 1"),
        ({"num_sequences": 3}, ValueError, "num_sequences has 3; supported: divisors of 4 tokens"),
        ({"num_sequences": 0}, ValueError, "num_sequences has 0"),
        ({"num_groups": 3}, ValueError, "num_groups has 3; supported: divisors of 16 experts"),
        ({"num_limited": 0}, ValueError, "num_limited has 0; supported: 1 to 4 groups"),
        ({"num_limited": 5}, ValueError, "num_limited has 5"),
        ({"top_k": 9}, ValueError, "top_k has 9; supported: 1 to 8"),
        ({"top_k": 17, "num_groups": 1, "num_limited": 1}, ValueError, "supported: 1 to 16"),
        ({"top_k": 0}, ValueError, "top_k has 0"),
        ({"scaling_factor": inf}, ValueError, "scaling_factor has inf; supported: finite numbers"),
        ({"scaling_factor": nan}, ValueError, "scaling_factor has nan"),
    ],
)
def test_what_is_refused(
    anywhere: torch.device, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    options = {"logits": torch.zeros(4, 16), **options_of((2, 2, 4, 4, 2, 3)), **change}
    logits = options.pop("logits").to(anywhere)
    with pytest.raises(error, match=words) as told:
        op.device_limited_topk(logits, **options)
    assert str(told.value).startswith("device_limited_topk: ")


UNREADABLE = [
    (lambda x: x.double(), {}, "dtype torch.float64"),
    (lambda x: x.t().contiguous().t(), {}, "contiguous"),
    (lambda x: x.flatten()[1:-15].view(4, 16), {}, "modulo 16"),
    (lambda x: x.repeat(1, 33), {}, "logits has 528 experts; supported: at most 512"),
    (lambda x: x.repeat(1, 9)[:, :130].clone(), {"num_groups": 65}, "groups has 65; .* at most 64"),
    (lambda x: x.repeat(1, 9), {"num_limited": 4, "top_k": 17}, "top_k has 17; .* at most 16"),
]


@pytest.mark.parametrize(("change", "options", "words"), UNREADABLE)
def test_what_a_kernel_cannot_read(
    device: torch.device, change: object, options: dict[str, int], words: str
) -> None:
    logits = change(torch.zeros(5, 16, device=device))  # type: ignore[operator]
    with pytest.raises((TypeError, ValueError), match=words):
        op.device_limited_topk(logits[:4], **options_of((2, 2, 4, 4, 2, 3)) | options)


def test_too_long_a_sequence(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "launch", lambda *_: pytest.fail("launched"))
    logits = torch.zeros(2**20 + 1, 1, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"logits has 1048577 positions .* at most 1048576"):
        op.device_limited_topk(logits, **options_of((2**20 + 1, 1, 1, 1, 1, 1)))


@pytest.mark.parametrize(("change", "options"), [each[:2] for each in UNREADABLE])
def test_plain_torch_reads_it(change: object, options: dict[str, int]) -> None:
    logits = change(torch.arange(80.0).sin().view(5, 16))[:4]  # type: ignore[operator]
    options = options_of((2, 2, 4, 4, 2, 3)) | options
    found = op.device_limited_topk(logits, **options)
    groups = options["num_groups"]
    size, limit, top_k = logits.size(1) // groups, options["num_limited"], options["top_k"]
    expected = of_affinities(logits.softmax(-1), (2, 2, groups, size, limit, top_k))
    torch.testing.assert_close(found.affinities, expected.affinities)
    assert all(torch.equal(getattr(found, n), getattr(expected, n)) for n in COUNTS)


def backward(inputs: list[Any]) -> Tensor:
    *tensors, factor, dtype = inputs
    return op.device_limited_topk_backward(*tensors, scaling_factor=factor, dtype=dtype)


def inputs_backward(device: torch.device) -> list[Any]:
    """Gradient of gates, affinities, experts, gradient of sums, factor, dtype."""
    shape = (2, 2, 4, 4, 2, 3)
    logits = logits_of(shape, None, torch.float32, device)
    found = op.device_limited_topk(logits, **options_of(shape))
    tensors = found.gates, found.affinities, found.experts, found.affinity_sums
    return [*tensors, 1.0, torch.float32]


@pytest.mark.parametrize(
    ("place", "change", "error", "words"),
    [
        (0, lambda x: x.double(), TypeError, "grad_gates has dtype torch.float64"),
        (0, lambda x: x[:, :2].contiguous(), ValueError, r"grad_gates has shape \[4, 2\]"),
        (1, lambda x: x.bfloat16(), TypeError, "affinities has dtype torch.bfloat16"),
        (1, lambda x: x[:, :0].contiguous(), ValueError, "affinities has 0 experts"),
        (2, lambda x: x.int(), TypeError, "experts has dtype torch.int32"),
        (2, lambda x: x[:3].contiguous(), ValueError, r"experts has shape \[3, 3\]"),
        (2, lambda x: x[:, :0], ValueError, "experts has 0 columns; supported: at least 1"),
        (3, lambda x: x[:, :8].contiguous(), ValueError, "grad_affinity_sums has shape"),
        (3, lambda x: torch.cat([x, x[:1]]), ValueError, "sums has 3 sequences; .* of 4 tokens"),
        (4, lambda _: inf, ValueError, "scaling_factor has inf; supported: finite numbers"),
        (4, lambda _: nan, ValueError, "scaling_factor has nan"),
        (5, lambda _: torch.int64, TypeError, "dtype has dtype torch.int64; supported: float"),
    ],
)
def test_what_is_refused_backward(
    anywhere: torch.device, place: int, change: object, error: type[Exception], words: str
) -> None:
    inputs = inputs_backward(anywhere)
    inputs[place] = change(inputs[place])  # type: ignore[operator]
    with pytest.raises(error, match=words) as told:
        backward(inputs)
    assert str(told.value).startswith("device_limited_topk_backward: ")


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (2, lambda x: x.repeat(1, 6), "experts has 18 columns; supported: at most 16"),
        (3, lambda x: x.t().contiguous().t(), "grad_affinity_sums has strides"),
    ],
)
def test_what_a_kernel_cannot_read_backward(
    device: torch.device, place: int, change: object, words: str
) -> None:
    inputs = inputs_backward(device)
    inputs[place] = change(inputs[place])  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        backward(inputs)


def test_plain_torch_reads_strides_backward() -> None:
    inputs = inputs_backward(CPU)
    strided = [each.t().contiguous().t() for each in inputs[:4]]
    torch.testing.assert_close(backward([*strided, *inputs[4:]]), backward(inputs))


@pytest.mark.parametrize("wrong", [-1, 16])
def test_an_expert_that_does_not_exist(emulated_library: Path, wrong: int) -> None:
    inputs = inputs_backward(CPU)
    inputs[2][2, 1] = wrong
    with pytest.raises(ValueError, match=f"_backward: experts has {wrong}; .* less than 16"):
        backward(inputs)
    told = f"experts has one that does not exist: found {wrong}"
    with library.emulated(emulated_library), pytest.raises(library.LaunchError, match=told):
        backward(inputs)
