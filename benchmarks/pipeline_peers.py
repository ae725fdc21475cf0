"""The same sleeping stages under megatron-core's schedules and torch's."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import _Action

from benchmarks.sleeping import (
    ACTIVATION_SHAPE,
    HIDDEN_SIZE,
    Contender,
    SleepingStage,
    forward_step,
)
from dsv2_train.config.placement import Placement
from dsv2_train.ops.main_grad import Deferred, DeferredGradients
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Op, Plan

_TORCHS_KINDS = {"FORWARD": Kind.F, "BACKWARD_INPUT": Kind.B, "BACKWARD_WEIGHT": Kind.W}


def megatron_core(groups: ProcessGroupCollection, plan: Plan, costs: Costs) -> Contender:
    """Its 1F1B, or its interleaved schedule where stages have several chunks.

    Args:
        groups: of `megatron_core_groups`.
        plan: our words for the order that megatron-core runs.
        costs: durations by virtual stage.
    """
    placement = plan.placement
    stage = SleepingStage(placement, groups.pp.rank(), costs)
    interleaved = placement.num_chunks > 1
    config = TransformerConfig(
        num_layers=placement.num_virtual_stages,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=1,
        pipeline_model_parallel_size=placement.num_stages,
        virtual_pipeline_model_parallel_size=placement.num_chunks if interleaved else None,
        pipeline_dtype=torch.float32,
        cuda_graph_scope=[],
        overlap_p2p_comm=interleaved,  # what Megatron-LM turns on for it
        batch_p2p_comm=not interleaved,
    )
    for chunk in stage.chunks:
        chunk.config = config
    step = partial(
        forward_backward_pipelining_with_interleaving
        if interleaved
        else forward_backward_pipelining_without_interleaving,
        forward_step_func=forward_step,
        data_iterator=[itertools.repeat(torch.zeros(ACTIVATION_SHAPE)) for _ in stage.chunks],
        model=stage.chunks,
        num_microbatches=plan.num_microbatches,
        seq_length=ACTIVATION_SHAPE[0],
        micro_batch_size=ACTIVATION_SHAPE[1],
        p2p_communicator=P2PCommunicator(groups.pp, config),
        pg_collection=groups,
    )
    return Contender(plan, stage, step)


def megatron_core_groups() -> ProcessGroupCollection:
    """Those that its schedules ask for: all ranks are a pipeline."""
    alone, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(dist.get_world_size())])
    return ProcessGroupCollection(
        tp=alone, cp=alone, dp_cp=alone, pp=dist.group.WORLD, embd=None, pos_embd=None
    )


def torch_zb_v(num_microbatches: int, costs_of: Callable[[Placement], Costs]) -> Contender:
    """ZB-V of torch, whose W is what the bodies put off (its `dw_builder`).

    So neither B nor W runs the backward pass of the body twice, as torch's own split of a backward
    pass does.

    Args:
        num_microbatches: m.
        costs_of: durations by virtual stage.
    """
    num_stages, index = dist.get_world_size(), dist.get_rank()
    placement = Placement(num_stages, 2, "v")
    stage = SleepingStage(placement, index, costs_of(placement))
    schedule = ScheduleZBVZeroBubble(
        [
            PipelineStage(
                chunk,
                virtual_stage,
                placement.num_virtual_stages,
                torch.device("cpu"),
                input_args=torch.zeros(ACTIVATION_SHAPE, requires_grad=virtual_stage > 0),
                output_args=torch.zeros(ACTIVATION_SHAPE, requires_grad=True),
                dw_builder=_WeightGradients(chunk.parameters()).take,
            )
            for chunk, virtual_stage in zip(
                stage.chunks, placement.virtual_stages(index), strict=True
            )
        ],
        num_microbatches,
        loss_fn=_sum,
        scale_grads=False,
    )
    samples = torch.zeros(num_microbatches * ACTIVATION_SHAPE[0], *ACTIVATION_SHAPE[1:])
    inputs = [samples] if index == 0 else []
    step = partial(schedule.step, *inputs, target=samples, return_outputs=False)
    orders = [schedule.pipeline_order[each] for each in range(num_stages)]
    ops = tuple(_as_ops(order, placement) for order in orders)
    return Contender(Plan("zb_v", placement, num_microbatches, ops), stage, step)


class _WeightGradients(DeferredGradients):
    """Puts off all weight gradients, and hands them out backward pass by backward pass."""

    _found: tuple[Deferred, ...] = ()

    def put_off(self, gradient: Deferred) -> bool:
        self._found += (gradient,)
        return True

    def take(self) -> Callable[[], None]:
        """Computes what was put off since the last call."""
        found, self._found = self._found, ()

        def add() -> None:
            for gradient in found:
                gradient.add()

        return add


def _sum(output: Tensor, target: Tensor) -> Tensor:
    del target
    return output.sum()


def _as_ops(order: list[_Action | None], placement: Placement) -> tuple[Op, ...]:
    """A stage's actions as ops; None stands for a pause."""
    ops = []
    for action in order:
        if action is not None:
            assert action.microbatch_index is not None
            _, chunk = placement.stage_and_chunk(action.stage_index)
            kind = _TORCHS_KINDS[action.computation_type.name]
            ops.append(Op(kind, action.microbatch_index, chunk))
    return tuple(ops)
