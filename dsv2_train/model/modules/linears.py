"""Linear layers and the embedding; they add their weight gradient straight to its buffer."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from dsv2_train.ops.linear import embedding, linear
from dsv2_train.ops.main_grad import Deferred, DeferredGradients, mark_added


class Linear(nn.Module):
    """y = x W^T, under megatron-core's calling convention for linears without bias.

    Args:
        weight: [output_size, input_size], taken over with its attributes.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] -> [..., output_size], and no bias. No communication."""
        return linear(x, self.weight), None


class Embedding(nn.Module):
    """Rows of a table, under megatron-core's calling convention.

    Args:
        weight: [vocab_size, hidden_size], taken over with its attributes.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden_size]. No communication."""
        return embedding(tokens, self.weight)


def replace_linears(module: nn.Module) -> None:
    """Put ours in the place of megatron-core's local linears and embedding: equal without TP.

    After construction, because specs do not reach all of them: MLA checks its down-projections by
    identity.
    """
    for name, child in module.named_children():
        if isinstance(child, ColumnParallelLinear | RowParallelLinear):
            setattr(module, name, Linear(child.weight))
        elif isinstance(child, VocabParallelEmbedding):
            setattr(module, name, Embedding(child.weight))
        else:
            replace_linears(child)


class WeightGradStore:
    """Where a linear of transformer-engine leaves a weight gradient that is computed later.

    In the place of its own store (read against 2.9 to 2.11), which is a queue that
    `module.backward_dw()` empties, and which delays in a BW too: there autograd counts the weight's
    gradient, and its reduction may start, before anything can call `backward_dw`.

    Args:
        weight: of the linear.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight

    def delay_wgrad_compute(self) -> bool:
        """Asked in the linear's backward pass: True in a B; False in a BW, which adds at once."""
        deferred: DeferredGradients | None = getattr(self._weight, "deferred_gradients", None)
        return deferred is not None and deferred.is_collecting

    def put(self, operands: Sequence[Any], add: Callable[..., object]) -> None:
        """Keep a gradient for later.

        Args:
            operands: the linear's input and its output's gradient, quantized where it computes so.
            add: takes them; adds the gradient to the weight's `main_grad`.
        """
        # Set by `DeferredGradients`.
        deferred: DeferredGradients = self._weight.deferred_gradients  # type: ignore[attr-defined]
        deferred.put_off(Deferred(self._weight, lambda: add(*operands)))


def take_weight_gradients(module: nn.Module) -> None:
    """Let the linears of transformer-engine add to `main_grad` themselves, now or when asked.

    After construction: megatron-core 0.16.1's `gradient_accumulation_fusion` asks apex of its local
    linears as well, its `delay_wgrad_compute` two microbatches whose experts overlap.

    Args:
        module: to be trained under megatron-core's data-parallel wrapper.
    """
    # Optional package: importable only where transformer-engine is installed.
    from megatron.core.extensions.transformer_engine import TELinear  # noqa: PLC0415

    for child in module.modules():
        if isinstance(child, TELinear):
            child.wgrad_store = WeightGradStore(child.weight)
            child.fuse_wgrad_accumulation = True
            child.weight.register_hook(partial(_mark_what_came_without_a_tensor, child.weight))


def _mark_what_came_without_a_tensor(weight: nn.Parameter, gradient: Tensor | None) -> None:
    """As if transformer-engine had marked it: in what torch's checkpoint recomputes, it does not.

    It finds a copy in the weight's place, without `grad_added_to_main_grad`, and returns None.
    """
    if gradient is None:
        weight.grad = mark_added(weight)
