"""What megatron-core 0.16.1 takes from CUDA, answered on a machine without CUDA.

Every answer is one function that names the megatron-core symbols it serves. With all of them
installed, the process groups, the all-to-all dispatcher and DistributedDataParallel
run unchanged on CPU ranks over gloo. Importing this module has one effect, that of
`_imported_without_a_compiler`; everything else waits for `install`.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def _replace(owner: object, **attributes: object) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


@contextlib.contextmanager
def _imported_without_a_compiler() -> Iterator[None]:
    """`megatron.core.jit`, which hands functions to `torch.compile` when it is imported.

    That imports a compiler: a third of what a rank imports at its start. Our model calls none of
    these functions on a CPU. Where megatron-core was imported before, nothing changes: so the
    benchmarks compare with an unmodified one. It is for a torch that was built without CUDA, since
    asking for a driver would keep this process from forking others that use it.
    """
    compiles = torch.compile
    if torch.version.cuda is None and "megatron.core" not in sys.modules:
        _replace(torch, compile=_as_it_is)
    try:
        yield
    finally:
        _replace(torch, compile=compiles)


def _as_it_is(function: object = None, **_: object) -> object:
    """What a decorator returns, with or without arguments."""
    return _as_it_is if function is None else function


with _imported_without_a_compiler():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher


def install() -> None:
    """Answer every assumption below, once; where CUDA is, only that transformer-engine is there.

    Note:
        Replaces attributes of `torch.cuda` and of megatron-core modules for the whole process.
    """
    answer_undefined_names()
    if torch.cuda.is_available() or issubclass(torch.cuda.Stream, _Stream):
        return
    for answer in ANSWERS:
        answer()


def answer_current_device() -> None:
    """`torch.cuda.current_device()` wherever megatron-core allocates.

    Serves the linears, mappings, rotary embeddings, DDP buffers and pipeline receives. The default
    device is the CPU, or what an enclosing `with torch.device(...)` says.
    """
    _replace(torch.cuda, current_device=torch.get_default_device)


def answer_streams() -> None:
    """Streams and events: `shared_experts`, `token_dispatcher`, `p2p_communication`, DDP.

    The CPU runs in order, so that there is nothing to wait for.
    """
    _replace(
        torch.cuda,
        Stream=_Stream,
        stream=contextlib.nullcontext,
        current_stream=_Stream,
        default_stream=_Stream,
        synchronize=_nothing,
    )


def answer_random_state() -> None:
    """The generator behind `tensor_parallel.random`: tracker, seeds and recomputation.

    It is the CPU's here, and megatron-core logs a warning when that one moves inside a fork.
    """
    _replace(
        torch.cuda,
        get_rng_state=_get_random_state,
        manual_seed=torch.default_generator.manual_seed,
    )
    _replace(random, _get_cuda_rng_state=_get_random_state, _set_cuda_rng_state=_set_random_state)
    logging.getLogger(random.__name__).addFilter(_moves_elsewhere)


def answer_split_sizes() -> None:
    """`token_dispatcher.maybe_move_tensor_to_cpu`: the all-to-all takes its sizes as host values.

    megatron-core converts only what comes from a GPU.
    """
    _replace(token_dispatcher, maybe_move_tensor_to_cpu=_to_host)


def answer_undefined_names() -> None:
    """Names that 0.16.1 leaves undefined without transformer-engine, on CUDA too.

    `moe_utils.te_general_gemm`: router gating asks whether it is None.
    `multi_latent_attention.TELinear`: a mock that `isinstance` refuses, while `HAVE_TE` is true.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        _replace(moe_utils, te_general_gemm=None)
    if not isinstance(multi_latent_attention.TELinear, type):
        _replace(multi_latent_attention, HAVE_TE=False)


ANSWERS: tuple[Callable[[], None], ...] = (
    answer_current_device,
    answer_streams,
    answer_random_state,
    answer_split_sizes,
)


class _Stream:
    """A stream, and the event recorded on it, of a device that runs in order."""

    def __init__(self, device: object = None) -> None:
        del device

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass


def _nothing(device: object = None) -> None:
    del device


def _get_random_state(
    device: object = None, clone: bool = False, graph_safe: bool = False
) -> Tensor:
    assert not graph_safe, "CUDA graphs need CUDA"
    del device, clone
    return torch.get_rng_state()


def _set_random_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
    assert not graph_safe, "CUDA graphs need CUDA"
    del device
    torch.set_rng_state(new_state)


def _moves_elsewhere(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor
