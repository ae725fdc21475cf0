"""Registration of an op with torch: kernel on CUDA, reference on CPU."""

from collections.abc import Callable
from typing import Any

from torch.library import CustomOpDef, custom_op

from dsv2_kernels.native import library


def register(
    name: str,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> CustomOpDef:
    """Define `torch.ops.dsv2.<name>`.

    Args:
        name: of the op.
        kernel: checks its arguments and launches; its annotations are the op's schema.
        reference: the same in plain torch; CPU tensors go here, or inside `library.emulated`
            through the kernel.
        fake: the outputs' shapes and dtypes, without data.
        mutates: names of arguments that are written to.
    """
    op = custom_op(f"dsv2::{name}", kernel, mutates_args=mutates, device_types="cuda")

    def on_cpu(*arguments: Any) -> Any:
        return (kernel if library.is_emulating() else reference)(*arguments)

    op.register_kernel("cpu")(on_cpu)
    op.register_fake(fake)
    return op
