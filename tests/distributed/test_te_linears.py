"""transformer-engine's linears under a schedule that has W. It needs a GPU: here a fake of it."""

import contextlib
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.modules import linears
from tests.helpers import fake_te
from tests.helpers.gradients import whole_gradients
from tests.helpers.pipeline import Pipeline, Stepped, pipeline_config
from tests.helpers.world import World

Ranks = list[list[Stepped]]

NUM_MICROBATCHES = 5
RECOMPUTED = "parallel.recompute=[moe,mla_up_projection]"
LAYOUTS = {
    "1f1b, recompute": ("parallel.schedule=1f1b", RECOMPUTED),
    "zb_h1": ("parallel.schedule=zb_h1",),
    "zb_v, recompute": ("parallel.schedule=zb_v", "parallel.chunks=2", RECOMPUTED),
}


def _config(linear: str, *overrides: str) -> RunConfig:
    """Two stages of two data ranks, whose reductions overlap."""
    by_torch = ("parallel.norm=torch", "parallel.attention=sdpa", "recipe.precision=fp64")
    layout = ("parallel.pp=2", "parallel.ep=1", f"parallel.linear={linear}")
    return pipeline_config(4, *by_torch, *layout, *overrides)


def _steps(rank: int, config: RunConfig, mistake: str) -> tuple[list[Stepped], int] | str:
    """Two steps, and how many linears are transformer-engine's; or what an assertion says."""
    patches: dict[str, AbstractContextManager[object]] = {
        "": contextlib.nullcontext(),
        "nobody asks": mock.patch("dsv2_train.model.build.take_weight_gradients"),
        "theirs delays": mock.patch.object(
            linears, "WeightGradStore", lambda _: fake_te.WeightGradStore(True)
        ),
        "no mark": mock.patch.object(
            linears, "_mark_what_came_without_a_tensor", lambda *unused: None
        ),
    }
    with fake_te.installed() as wrappers, patches[mistake], _buffers_of_ones():
        pipeline = Pipeline(config)
        served = [
            each for chunk in pipeline.chunks for each in chunk.modules()
            if isinstance(each, wrappers.TELinear)
        ]  # fmt: skip
        try:
            return [pipeline.step(NUM_MICROBATCHES) for _ in range(2)], len(served)
        except AssertionError as error:
            return str(error)
        finally:
            process_groups.destroy()


def _buffers_of_ones() -> AbstractContextManager[object]:
    """What overwrites the gradient buffer is another gradient then."""
    zero = DistributedDataParallel.zero_grad_buffer

    def fill(chunk: DistributedDataParallel) -> None:
        zero(chunk)
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            buffer.grad_data.fill_(1)

    return mock.patch.object(DistributedDataParallel, "zero_grad_buffer", fill)


def _run(world: World, config: RunConfig, mistake: str = "") -> tuple[Ranks, list[int]]:
    steps, served = zip(*world.run(_steps, 4, config, mistake), strict=True)
    return [list(ranks) for ranks in zip(*steps, strict=True)], list(served)


def _differ(found: Ranks, expected: Ranks) -> float:
    """The largest difference of a gradient, over its largest entry."""
    pairs = [
        (one, whole_gradients(ran.gradients for ran in theirs)[name])
        for ours, theirs in zip(found, expected, strict=True)
        for name, one in whole_gradients(ran.gradients for ran in ours).items()
    ]
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def _num_deferred(steps: Ranks) -> list[list[int]]:
    return [[rank.num_deferred for rank in ranks] for ranks in steps]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_what_is_put_off_are_those_of_torch_s_linears(
    world: World, layout: str
) -> None:
    expected, none = _run(world, _config("torch", *LAYOUTS[layout]))
    found, served = _run(world, _config("te", *LAYOUTS[layout]))
    assert set(none) == {0} and min(served) > 10
    assert _differ(found, expected) <= 1e-12  # fp64, the same products
    assert _num_deferred(found) == _num_deferred(expected)


def test_a_linear_that_does_not_ask_computes_its_weight_gradient_in_b(world: World) -> None:
    """The first negative control: the count tells, the gradient does not."""
    layout = LAYOUTS["zb_h1"]
    expected, _ = _run(world, _config("torch", *layout))
    found, served = _run(world, _config("te", *layout), "nobody asks")
    assert _differ(found, expected) <= 1e-12
    lost = [
        theirs - ours
        for ours, theirs in zip(_num_deferred(found)[1], _num_deferred(expected)[1], strict=True)
    ]
    assert lost == [NUM_MICROBATCHES * count for count in served]


def test_their_own_queue_that_nobody_empties_is_another_gradient(world: World) -> None:
    layout = LAYOUTS["zb_h1"]
    expected, _ = _run(world, _config("torch", *layout))
    found, _ = _run(world, _config("te", *layout), "theirs delays")
    assert _differ(found, expected) > 0.1


def test_megatrons_hook_misses_a_recomputed_gradient_that_is_not_marked(world: World) -> None:
    config = _config("te", "parallel.schedule=zb_h1", "parallel.pp=1", RECOMPUTED)
    for said in world.run(_steps, 4, config, "no mark"):
        assert said == "param.grad being None is not safe when overlap_grad_reduce is True"


def test_their_queue_emptied_as_the_gradient_of_the_input_passes_is_late_in_a_bw() -> None:
    """Why theirs is not used: autograd counts a weight's gradient first."""

    class Emptying(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            layer.backward_dw()
            return gradient

    layer = fake_te.Linear(
        4,
        3,
        bias=False,
        params_dtype=torch.float32,
        device="cpu",
        fuse_wgrad_accumulation=True,
        delay_wgrad_compute=True,
    )
    weight = layer.weight
    nn.init.ones_(weight)
    weight.main_grad = torch.zeros(3, 4)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    seen: list[bool] = []
    weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.main_grad.any().item()))
    layer(Emptying.apply(torch.ones(2, 4, requires_grad=True))).sum().backward()
    assert seen == [False] and weight.main_grad.all()
