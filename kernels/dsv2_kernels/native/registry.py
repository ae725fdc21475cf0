"""Registration of an op with torch: kernel on CUDA, reference on CPU, checks before both."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema

from dsv2_kernels.native import library
from dsv2_kernels.native.checks import Arguments


def register(
    name: str,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> CustomOpDef:
    """Define `torch.ops.dsv2.<name>`.

    Args:
        name: of the op.
        check: refuses what is wrong; takes `Arguments`, then the op's own.
        kernel: launches; its annotations are the op's schema.
        reference: the same in plain torch; CPU tensors go here, or inside `library.emulated`
            through the kernel.
        fake: the outputs' shapes and dtypes, without data.
        mutates: names of arguments that are written to.
    """

    def launch(*inputs: Any) -> Any:
        check(Arguments(name, for_kernel=True), *inputs)
        return kernel(*inputs)

    def on_cpu(*inputs: Any) -> Any:
        if library.is_emulating():
            return launch(*inputs)
        check(Arguments(name, for_kernel=False), *inputs)
        return reference(*inputs)

    names = list(inspect.signature(kernel).parameters)

    def on_meta(*inputs: Any) -> Any:
        # Torch sends tensors of several devices here where one of them has no data.
        tensors = [
            (argument, value)
            for argument, value in zip(names, inputs, strict=False)
            if isinstance(value, Tensor)
        ]
        arguments, device = Arguments(name, for_kernel=False), tensors[0][1].device
        for argument, tensor in tensors:
            arguments.device(argument, tensor, device)
        return fake(*inputs)

    schema = infer_schema(kernel, mutates_args=mutates)
    op = custom_op(
        f"dsv2::{name}", launch, mutates_args=mutates, device_types="cuda", schema=schema
    )
    op.register_kernel("cpu")(on_cpu)
    op.register_fake(on_meta)
    return op
