"""Bytes of model state on a rank under ZeRO-1: weights, gradients, optimizer state."""

from dataclasses import dataclass

from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.recipe.parameters import ParameterCount, model_parameters, stage_parameters

# Bytes per parameter by recipe.precision: weight; gradient; optimizer state. With bf16 weights the
# state is an fp32 master and two moments. fp32 weights are their own master. fp64 is for comparing
# gradients: the sharded optimizer refuses it, so it holds no state.
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_GRADIENT_BYTES = {"bf16": 4, "fp32": 4, "fp64": 8}
_OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8, "fp64": 0}


@dataclass(frozen=True)
class RankMemory:
    """Model state of one rank in bytes, without the padding of communication buckets.

    Attributes:
        weight_bytes: parameters the rank computes with.
        gradient_bytes: accumulation buffer, as large on every rank as its parameters (ZeRO-1).
        optimizer_bytes: masters and moments of the share that the rank owns.
        checkpoint_bytes: that share as the rank writes it: weights, masters, moments; no memory of
            its own, but for the copy of an asynchronous checkpoint.
    """

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and optimizer state together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def stage_memory(config: RunConfig) -> tuple[RankMemory, ...]:
    """Model state on each rank of each pipeline stage, first stage first."""
    stages = stage_parameters(config.model, config.parallel)
    return tuple(
        rank_memory(stage.on_rank(config.parallel), config.parallel, config.recipe.precision)
        for stage in stages
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """A whole checkpoint: weights, masters and moments of every parameter, each once."""
    precision = config.recipe.precision
    held_once = _WEIGHT_BYTES[precision] + _OPTIMIZER_BYTES[precision]
    return held_once * model_parameters(config.model).total


def rank_memory(held: ParameterCount, parallel: ParallelConfig, precision: str) -> RankMemory:
    """Model state of a rank.

    Args:
        held: parameters on the rank.
        parallel: optimizer state is sharded over dp ranks, that of routed experts over edp ranks.
        precision: `recipe.precision`.
    """
    owned = _ceil_div(held.replicated, parallel.dp) + _ceil_div(held.routed_experts, parallel.edp)
    return RankMemory(
        weight_bytes=_WEIGHT_BYTES[precision] * held.total,
        gradient_bytes=_GRADIENT_BYTES[precision] * held.total,
        optimizer_bytes=_OPTIMIZER_BYTES[precision] * owned,
        checkpoint_bytes=(_WEIGHT_BYTES[precision] + _OPTIMIZER_BYTES[precision]) * owned,
    )


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
