"""What a stage has in memory, puts off and refuses while it runs a plan."""

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.ops.main_grad import Deferred
from dsv2_train.pipeline import build
from dsv2_train.pipeline.messages import Action
from dsv2_train.pipeline.plans import Kind, Op, Plan
from dsv2_train.pipeline.schedules.run_plan import run_plan
from dsv2_train.pipeline.simulate import PlanError, peak_activations
from dsv2_train.pipeline.stage.agreement import DisagreementError
from dsv2_train.pipeline.stage.stage import StageStep
from tests.helpers.gradients import Gradients
from tests.helpers.pipeline import Pipeline, pipeline_config
from tests.helpers.world import World

CHUNKS = {"1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2, "interleaved_zb": 4, "search": 2}


def _config(schedule: str, *more: str) -> RunConfig:
    chunks = CHUNKS[schedule]
    return pipeline_config(
        2, "parallel.pp=2", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}", *more
    )


def _held(rank: int, config: RunConfig, count: int) -> list[int]:
    """After each op, of how many forwards something that autograd saved is in memory still."""
    pipeline = Pipeline(config)
    weights = {each.untyped_storage()._cdata for c in pipeline.chunks for each in c.parameters()}
    forwards: list[list[StorageWeakRef]] = []
    held: list[int] = []
    run = StageStep._run

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            forwards[-1].append(StorageWeakRef(storage))
        return tensor

    def watched(step: StageStep, action: Action) -> None:
        if action.op.kind is Kind.F:
            forwards.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(step, action)
        held.append(sum(any(not saved.expired() for saved in each) for each in forwards))

    with mock.patch.object(StageStep, "_run", watched):
        pipeline.step(count)
    process_groups.destroy()
    return held


@pytest.mark.parametrize("schedule", CHUNKS)
def test_as_many_activations_are_in_memory_as_the_plan_holds(world: World, schedule: str) -> None:
    config = _config(schedule)
    plan = run_plan(config, 6)
    changes = {Kind.F: 1, Kind.B: 0, Kind.W: -1, Kind.BW: -1}
    for stage, held in enumerate(world.run(_held, 2, config, 6)):
        assert held == list(itertools.accumulate(changes[op.kind] for op in plan.ops[stage]))
        assert max(held) == peak_activations(plan)[stage]


RECOMPUTED = ("", "moe", "mla_up_projection", "moe,mla_up_projection")


def _put_off(rank: int, configs: list[RunConfig]) -> list[tuple[Counter[str], Gradients]]:
    """Of each configuration the weights whose gradients are put off, how often; all gradients."""
    found = []
    add = Deferred.add
    for config in configs:
        names: Counter[str] = Counter()

        def counted(deferred: Deferred, names: Counter[str] = names) -> None:
            names[whole_of(deferred.weight).name] += 1
            add(deferred)

        with mock.patch.object(Deferred, "add", counted):
            ran = Pipeline(config).step(3)
        assert names.total() == ran.num_deferred
        found.append((names, ran.gradients))
        process_groups.destroy()
    return found


def test_putting_off_and_recomputing_change_no_bit_and_recomputing_no_count(world: World) -> None:
    """In bf16, the weight gradients in fp32: every schedule adds the same products in one order."""
    configs = [
        _config(schedule, "recipe.precision=bf16", f"parallel.recompute=[{recompute}]")
        for schedule in ("1f1b", "zb_h1")
        for recompute in RECOMPUTED
    ]
    for ran in world.run(_put_off, 2, configs):
        at_once, later = ran[: len(RECOMPUTED)], ran[len(RECOMPUTED) :]
        expected = at_once[0][1]
        matrices = {name for name, _ in expected if "norm" not in name}
        assert all(not names for names, _ in at_once)
        assert all(names == dict.fromkeys(matrices, 3) for names, _ in later)
        for _, gradients in ran[1:]:
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                assert gradient.dtype == torch.float32
                assert torch.equal(gradient, expected[key]), key


def _deadlocked(rank: int, config: RunConfig) -> tuple[str, int]:
    """What a plan that each stage could run by itself is refused with; steps begun."""
    first = [Op(Kind.F, 0, 0), Op(Kind.BW, 0, 0), Op(Kind.F, 1, 0), Op(Kind.BW, 1, 0)]
    second = [Op(Kind.F, 0, 0), Op(Kind.F, 1, 0), Op(Kind.BW, 0, 0), Op(Kind.BW, 1, 0)]
    plan = Plan("by hand", config.parallel.placement, 2, (tuple(first), tuple(second)))
    with mock.patch.object(build, "run_plan", lambda *unused: plan):
        pipeline = Pipeline(config)
        run = mock.patch.object(StageStep, "run")
        with run as ran, pytest.raises(PlanError) as refused:
            pipeline.step(2)
    process_groups.destroy()
    return str(refused.value), ran.call_count


def test_a_plan_whose_stages_wait_for_each_other_is_refused_before_it_runs(world: World) -> None:
    said = (
        "a deadlock: stage 0 waits at BW of microbatch 0, chunk 0 for BW of microbatch 0, chunk 0 "
        "of stage 1, stage 1 waits at F of microbatch 1, chunk 0 for F of microbatch 1, chunk 0 of "
        "stage 0"
    )
    assert world.run(_deadlocked, 2, _config("1f1b")) == [(said, 0)] * 2


def _other_shape(rank: int, config: RunConfig, others: list[RunConfig]) -> list[str]:
    """The second stage is about to run a step of another shape."""
    said = []
    for other in others:
        pipeline = Pipeline(other if rank else config)
        with pytest.raises(DisagreementError) as refused:
            pipeline.step(2)
        said.append(str(refused.value))
        process_groups.destroy()
    return said


def test_stages_that_expect_other_shapes_are_both_named(world: World) -> None:
    others = {
        "recipe.sequence_length=12": "seq_length 24 and 12",
        "model.hidden_size=64": "hidden_size 48 and 64",
        "recipe.precision=fp32": "element_bytes 2 and 4",
    }
    config = _config("1f1b", "recipe.precision=bf16")
    configs = [_config("1f1b", "recipe.precision=bf16", other) for other in others]
    for said in world.run(_other_shape, 2, config, configs):
        for what, differs in zip(said, others.values(), strict=True):
            assert what == (
                "pipeline: stage 0 (rank 0) and stage 1 (rank 1) are about to run different "
                f"steps: {differs}"
            )
