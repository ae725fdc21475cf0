"""Linear layers and the embedding; they add their weight gradient straight to its buffer."""

from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from dsv2_train.ops.linear import embedding, linear


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
