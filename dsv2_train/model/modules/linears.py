"""Linear layers that add their weight gradient straight to the gradient buffer."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from dsv2_train.ops.linear import linear


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


def replace_linears(module: nn.Module) -> None:
    """Put `Linear` in the place of megatron-core's local linears, which it equals without TP.

    After construction, because specs do not reach all of them: MLA checks its down-projections by
    identity.
    """
    for name, child in module.named_children():
        if isinstance(child, ColumnParallelLinear | RowParallelLinear):
            setattr(module, name, Linear(child.weight))
        else:
            replace_linears(child)
