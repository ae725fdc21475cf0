"""How peers from libraries are called: only where their library is installed, and can run."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsv2_kernels.testing.case import Missing, Peer

Call = Callable[[], object]
DISTRIBUTIONS = "megatron-core", "transformer-engine", "liger-kernel", "triton"


def needs(*modules: str, gpu: bool = False) -> Callable[..., Callable[..., Peer]]:
    """Of a function that makes a peer from tensors: says why there is none, where there is none.

    Args:
        modules: without which it cannot run.
        gpu: whether it runs on a GPU alone.
    """

    def decorate(make: Callable[..., Peer]) -> Callable[..., Peer]:
        @functools.wraps(make)
        def made(tensor: Tensor, *rest: Any, **settings: Any) -> Peer:
            for module in modules:
                if not _is_installed(module):
                    return Missing(f"{module} is not installed")
            if gpu and tensor.device.type != "cuda":
                return Missing("runs on a GPU only")
            try:
                return make(tensor, *rest, **settings)
            except Exception as error:
                return functools.partial(_fail, error)

        return made

    return decorate


def plain_and_fused(peer: Callable[..., Peer], *inputs: object, note: str = "") -> dict[str, Peer]:
    """megatron-core's function as it is, and with transformer-engine's kernel instead.

    Args:
        peer: of `megatron`; takes the inputs and `fused`.
        *inputs: of the case.
        note: to be told behind the library's name.
    """
    fused = needs("transformer_engine", gpu=True)(functools.partial(peer, fused=True))
    return {
        f"megatron-core{note}": peer(*inputs, fused=False),
        f"transformer-engine{note}": fused(*inputs),
    }


def versions() -> dict[str, str | None]:
    """Of each library; None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(DISTRIBUTIONS)
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _fail(error: Exception) -> None:
    """A peer that could not be made fails as one that cannot be called: the others go on."""
    raise error
