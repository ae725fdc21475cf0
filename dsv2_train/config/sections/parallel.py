"""Layout: how the model is spread over ranks, and which code computes each op."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from dsv2_train.config.sections.base import Section

Recomputed = Literal["moe", "mla_up_projection"]
LayersPerStage = Annotated[tuple[PositiveInt, ...], Field(strict=False)]


class ParallelConfig(Section):
    """Sizes of the parallel axes; data parallelism takes what pp leaves of the world.

    `dispatcher` exchanges tokens between expert ranks; with `overlap_shared_experts` the shared
    experts compute meanwhile. `recompute` names what the backward pass computes again instead of
    keeping it: `moe` all of a mixture of experts behind its routing, exchange included;
    `mla_up_projection` query, key and value heads from their latents.
    """

    world_size: PositiveInt
    pp: PositiveInt = 1
    ep: PositiveInt = 1
    tp: PositiveInt = 1
    cp: PositiveInt = 1
    layers_per_stage: LayersPerStage | None = None
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_size: PositiveInt | None = None
    linear: Literal["auto", "torch", "te"] = "auto"
    norm: Literal["auto", "torch", "te"] = "auto"
    attention: Literal["auto", "sdpa", "te"] = "auto"
    experts: Literal["auto", "loop", "grouped_mm"] = "auto"
    dispatcher: Literal["device_dedup", "megatron_alltoall", "deepep"] = "device_dedup"
    overlap_shared_experts: bool = True
    recompute: Annotated[tuple[Recomputed, ...], Field(strict=False)] = ()

    @property
    def dp(self) -> int:
        """Data-parallel ranks of the non-expert weights (expert ranks included)."""
        return self.world_size // self.pp

    @property
    def edp(self) -> int:
        """Data-parallel ranks of the expert weights."""
        return self.dp // self.ep

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Transformer layers on each pipeline stage, first stage first.

        Without `layers_per_stage` the layers are spread evenly, and what does not divide goes to
        the stages before the last ones, which carry the output head.
        """
        if self.layers_per_stage is not None:
            return self.layers_per_stage
        base, extra = divmod(num_layers, self.pp)
        return tuple(base + (stage < extra) for stage in range(self.pp))
