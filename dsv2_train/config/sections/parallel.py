"""Layout: how the model is spread over ranks, and which code computes each op."""

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt

from dsv2_train.config.placement import Placement
from dsv2_train.config.schedules import Schedule, placement_shape
from dsv2_train.config.section import Section

AutoTorchOrKernel = Literal["auto", "torch", "kernel"]
Recomputed = Literal["moe", "mla_up_projection"]
LayersPerChunk = Annotated[tuple[PositiveInt, ...], Field(strict=False)]


class ParallelConfig(Section):
    """Sizes of the parallel axes; data parallelism takes what pp leaves of the world.

    `schedule` orders the work of the pipeline, whose stages hold `chunks` pieces of the model each;
    `layers_per_chunk` are those of all pieces in the order of the model, if not the same number
    each. `max_activations` bounds the chunk activations that a stage holds where `schedule=search`;
    pp chunks if not given, what 1F1B holds.
    `attention` by `sdpa` is torch's, on a GPU by that of its back ends which is fastest at the
    start. `rope` rotates and assembles attention's heads, but for `te`, whose heads megatron-core
    assembles. `routing` is what the gate's logits lead to, `permute` brings rows into the order of
    the experts and back, `experts` multiplies them with their experts' weights, `activation` is
    that of the experts and of the other feed-forward parts. `kernel` is the project's own CUDA
    kernel, which `auto` does not pick: none was measured on a GPU yet.
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
    schedule: Schedule = "1f1b"
    chunks: PositiveInt = 1
    layers_per_chunk: LayersPerChunk | None = None
    max_activations: PositiveInt | None = None
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_size: PositiveInt | None = None
    linear: Literal["auto", "torch", "te"] = "auto"
    norm: Literal["auto", "torch", "te"] = "auto"
    attention: Literal["auto", "sdpa", "te"] = "auto"
    routing: AutoTorchOrKernel = "auto"
    experts: Literal["auto", "loop", "grouped_mm", "kernel"] = "auto"
    activation: AutoTorchOrKernel = "auto"
    rope: AutoTorchOrKernel = "auto"
    permute: AutoTorchOrKernel = "auto"
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

    @property
    def placement(self) -> Placement:
        """Which stage holds which chunk of the model."""
        return Placement(self.pp, self.chunks, placement_shape(self.schedule, self.chunks))

    def split(self, num_layers: int) -> tuple[int, ...]:
        """Transformer layers of every chunk, in the order of the model."""
        if self.layers_per_chunk is not None:
            return self.layers_per_chunk
        count = self.placement.num_virtual_stages
        return (num_layers // count,) * count


KERNEL_SETTINGS = tuple(
    name
    for name, field in ParallelConfig.model_fields.items()
    if "kernel" in get_args(field.annotation)
)
"""Settings of `ParallelConfig` that may ask for the project's own CUDA kernels."""
