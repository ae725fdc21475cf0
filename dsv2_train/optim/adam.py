"""AdamW kernels that update a rank's shards, and which of them serves a run."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsv2_train.config.packages import PACKAGES
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.sections.optim import OptimConfig

ParamGroups = list[dict[str, Any]]


class Adam(Protocol):
    """What the four implementations have in common (torch.optim.Optimizer's attributes)."""

    param_groups: ParamGroups
    state: Any

    def step(self) -> object:
        """Update every parameter from its `.grad`."""


@dataclass(frozen=True)
class AdamChoice:
    """Which AdamW updates the shards.

    Attributes:
        implementation: torch, te, apex or deepspeed_cpu.
        reason: why, for the start-up table.
        on_host: masters and moments live in host memory, whatever the device of the weights.
        make: builds it from parameter groups and hyper-parameters.
    """

    implementation: str
    reason: str
    on_host: bool
    make: Callable[..., Adam]


class FusedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW kernel with one step count per group, as in TE's and apex's FusedAdam."""

    def __init__(
        self,
        params: ParamGroups,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    # torch's takes a closure that computes gradients anew: here they are given.
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter from its `.grad`; its moments are in `state` already."""
        for group in self.param_groups:
            group["step"] += 1
            params = group["params"]
            if not params:
                continue
            step = torch.tensor(float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def choose_adam(asked: str, device: torch.device) -> AdamChoice:
    """Resolve `optim.adam` for a device.

    Raises:
        ConfigError: if the implementation asked for cannot run here.
    """
    if asked == "torch":
        return _torch("asked for")
    if asked == "auto":
        return _best(device)
    missing = _why_missing(asked, device)
    if missing:
        raise ConfigError([Problem("optim.adam", asked, f"not possible here: {missing}")])
    return _from(asked, "asked for")


def make_adam(choice: AdamChoice, groups: ParamGroups, config: OptimConfig) -> Adam:
    """Build the chosen AdamW over shards, with zero moments, ready to load or to step.

    Args:
        choice: which implementation.
        groups: `params` (with their `.grad` in place) and `weight_decay` of each group.
        config: learning rate of the first step, betas, eps.
    """
    adam = choice.make(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    for group in adam.param_groups:
        for param in group["params"]:
            adam.state[param]["exp_avg"] = torch.zeros_like(param)
            adam.state[param]["exp_avg_sq"] = torch.zeros_like(param)
    set_step(adam, 0)
    return adam


def set_step(adam: Adam, step: int) -> None:
    """Say how many updates were made; bias correction depends on it.

    DeepSpeed counts per parameter, the others per group; what one does not read is harmless to it.
    """
    for group in adam.param_groups:
        group["step"] = step
        for param in group["params"]:
            adam.state[param]["step"] = step


@dataclass(frozen=True)
class _Source:
    """Where in its package an implementation is."""

    submodule: str
    name: str
    on_host: bool = False


_SOURCES = {
    "te": _Source("pytorch.optimizers", "FusedAdam"),
    "apex": _Source("optimizers", "FusedAdam"),
    "deepspeed_cpu": _Source("ops.adam", "DeepSpeedCPUAdam", on_host=True),
}


def _torch(reason: str) -> AdamChoice:
    return AdamChoice("torch", reason, False, FusedAdamW)


def _best(device: torch.device) -> AdamChoice:
    if device.type != "cuda":
        return _torch("torch's fused AdamW serves the CPU")
    reasons: list[str] = []
    for name in ("te", "apex"):
        missing = _why_missing(name, device)
        if missing is None:
            return _from(name, "; ".join([*reasons, f"CUDA and {name} are there"]))
        reasons.append(missing)
    return _torch("; ".join(reasons))


def _from(name: str, reason: str) -> AdamChoice:
    source = _SOURCES[name]
    make = getattr(importlib.import_module(_module(name)), source.name)
    return AdamChoice(name, reason, source.on_host, make)


def _module(name: str) -> str:
    return f"{PACKAGES[name].module}.{_SOURCES[name].submodule}"


def _why_missing(name: str, device: torch.device) -> str | None:
    module = _module(name)
    if device.type != "cuda" and not _SOURCES[name].on_host:
        return f"{module} needs a CUDA device"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not import ({error}); {PACKAGES[name].remedy}"
    return None
