"""Tensors that lie on different devices are refused by every op, also where one has no data."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_kernels import (  # noqa: F401  which register the ops
    device_limited_topk,
    dispatch_index,
    grouped_linear,
    mla_rope,
    permute,
    swiglu_gate,
)

ONES = torch.ones
ROWS = torch.arange(2)
ENDS = torch.tensor([2], dtype=torch.int32)
HEADS = (ONES(1, 1, 1, 8), ONES(1, 1, 1, 8), ONES(1, 1, 1, 4), ONES(1, 2), ONES(1, 2))
OPS: dict[str, tuple[Any, ...]] = {
    "device_limited_topk_backward": (
        *(ONES(2, 1), ONES(2, 4), torch.zeros(2, 1, dtype=torch.int64), ONES(1, 4)),
        *(1.0, torch.float32),
    ),
    "gather_rows": (ONES(2, 4), ROWS, ROWS, ROWS),
    "sum_rows": (ONES(2, 4), ONES(2), ROWS, ROWS, ROWS),
    "sum_rows_backward": (ONES(2, 4), ONES(2, 4), ONES(2), ROWS, ROWS, ROWS),
    "gather_gates": (ONES(2, 1), ROWS, ROWS, ROWS, ROWS),
    "gather_gates_backward": (ONES(2), ROWS, ROWS, ROWS, ROWS, 1),
    "grouped_linear": (ONES(2, 4), ONES(1, 4, 4), ENDS),
    "grouped_linear_dgrad": (ONES(2, 4), ONES(1, 4, 4), ENDS),
    "grouped_linear_wgrad_": (ONES(1, 4, 4), ONES(2, 4), ONES(2, 4), ENDS),
    "grouped_linear_accumulate_": (ONES(1, 4, 4), ONES(1, 4, 4), ENDS),
    "mla_rope": (ONES(1, 1, 1, 8), ONES(1, 1, 1, 8), ONES(1, 1, 4), ONES(1, 2), ONES(1, 2), True),
    "mla_rope_backward": HEADS,
    "swiglu_gate": (ONES(2, 8), ONES(2)),
    "swiglu_gate_backward": (ONES(2, 4), ONES(2, 8), ONES(2)),
}
ONE_TENSOR = {"device_limited_topk", "dispatch_index"}


@pytest.mark.parametrize("name", OPS)
def test_a_tensor_without_data_among_others_is_refused(name: str) -> None:
    op, inputs = getattr(torch.ops.dsv2, name), OPS[name]
    op(*inputs)
    names = [argument.name for argument in op.default._schema.arguments]
    for place in [i for i, value in enumerate(inputs) if isinstance(value, Tensor)][1:]:
        mixed = [value.to("meta") if i == place else value for i, value in enumerate(inputs)]
        told = f"^{name}: {names[place]} has a tensor on meta; supported: cpu$"
        with pytest.raises(ValueError, match=told):
            op(*mixed)


def test_every_op_of_several_tensors_was_asked() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {schema.name.removeprefix("dsv2::") for schema in schemas if "dsv2::" in schema.name}
    assert names == OPS.keys() | ONE_TENSOR
