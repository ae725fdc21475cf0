"""Rows to the ranks of a group and back, while this rank computes something else.

    exchange = Exchange(send_counts, receive_counts, group, Place.DISPATCH)
    in_flight = exchange.issue(rows, gates)
    ...                                         # computed while the rows travel
    rows, gates = exchange.wait(*in_flight)

In the backward pass the gradients travel the other way: issued where `wait` was, waited for where
`issue` was, with the backward of what was computed between them. That order is autograd's
own, which runs ready nodes latest first.
"""

# S rows sent, R rows received

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place


class Exchange:
    """One all-to-all of rows, to be issued and waited for once forward and once backward.

    Buffers are held from issue to wait. All ranks of the group must use their exchanges in the same
    order.

    Args:
        send_counts: rows for each rank of the group, in the order of ranks; they add up to S.
        receive_counts: rows from each; they add up to R.
        group: over which the rows travel.
        place: what a rank is said to be in while it issues and waits.
    """

    def __init__(
        self,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        group: dist.ProcessGroup,
        place: Place,
    ) -> None:
        self._send, self._receive = list(send_counts), list(receive_counts)
        self._group = group
        self._place = place
        self._held: list[tuple[dist.Work, Tensor, Tensor]] = []

    def issue(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Start sending [S, ...] tensors of any dtype, sorted by rank.

        Returns:
            The [R, ...] tensors being filled, for `wait` alone. One all-to-all a tensor.
        """
        in_flight: tuple[Tensor, ...] = _Issue.apply(self, *rows)
        return in_flight

    def wait(self, *in_flight: Tensor) -> tuple[Tensor, ...]:
        """[R, ...] tensors, arrived, sorted by the rank that sent them."""
        arrived: tuple[Tensor, ...] = _Wait.apply(self, *in_flight)
        return arrived

    def start(self, rows: Sequence[Tensor], *, back: bool) -> tuple[Tensor, ...]:
        """Issue without autograd; `back` sends [R, ...] to where they came from."""
        assert not self._held, "what was issued before has not been waited for"
        send, receive = (self._receive, self._send) if back else (self._send, self._receive)
        with activity.working(self._place):
            for sent in rows:
                source = sent.contiguous()
                target = source.new_empty(sum(receive), *source.shape[1:])
                work = dist.all_to_all_single(
                    target, source, receive, send, group=self._group, async_op=True
                )
                self._held.append((work, source, target))
        return tuple(target for _, _, target in self._held)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait without autograd for what `start` issued."""
        held, self._held = self._held, []
        with activity.waiting(self._place):
            for work, _, _ in held:
                work.wait()
        return tuple(target for _, _, target in held)


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.start(rows, back=False)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients came by the exchange, in another shape than those autograd passed here.
        del unused
        return (None, *ctx.exchange.finish())


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *in_flight: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.finish()
        return tuple(rows.view_as(rows) for rows in in_flight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.start(gradients, back=True)
        return (None, *gradients)
