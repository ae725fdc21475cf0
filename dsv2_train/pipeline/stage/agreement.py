"""The stages of a pipeline make sure that they are about to run the same step."""

import hashlib
from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.pipeline.plans import Plan

PLAN = "plan"


class DisagreementError(RuntimeError):
    """Stages that would have sent each other what the other does not expect."""


def plan_hash(plan: Plan) -> int:
    """A number that another plan has by chance once in 2^63."""
    digest = hashlib.blake2b(repr((plan.placement, plan.ops)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def require_agreement(step: Mapping[str, int], plan: Plan, hosts: dist.ProcessGroup) -> None:
    """Compare the step that this stage is about to run with the other stages'.

    Args:
        step: what all stages must have in common, by name; the same names on all of them.
        plan: of the step, whose `plan_hash` is among it.
        hosts: the ranks of the pipeline in the order of stages, over gloo.

    Raises:
        DisagreementError: on every stage, naming two stages, their ranks and what differs.

    Note:
        Collective over the pipeline: one all-gather of 8 bytes a name between hosts; before plans
        that differ are told, one of the plans.
    """
    ours = torch.tensor(list(step.values()))
    everyone = [torch.empty_like(ours) for _ in range(hosts.size())]
    with activity.waiting(Place.STEP_AGREEMENT):
        dist.all_gather(everyone, ours, group=hosts)
    first = everyone[0].tolist()
    for stage, other in enumerate(everyone):
        for name, here, there in zip(step, first, other.tolist(), strict=True):
            if here != there:
                ranks = dist.get_process_group_ranks(hosts)
                what = f"{name} {here} and {there}"
                if name == PLAN:
                    what = _difference(*(_plans(plan, hosts)[at] for at in (0, stage)))
                raise DisagreementError(
                    f"pipeline: stage 0 (rank {ranks[0]}) and stage {stage} (rank {ranks[stage]}) "
                    f"are about to run different steps: {what}"
                )


def _plans(plan: Plan, hosts: dist.ProcessGroup) -> list[Plan]:
    """Of all stages; every one of them has seen that they differ."""
    everyone: list[Plan | None] = [None] * hosts.size()
    with activity.waiting(Place.STEP_AGREEMENT):
        dist.all_gather_object(everyone, plan, group=hosts)
    return cast(list[Plan], everyone)


def _difference(first: Plan, other: Plan) -> str:
    """The first op that differs."""
    what = f"schedule {first.schedule} and {other.schedule}"
    for stage, (here, there) in enumerate(zip(first.ops, other.ops, strict=False)):
        for number, (op, another) in enumerate(zip(here, there, strict=False)):
            if op != another:
                return f"{what}; of stage {stage}, op {number} is {op} and {another}"
    return f"{what}; {first.placement} and {other.placement}"
