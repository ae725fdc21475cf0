"""The exchange of DeepSeekMoE: a token travels once to each rank that holds experts of it."""

# T tokens, E routed experts, S copies sent, R copies received, e = E / ranks local experts

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.exchange import Exchange
from dsv2_train.ops.kernels import TorchOrKernel
from dsv2_train.ops.moe.permute import RowPlan, gather_gates, permute, row_plan, unpermute

# Marks an expert that a copy is not for; gate values are never negative.
_NOT_SELECTED = -1.0


@dataclass(frozen=True)
class ExpertRows:
    """What the experts of this rank compute on.

    Attributes:
        rows: [N, h], sorted by local expert.
        tokens_per_expert: [e] int64.
        gates: [N].
    """

    rows: Tensor
    tokens_per_expert: Tensor
    gates: Tensor


class Dispatch(Protocol):
    """One microbatch on its way to the ranks of its experts, and back; issued when made."""

    def arrived(self) -> ExpertRows:
        """Wait; then the rows of this rank's experts."""

    def issue_combine(self, expert_output: Tensor) -> None:
        """Start to send back [N, h], the experts' output times the gate values."""

    def combined(self) -> Tensor:
        """Wait; then the sum over each token's experts, [T, h]."""


class LocalDispatch:
    """All experts are on this rank: nothing travels. Arguments as below.

    Args:
        num_rows: how often `routed` is true, where it is known beforehand.
    """

    def __init__(
        self,
        hidden: Tensor,
        gates: Tensor,
        routed: Tensor,
        implementation: TorchOrKernel = "torch",
        num_rows: int | None = None,
    ) -> None:
        self._plan = row_plan(routed, implementation, num_rows)
        self._rows = _expert_rows(hidden, gates, self._plan)

    def arrived(self) -> ExpertRows:
        """The rows of this rank's experts."""
        return self._rows

    def issue_combine(self, expert_output: Tensor) -> None:
        """[N, h] -> the sum of each token's rows."""
        self._output = unpermute(expert_output, self._plan)

    def combined(self) -> Tensor:
        """[T, h]."""
        return self._output


class ExpertParallelDispatch:
    """One copy of a token for each rank that holds any of its experts, at most M.

    megatron-core sends a row for each of a token's K experts; a copy carries the gate values of all
    the receiver's experts. The receiver expands it, and returns one partial sum a copy.

    Args:
        hidden: [T, h] any float dtype.
        gates: [T, E] gate values, not negative.
        routed: [T, E] bool, the assignments to be computed: zero a token, or all on one rank, too.
        group: the expert-parallel group; its rank r holds experts r e to (r + 1) e - 1.
        implementation: which code orders the rows.

    Note:
        Reads numbers of rows back from a GPU, once: those of the copies, and of the rows that the
        received ones will be expanded to. Collective: one all-to-all of them, then rows and gate
        values in flight until `arrived`; partial sums from `issue_combine` until `combined`; the
        same backward. On the wire, beside the rows: 4 e bytes a copy, forward and backward.
    """

    def __init__(
        self,
        hidden: Tensor,
        gates: Tensor,
        routed: Tensor,
        group: dist.ProcessGroup,
        implementation: TorchOrKernel = "torch",
    ) -> None:
        ranks = group.size()
        by_rank = routed.view(routed.size(0), ranks, routed.size(1) // ranks)
        copied = by_rank.any(dim=-1)
        expanded = routed.sum(dim=0).view(ranks, -1).sum(dim=1)
        to_send = torch.stack([copied.sum(dim=0), expanded], dim=1)
        to_receive = torch.empty_like(to_send)
        with activity.waiting(Place.DISPATCH):
            dist.all_to_all_single(to_receive, to_send, group=group)
            sizes = torch.cat([to_send, to_receive], dim=1).t().tolist()
        send, _, receive, num_rows = sizes
        self._implementation, self._num_rows = implementation, sum(num_rows)
        self._copies = row_plan(copied, implementation, sum(send))
        marked = torch.where(routed, gates, _NOT_SELECTED).view(-1, by_rank.size(2))
        self._dispatch = Exchange(send, receive, group, Place.DISPATCH)
        self._combine = Exchange(receive, send, group, Place.COMBINE)
        self._in_flight = self._dispatch.issue(
            permute(hidden, self._copies), marked.index_select(0, self._copies.assignments)
        )

    def arrived(self) -> ExpertRows:
        """Wait; then the rows of this rank's experts, expanded from the copies."""
        copies, marked = self._dispatch.wait(*self._in_flight)
        selected = marked != _NOT_SELECTED  # a gate that is NaN travels as well
        self._plan = row_plan(selected, self._implementation, self._num_rows)
        return _expert_rows(copies, marked, self._plan)

    def issue_combine(self, expert_output: Tensor) -> None:
        """[N, h] -> one partial sum a copy, sent back to the token's rank."""
        self._in_flight = self._combine.issue(unpermute(expert_output, self._plan))

    def combined(self) -> Tensor:
        """Wait; then [T, h], the sum of each token's partial sums."""
        (partial_sums,) = self._combine.wait(*self._in_flight)
        return unpermute(partial_sums, self._copies)


class MegatronDispatch:
    """One of megatron-core's dispatchers, for comparison and for DeepEP; nothing overlaps.

    Args:
        hidden: [T, h].
        gates: [T, E].
        routed: [T, E] bool, K assignments a token: these dispatchers count on it.
        dispatcher: the layer's.
    """

    def __init__(
        self, hidden: Tensor, gates: Tensor, routed: Tensor, dispatcher: MoETokenDispatcher
    ) -> None:
        self._dispatcher = dispatcher
        sent = dispatcher.dispatch_preprocess(hidden, routed, gates)
        with activity.waiting(Place.DISPATCH):
            self._received = dispatcher.token_dispatch(*sent)

    def arrived(self) -> ExpertRows:
        """The rows of this rank's experts."""
        return ExpertRows(*self._dispatcher.dispatch_postprocess(*self._received))

    def issue_combine(self, expert_output: Tensor) -> None:
        """[N, h] -> sent back."""
        sent = self._dispatcher.combine_preprocess(expert_output)
        with activity.waiting(Place.COMBINE):
            self._returned = self._dispatcher.token_combine(sent)

    def combined(self) -> Tensor:
        """[T, h]."""
        return self._dispatcher.combine_postprocess(self._returned)


def _expert_rows(x: Tensor, gates: Tensor, plan: RowPlan) -> ExpertRows:
    return ExpertRows(permute(x, plan), plan.tokens_per_expert, gather_gates(gates, plan))
