"""transformer-engine's linear in plain torch, under megatron-core's own wrappers of it.

What is asked of its weight gradient is as in transformer_engine/pytorch/module/linear.py, read
in 2.9, 2.10 and 2.11: the store, the closure, what backward returns and when it marks the weight.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any
from unittest import mock

import torch
from megatron.core import extensions, utils
from megatron.core.transformer import multi_latent_attention
from torch import Tensor, nn


class WeightGradStore:
    """A queue of the module."""

    def __init__(self, delay_wgrad_compute: bool) -> None:
        self._delays, self._queue = delay_wgrad_compute, Queue[tuple[list[Tensor], Any]]()

    def delay_wgrad_compute(self) -> bool:
        return self._delays

    def put(self, tensor_list: list[Tensor], func: Callable[..., Any]) -> None:
        assert self._delays
        self._queue.put((tensor_list, func))

    def pop(self) -> None:
        tensor_list, func = self._queue.get_nowait()
        func(*tensor_list)


# Those arguments of the true one that megatron-core gives and that do not matter here.
_UNUSED = {"sequence_parallel", "tp_group", "tp_size", "get_rng_state_tracker", "rng_tracker_name"}
_UNUSED |= {"init_method", "return_bias", "parallel_mode"}


class Linear(nn.Module):
    """transformer_engine.pytorch.Linear, without bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        params_dtype: torch.dtype,
        device: str,
        fuse_wgrad_accumulation: bool = False,
        delay_wgrad_compute: bool = False,
        **unused: object,
    ) -> None:
        super().__init__()
        assert not bias and unused.keys() <= _UNUSED
        weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.wgrad_store = WeightGradStore(delay_wgrad_compute)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        fuse, store = self.fuse_wgrad_accumulation, self.wgrad_store
        y: Tensor = _Linear.apply(self.weight, inp, fuse, store, is_first_microbatch)
        return y

    def backward_dw(self) -> None:
        if self.wgrad_store.delay_wgrad_compute():
            self.wgrad_store.pop()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        inp: Tensor,
        fuse: bool,
        store: WeightGradStore,
        is_first: bool | None,
    ) -> Tensor:
        ctx.save_for_backward(inp, weight)
        ctx.main_grad_func = lambda: weight.main_grad  # type: ignore[attr-defined]
        ctx.fuse, ctx.store, ctx.accumulates = fuse, store, not is_first
        return nn.functional.linear(inp, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inp, weight = ctx.saved_tensors
        main_grad = ctx.main_grad_func() if ctx.fuse else None

        def wgrad_gemm(x: Tensor, dy: Tensor) -> Tensor:
            product = torch.mm(dy.flatten(0, -2).t(), x.flatten(0, -2))
            if main_grad is None:
                return product
            return main_grad.add_(product) if ctx.accumulates else main_grad.copy_(product)

        wgrad = None
        if ctx.store.delay_wgrad_compute():
            ctx.store.put([inp, grad_output], wgrad_gemm)
        else:
            wgrad = wgrad_gemm(inp, grad_output)
        if ctx.fuse and hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            wgrad = torch.full_like(weight, torch.nan)
        elif ctx.fuse:
            wgrad = None
        return wgrad, grad_output @ weight, None, None, None


@contextmanager
def installed() -> Iterator[Any]:
    """megatron-core's module of wrappers as if transformer-engine were there: its linear is."""
    te = mock.MagicMock(__version__="2.9.0")
    te.pytorch.Linear = Linear
    package = {"transformer_engine": te, "transformer_engine.pytorch": te.pytorch}
    for name in ("fp8", "router"):
        package[f"transformer_engine.pytorch.{name}"] = mock.MagicMock()
    path = f"{extensions.__name__}.transformer_engine"
    spec = importlib.util.find_spec(path)
    assert spec is not None and spec.loader is not None
    wrappers = importlib.util.module_from_spec(spec)
    with (
        mock.patch.dict(sys.modules, {**package, path: wrappers}),
        mock.patch.object(utils, "_te_version", None),
        mock.patch.object(extensions, "transformer_engine", wrappers),
        mock.patch("dsv2_train.model.implementation.why_no_package", return_value=None),
    ):
        spec.loader.exec_module(wrappers)
        column = wrappers.TEColumnParallelLinear
        with mock.patch.object(multi_latent_attention, "TEColumnParallelLinear", column):
            yield wrappers
