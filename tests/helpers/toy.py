"""A module whose gradients are what a test says: for the optimizer and data parallelism."""

import hashlib

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsv2_train.distributed.sharding import GlobalTensor, tag

# name -> shape of the whole model's parameters; experts are stacked. Odd sizes force padding.
DENSE = {
    "0.norm": (7,),
    "0.wide": (3, 117),
    "1.tall": (61, 5),
    "1.norm": (5,),
    "2.matrix": (23, 11),
    "3.matrix": (13, 19),
    "3.norm": (1,),
}
EXPERTS = {"1.experts": (4, 9, 5), "2.experts": (8, 3, 7)}
SHAPES = DENSE | EXPERTS
NUM_LAYERS = 4


def whole_value(name: str, what: str) -> Tensor:
    """Values of a whole parameter, or of its gradient for one rank, step and microbatch.

    Multiples of 1/8 in a small range: exact in bf16, and so are their sums in fp32.
    """
    key = hashlib.sha256(f"{name}/{what}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "little"))
    return torch.randint(-24, 25, SHAPES[name], generator=generator) / 8


class Layer(nn.Module):
    """Parameters of one layer; the loss is their inner product with given tensors."""

    def __init__(self, values: dict[str, Tensor], ep_rank: int, ep_size: int) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        for name, value in values.items():
            local, offset = value, 0
            if name in EXPERTS:
                local = value.chunk(ep_size)[ep_rank]
                offset = ep_rank * local.numel()
            parameter = nn.Parameter(local.clone())
            if name in EXPERTS:
                parameter.allreduce = ep_size == 1  # type: ignore[attr-defined]
            tag(parameter, GlobalTensor(name, tuple(value.shape), offset))
            self.names[name] = name.replace(".", "_")
            self.register_parameter(self.names[name], parameter)

    def forward(self, loss: Tensor, gradients: dict[str, Tensor]) -> Tensor:
        for name, local_name in self.names.items():
            loss = loss + (getattr(self, local_name) * gradients[name]).sum()
        return loss


class Toy(MegatronModule):
    """The layers of one pipeline stage."""

    def __init__(self, layers: range, ep_rank: int, ep_size: int, dtype: torch.dtype) -> None:
        super().__init__(
            TransformerConfig(
                num_layers=1, hidden_size=8, num_attention_heads=1, cuda_graph_scope=[]
            )
        )
        self.layers = nn.ModuleList(
            Layer(
                {
                    name: whole_value(name, "weight").to(dtype)
                    for name in SHAPES
                    if int(name[0]) == layer
                },
                ep_rank,
                ep_size,
            )
            for layer in layers
        )

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        loss = torch.zeros(())
        for layer in self.layers:
            loss = layer(loss, gradients)
        return loss
