"""The stages of a pipeline make sure that they are about to run the same step."""

import hashlib
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from dsv2_train.pipeline.plans import Plan


class DisagreementError(RuntimeError):
    """Stages that would have sent each other what the other does not expect."""


@dataclass(frozen=True)
class StepShape:
    """What all stages of a pipeline must have in common in a step.

    Attributes:
        num_microbatches: m.
        seq_length: positions of an activation.
        micro_batch_size: samples of it.
        hidden_size: its width.
        bytes_an_element: of it.
        order: a number that stands for the order of all stages' ops.
    """

    num_microbatches: int
    seq_length: int
    micro_batch_size: int
    hidden_size: int
    bytes_an_element: int
    order: int


def order_of(plan: Plan) -> int:
    """A number that another plan has by chance once in 2^63."""
    digest = hashlib.blake2b(repr((plan.placement, plan.ops)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def require_agreement(shape: StepShape, hosts: dist.ProcessGroup) -> None:
    """Compare the step that this stage is about to run with the other stages'.

    Args:
        shape: this stage's.
        hosts: the ranks of the pipeline in the order of stages, over gloo.

    Raises:
        DisagreementError: on every stage, naming two stages, their ranks and what differs.

    Note:
        Collective over the pipeline: one all-gather of 48 bytes between hosts.
    """
    names = [field.name for field in fields(StepShape)]
    ours = torch.tensor([getattr(shape, name) for name in names])
    everyone = [torch.empty_like(ours) for _ in range(hosts.size())]
    dist.all_gather(everyone, ours, group=hosts)
    first = everyone[0].tolist()
    for stage, other in enumerate(everyone):
        for name, here, there in zip(names, first, other.tolist(), strict=True):
            if here != there:
                ranks = dist.get_process_group_ranks(hosts)
                raise DisagreementError(
                    f"pipeline: stage 0 (rank {ranks[0]}) and stage {stage} (rank {ranks[stage]}) "
                    f"are about to run different steps: {name} {here} and {there}"
                )
