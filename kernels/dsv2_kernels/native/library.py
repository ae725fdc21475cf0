"""The compiled kernels of this process: found, loaded once, launched.

launch("swiglu_gate_forward", projected, gates, activation, rows, width, projected.dtype)
python -m dsv2_kernels.native.library    # why the kernels cannot run, status 1; or nothing, 0
"""

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_kernels.native.build import BUILT, SOURCES, source_hash

# csrc/common/dtypes.cuh has the same numbers.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_EMULATED: ContextVar[ctypes.CDLL | None] = ContextVar("emulated kernels", default=None)


class LaunchError(RuntimeError):
    """A kernel that could not be started, or an emulated one that did something wrong."""


@contextmanager
def emulated(path: Path) -> Iterator[None]:
    """CPU tensors inside go through the kernels' own source, compiled for the host.

    Args:
        path: made by `build_emulated`.
    """
    token = _EMULATED.set(ctypes.CDLL(str(path)))
    try:
        yield
    finally:
        _EMULATED.reset(token)


def is_emulating() -> bool:
    """Whether CPU tensors go through the emulated kernels now."""
    return _EMULATED.get() is not None


def checks_indices() -> bool:
    """Whether kernels look at the indices that they read: emulated, or built with --debug."""
    return is_emulating() or bool(_facts().get("debug"))


@cache
def why_missing() -> str | None:
    """Why the kernels cannot run on this process' GPU, and what to do; None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    facts = _facts()
    if not (BUILT / "cuda.so").exists() or not facts:
        return "the kernels are not built; `make kernels` builds them"
    if SOURCES.exists() and facts["sources"] != source_hash():
        return "the kernels were built from other sources; `make kernels` builds them anew"
    return why_unfit(facts, torch.version.cuda, torch.cuda.get_device_capability())


def why_unfit(
    facts: dict[str, Any], torch_cuda: str | None, capability: tuple[int, int]
) -> str | None:
    """Why a library does not fit a torch and a GPU; None where it does.

    Args:
        facts: what `build_cuda` wrote.
        torch_cuda: the CUDA release of torch.
        capability: of the GPU.
    """
    if torch_cuda is None or torch_cuda.split(".")[0] != facts["nvcc"].split(".")[0]:
        return (
            f"the kernels were built by nvcc {facts['nvcc']}, torch is for CUDA {torch_cuda}; "
            "put the nvcc of torch's major release first on PATH, then `make kernels`"
        )
    major, minor = capability
    built = facts["architectures"]
    # Code for sm_80 runs on every 8.x; code for sm_90a on 9.0 alone.
    if f"{major}{minor}a" not in built and not any(
        each.isdigit() and each[:-1] == str(major) and int(each[-1]) <= minor for each in built
    ):
        return f"the kernels are built for sm_{', sm_'.join(built)}, this GPU is sm_{major}{minor}"
    return None


def launch(name: str, *arguments: Tensor | torch.dtype | int | float | None) -> None:
    """Start a kernel on the current stream of its tensors' device.

    Args:
        name: of a launcher in csrc.
        arguments: its arguments but the stream; None is a null pointer.

    Raises:
        LaunchError: what CUDA, or the emulation, refused.
    """
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            _call(_cuda(), name, arguments, torch.cuda.current_stream().cuda_stream)
    else:
        emulation = _EMULATED.get()
        if emulation is None:
            raise LaunchError(f"{name}: kernels take tensors of a GPU, these are on {device}")
        _call(emulation, name, arguments, 0)


def _call(library: ctypes.CDLL, name: str, arguments: tuple[Any, ...], stream: int) -> None:
    function = getattr(library, name)
    status = function(*map(_as_c, arguments), ctypes.c_void_p(stream))
    if status:
        text = library.error_text
        text.restype = ctypes.c_char_p
        raise LaunchError(f"{name}: {text(status).decode()} (status {status})")


def _as_c(value: Tensor | torch.dtype | int | float | None) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int64(DTYPES[value])
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def _facts() -> dict[str, Any]:
    """What `build_cuda` wrote of the built library; empty without one."""
    noted = BUILT / "cuda.json"
    return dict(json.loads(noted.read_text())) if noted.exists() else {}


@cache
def _cuda() -> ctypes.CDLL:
    missing = why_missing()
    if missing:
        raise LaunchError(missing)
    return ctypes.CDLL(str(BUILT / "cuda.so"))


if __name__ == "__main__":
    sys.exit(why_missing())
