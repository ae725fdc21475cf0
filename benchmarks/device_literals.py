"""`device="cuda"` written into megatron-core's functions, for peers that run on a CPU."""

from functools import cache
from types import FunctionType

from megatron.core.pipeline_parallel import schedules


@cache
def schedules_on_cpu() -> None:
    """The token counts of megatron-core's schedules, on a machine without CUDA; once."""
    rewrite_constants(
        {"cuda": "cpu"},
        schedules.forward_backward_no_pipelining,
        schedules.forward_backward_pipelining_without_interleaving,
        schedules.forward_backward_pipelining_with_interleaving,
    )


def rewrite_constants(new: dict[str, str], *functions: FunctionType) -> None:
    """Exchange string constants in compiled functions, in place.

    Args:
        new: what takes the place of which constant, in tuples too.
        functions: what to change; every caller sees it.

    Raises:
        LookupError: for a function that has none of them any more.
    """

    def exchange(constant: object) -> object:
        if isinstance(constant, tuple):
            return tuple(exchange(item) for item in constant)
        return new.get(constant, constant) if isinstance(constant, str) else constant

    for function in functions:
        constants = exchange(function.__code__.co_consts)
        assert isinstance(constants, tuple)
        if constants == function.__code__.co_consts:
            raise LookupError(f"{function.__qualname__}: none of {list(new)} in it any more")
        function.__code__ = function.__code__.replace(co_consts=constants)
