"""Which code computes each op, decided once, with the reason that the start-up table shows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv2_train.config.packages import PACKAGES
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.ops.kernels import why_no_kernels


@dataclass(frozen=True)
class Choice:
    """One op, the implementation that serves it, and why."""

    op: str
    implementation: str
    reason: str


_UNMEASURED = "no kernel of ours was measured on a GPU yet"

Resolve = Callable[[str, str, ParallelConfig, torch.device], Choice | Problem]


def choose(parallel: ParallelConfig, device: torch.device) -> dict[str, Choice]:
    """Resolve every `auto` for a device.

    Raises:
        ConfigError: if something asked for by name cannot run here, all such at once.
    """
    problems: list[Problem] = []
    choices: dict[str, Choice] = {}
    for op, resolve in _RULES.items():
        asked = getattr(parallel, op)
        choice = resolve(op, asked, parallel, device)
        if isinstance(choice, Problem):
            problems.append(choice)
        else:
            choices[op] = choice
    if problems:
        raise ConfigError(problems)
    return choices


def _torch_or_te(torch_name: str) -> Resolve:
    def resolve(
        op: str, asked: str, parallel: ParallelConfig, device: torch.device
    ) -> Choice | Problem:
        missing = why_no_package("te", device)
        if asked == "te" and missing:
            return _refused(op, asked, missing)
        if asked == "te":
            return Choice(op, "transformer_engine", "asked for")
        if asked == torch_name:
            return Choice(op, torch_name, "asked for")
        if missing:
            return Choice(op, torch_name, missing)
        return Choice(op, "transformer_engine", "CUDA and transformer-engine are there")

    return resolve


def _attention(
    op: str, asked: str, parallel: ParallelConfig, device: torch.device
) -> Choice | Problem:
    choice = _torch_or_te("sdpa")(op, asked, parallel, device)
    if isinstance(choice, Choice) and choice.implementation == "sdpa" and device.type == "cpu":
        return Choice(op, "blocked", "torch's SDPA is slow on a CPU for two head widths")
    return choice


def _dispatcher(
    op: str, asked: str, parallel: ParallelConfig, device: torch.device
) -> Choice | Problem:
    if parallel.ep == 1 and asked == "device_dedup":
        return Choice(op, "none", "all experts of a layer are on one rank")
    if asked == "deepep" and (missing := why_no_package("deepep", device)):
        return _refused(op, asked, missing)
    reason = "one copy of a token an expert rank" if asked == "device_dedup" else "asked for"
    return Choice(op, asked, reason)


def _experts(
    op: str, asked: str, parallel: ParallelConfig, device: torch.device
) -> Choice | Problem:
    if asked == "kernel":
        return _torch_or_kernel(op, asked, parallel, device)
    if asked != "auto":
        return Choice(op, asked, "asked for")
    if device.type == "cuda":
        return Choice(op, "grouped_mm", f"torch's grouped matmul; {_UNMEASURED}")
    return Choice(op, "loop", "fastest on a CPU and flat in the number of experts")


def _torch_or_kernel(
    op: str, asked: str, parallel: ParallelConfig, device: torch.device
) -> Choice | Problem:
    if asked == "auto":
        return Choice(op, "torch", _UNMEASURED)
    if asked == "kernel" and (missing := why_no_kernels(device)):
        return _refused(op, asked, missing)
    return Choice(op, asked, "asked for")


def _rope(op: str, asked: str, parallel: ParallelConfig, device: torch.device) -> Choice | Problem:
    attention = _attention("attention", parallel.attention, parallel, device)
    if isinstance(attention, Problem) or attention.implementation != "transformer_engine":
        return _torch_or_kernel(op, asked, parallel, device)
    if asked == "kernel":
        remedy = "parallel.attention=sdpa leaves it to us"
        why = f"megatron-core assembles the heads of transformer-engine's attention; {remedy}"
        return _refused(op, asked, why)
    return Choice(op, "megatron_core", "comes with transformer-engine's attention")


def _permute(
    op: str, asked: str, parallel: ParallelConfig, device: torch.device
) -> Choice | Problem:
    if parallel.dispatcher == "device_dedup":
        return _torch_or_kernel(op, asked, parallel, device)
    if asked == "kernel":
        return _refused(op, asked, f"dispatcher={parallel.dispatcher} orders rows itself")
    return Choice(op, "megatron_core", f"part of dispatcher={parallel.dispatcher}")


def _refused(op: str, asked: str, why: str) -> Problem:
    return Problem(f"parallel.{op}", asked, f"not possible here: {why}")


def why_no_package(package: str, device: torch.device) -> str | None:
    """Why a package of `PACKAGES` that needs CUDA cannot serve a device; None where it can."""
    if device.type != "cuda":
        return "no CUDA device"
    return PACKAGES[package].why_missing()


_RULES: dict[str, Resolve] = {
    "linear": _torch_or_te("torch"),
    "norm": _torch_or_te("torch"),
    "attention": _attention,
    "routing": _torch_or_kernel,
    "experts": _experts,
    "activation": _torch_or_kernel,
    "rope": _rope,
    "permute": _permute,
    "dispatcher": _dispatcher,
}
