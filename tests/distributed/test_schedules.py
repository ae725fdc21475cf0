"""Every schedule gives the gradients of one process without a pipeline."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.ops.main_grad import Deferred, DeferredGradients
from dsv2_train.pipeline.plans import Kind
from dsv2_train.pipeline.schedules.run_plan import run_plan
from dsv2_train.pipeline.stage import stage as stages
from dsv2_train.pipeline.stage.agreement import DisagreementError
from tests.helpers.gradients import whole_gradients
from tests.helpers.pipeline import Pipeline, Stepped, pipeline_config, run_steps
from tests.helpers.world import World

COUNTS = (1, 3, 8)  # microbatches


def _of(schedule: str, chunks: int = 1, pp: int = 2, *more: str) -> tuple[str, ...]:
    return (
        f"parallel.schedule={schedule}",
        f"parallel.chunks={chunks}",
        f"parallel.pp={pp}",
        *more,
    )


LAYOUTS = {
    "1f1b": (2, _of("1f1b")),
    "interleaved, 2 chunks": (2, _of("interleaved", 2)),
    "interleaved, 4 chunks": (2, _of("interleaved", 4)),
    "zb_h1": (2, _of("zb_h1")),
    "zb_h1, 4 stages": (4, _of("zb_h1", 1, 4)),
    "zb_h1, uneven": (2, _of("zb_h1", 1, 2, "parallel.layers_per_chunk=[1,7]")),
    "zb_v": (2, _of("zb_v", 2)),
    "zb_v, 4 stages": (4, _of("zb_v", 2, 4)),
    "zb_v, uneven": (2, _of("zb_v", 2, 2, "parallel.layers_per_chunk=[1,3,3,1]")),
    "interleaved_zb, 2 chunks": (2, _of("interleaved_zb", 2)),
    "interleaved_zb, 4 chunks": (2, _of("interleaved_zb", 4)),
    "search, 1 chunk": (2, _of("search")),
    "search, 2 chunks": (2, _of("search", 2)),
    "search, 4 chunks": (2, _of("search", 4, 2, "parallel.max_activations=5")),
}

# Their reference is one stage with the same expert and data ranks.
MORE = {
    "1f1b, EP 2": (_of("1f1b"), "parallel.ep=2"),
    "zb_h1, EP 2": (_of("zb_h1"), "parallel.ep=2"),
    "zb_v, EP 2": (_of("zb_v", 2), "parallel.ep=2"),
    "interleaved_zb, EP 2": (_of("interleaved_zb", 4), "parallel.ep=2"),
    "1f1b, DP 2": (_of("1f1b"), "parallel.ep=1"),
    "interleaved, DP 2": (_of("interleaved", 2), "parallel.ep=1"),
    "zb_h1, DP 2": (_of("zb_h1"), "parallel.ep=1"),
    "zb_v, DP 2": (_of("zb_v", 2), "parallel.ep=1"),
    "zb_v, EP 2, recompute": (
        _of("zb_v", 2, 2, "parallel.recompute=[moe,mla_up_projection]"),
        "parallel.ep=2",
    ),
    "search, DP 2, nothing overlaps": (
        _of(
            "search",
            2,
            2,
            "parallel.overlap_grad_reduce=false",
            "parallel.overlap_param_gather=false",
            "parallel.bucket_size=null",
        ),
        "parallel.ep=1",
    ),
}


def _run(world: World, config: RunConfig) -> list[list[Stepped]]:
    """By number of microbatches, then rank."""
    ranks = world.run(run_steps, config.parallel.world_size, config, COUNTS)
    return [list(step) for step in zip(*ranks, strict=True)]


def _whole(ranks: list[Stepped]) -> dict[str, torch.Tensor]:
    return whole_gradients(ran.gradients for ran in ranks)


def _reference(world: World, precision: str, dp: int, *more: str) -> list[dict[str, torch.Tensor]]:
    config = pipeline_config(dp, f"recipe.precision={precision}", *more)
    return [_whole(step) for step in _run(world, config)]


@pytest.fixture(scope="module")
def alone(world: World) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {precision: _reference(world, precision, 1) for precision in ("fp64", "fp32")}


@pytest.fixture(scope="module")
def shared(world: World) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {ep: _reference(world, "fp64", 2, ep) for ep in ("parallel.ep=1", "parallel.ep=2")}


def _require_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_without_a_pipeline(
    world: World, alone: dict[str, list[dict[str, torch.Tensor]]], layout: str
) -> None:
    size, overrides = LAYOUTS[layout]
    for precision, references in alone.items():
        config = pipeline_config(size, f"recipe.precision={precision}", *overrides)
        for count, ranks, expected in zip(COUNTS, _run(world, config), references, strict=True):
            # Of a weight, every schedule adds the microbatches in the same order: to the bit.
            _require_equal(_whole(ranks), expected, 0.0)
            plan = run_plan(config, count)
            for stage, ran in enumerate(ranks):
                assert ran.executed == plan.ops[stage]
                splits = any(op.kind is Kind.W for op in ran.executed)
                assert ran.num_deferred == (count * ran.num_matrices if splits else 0)


@pytest.mark.parametrize("layout", MORE)
def test_with_expert_and_data_ranks(
    world: World, shared: dict[str, list[dict[str, torch.Tensor]]], layout: str
) -> None:
    overrides, ep = MORE[layout]
    config = pipeline_config(4, "recipe.precision=fp64", ep, *overrides)
    for ranks, expected in zip(_run(world, config), shared[ep], strict=True):
        _require_equal(_whole(ranks), expected, 1e-12)


def _by_hand(rank: int, config: RunConfig, count: int) -> dict[str, torch.Tensor]:
    """One process, torch's own backward pass, microbatch by microbatch, no buffers."""
    pipeline = Pipeline(config)
    [chunk] = pipeline.chunks
    for parameter in chunk.parameters():
        del parameter.main_grad, parameter.grad_added_to_main_grad
    scale = torch.tensor(1 / count, dtype=torch.float64)
    gradients: dict[str, torch.Tensor] = {}
    with mock.patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale):
        for microbatch in range(count):
            output, loss_of = pipeline.forward_step(iter([microbatch]), chunk.module)
            weights = list(chunk.parameters())
            for weight, one in zip(
                weights, torch.autograd.grad(loss_of(output)[0] / count, weights), strict=True
            ):
                name = whole_of(weight).name
                gradients[name] = gradients.get(name, 0) + one.flatten()
    process_groups.destroy()
    return gradients


def test_without_a_pipeline_gradients_are_torch_s(
    world: World, alone: dict[str, list[dict[str, torch.Tensor]]]
) -> None:
    for count, expected in zip(COUNTS, alone["fp64"], strict=True):
        [found] = world.run(_by_hand, 1, pipeline_config(1, "recipe.precision=fp64"), count)
        _require_equal(found, expected, 1e-12)


def _with_a_mistake(rank: int, config: RunConfig, mistake: str) -> Stepped | str:
    calls, add = itertools.count(), Deferred.add

    def skip_one(deferred: Deferred) -> None:
        if next(calls) != 5:
            add(deferred)

    patches = {
        "the losses' scale is not set": mock.patch.object(stages, "MoEAuxLossAutoScaler"),
        "a W is left out": mock.patch.object(Deferred, "add", skip_one),
        "nothing is deferred": mock.patch.object(
            DeferredGradients, "put_off", lambda *unused: False
        ),
    }
    try:
        with patches[mistake]:
            return run_steps(rank, config, (3,))[0]
    except RuntimeError as error:
        process_groups.destroy()
        return str(error)


@pytest.mark.parametrize("mistake", ["the losses' scale is not set", "a W is left out"])
def test_a_mistake_of_a_schedule_is_another_gradient(
    world: World, alone: dict[str, list[dict[str, torch.Tensor]]], mistake: str
) -> None:
    """The negative controls."""
    config = pipeline_config(2, "recipe.precision=fp64", *_of("zb_h1"))
    found = world.run(_with_a_mistake, 2, config, mistake)
    with pytest.raises(AssertionError):
        _require_equal(_whole(found), alone["fp64"][1], 1e-3)


def test_a_split_backward_that_defers_nothing_is_refused(world: World) -> None:
    config = pipeline_config(1, _of("zb_h1")[0])
    [said] = world.run(_with_a_mistake, 1, config, "nothing is deferred")
    assert said == (
        "pipeline: B of microbatch 0, chunk 0 put off no weight gradient, so its W is empty"
    )


def _another_count(rank: int, config: RunConfig) -> str:
    pipeline = Pipeline(config)
    with pytest.raises(DisagreementError) as refused:
        pipeline.step(4 + rank)
    process_groups.destroy()
    return str(refused.value)


def test_stages_about_to_run_different_steps_are_both_named(world: World) -> None:
    config = pipeline_config(2, *_of("zb_h1"))
    for said in world.run(_another_count, 2, config):
        assert said == (
            "pipeline: stage 0 (rank 0) and stage 1 (rank 1) are about to run different steps: "
            "num_microbatches 4 and 5"
        )


def _another_order(rank: int, config: RunConfig) -> str:
    schedule = "zb_h1" if rank else "1f1b"
    parallel = config.parallel.model_copy(update={"schedule": schedule})
    pipeline = Pipeline(config.model_copy(update={"parallel": parallel}))
    with pytest.raises(DisagreementError) as refused:
        pipeline.step(4)
    process_groups.destroy()
    return str(refused.value)


def test_stages_with_different_plans_are_both_named(world: World) -> None:
    config = pipeline_config(2, *_of("zb_h1"))
    for said in world.run(_another_order, 2, config):
        assert said == (
            "pipeline: stage 0 (rank 0) and stage 1 (rank 1) are about to run different steps: "
            "schedule 1f1b and zb_h1; of stage 0, op 2 is BW of microbatch 0, chunk 0 and B of "
            "microbatch 0, chunk 0"
        )


def _cut_short(rank: int, config: RunConfig) -> str:
    """The first stage makes an activation that the other one, left out here, does not expect."""
    pipeline = Pipeline(config)
    forward = pipeline.forward_step

    def cut_short(data: object, chunk: torch.nn.Module) -> object:
        output, loss_of = forward(data, chunk)
        return output[1:], loss_of

    pipeline.forward_step = cut_short  # type: ignore[method-assign]
    run = mock.patch.object(stages.StageStep, "run", lambda *unused: None)
    with run if rank else contextlib.nullcontext():
        try:
            pipeline.step(1)
        except DisagreementError as error:
            return str(error)
        finally:
            process_groups.destroy()
    return ""


def test_an_activation_of_another_shape_names_both_stages(world: World) -> None:
    config = pipeline_config(2, "recipe.precision=bf16", *_of("1f1b"))
    assert world.run(_cut_short, 2, config)[0] == (
        "pipeline: F of microbatch 0, chunk 0 on stage 0 gives [23, 1, 48] bfloat16, "
        "but stage 1 expects [24, 1, 48] bfloat16"
    )
