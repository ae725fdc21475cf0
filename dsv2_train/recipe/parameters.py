"""Exact parameter counts by part, of a model, a pipeline stage and a rank.

Checked against the released checkpoints: 235,741,434,880 (DeepSeek-V2), 15,706,484,224 (Lite).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.config.sections.parallel import ParallelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part.

    Attributes:
        embedding: input embedding.
        attention: projection matrices of MLA.
        dense_ffn: SwiGLU of the layers before the first MoE layer.
        router: gates of the MoE layers.
        shared_experts: experts that every token uses.
        routed_experts: experts that tokens are routed to.
        norms: RMSNorm weights: two a layer, those of the latents, the final one.
        head: output head, not tied to the embedding.
    """

    embedding: int = 0
    attention: int = 0
    dense_ffn: int = 0
    router: int = 0
    shared_experts: int = 0
    routed_experts: int = 0
    norms: int = 0
    head: int = 0

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        names = [part.name for part in fields(self)]
        return ParameterCount(
            **{name: getattr(self, name) + getattr(other, name) for name in names}
        )

    @property
    def total(self) -> int:
        """All parts together."""
        return self.replicated + self.routed_experts

    @property
    def replicated(self) -> int:
        """What every data-parallel rank of a stage holds: all but the routed experts."""
        every_part: list[int] = [getattr(self, part.name) for part in fields(self)]
        return sum(every_part) - self.routed_experts

    def activated(self, model: ModelConfig) -> "ParameterCount":
        """The parameters that one token uses: of the routed experts, num_experts_per_tok.

        The paper's "21B" and "2.4B" are `total - embedding` of it (its head counted, its lookup
        not); with `- head` too it is 20,327,224,320 for DeepSeek-V2.
        """
        one_each_layer = self.routed_experts // model.num_routed_experts
        return replace(self, routed_experts=one_each_layer * model.num_experts_per_tok)

    def on_rank(self, parallel: ParallelConfig) -> "ParameterCount":
        """Of a stage's parameters, those on each of its ranks: an ep-th of the routed experts."""
        return replace(self, routed_experts=self.routed_experts // parallel.ep)


def model_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model."""
    return _layers(model, range(model.num_layers)) + _input(model) + _output(model)


def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> tuple[ParameterCount, ...]:
    """Parameters of each pipeline stage, first stage first, all routed experts included."""
    chunks = chunk_parameters(model, parallel.split(model.num_layers))
    place = parallel.placement
    return tuple(
        sum((chunks[idx] for idx in place.virtual_stages(stage)), ParameterCount())
        for stage in range(parallel.pp)
    )


def chunk_parameters(model: ModelConfig, split: Sequence[int]) -> tuple[ParameterCount, ...]:
    """Parameters of each chunk, in the order of the model; `split`: layers of each.

    The embedding is in the first one, the final norm and the head in the last one.
    """
    chunks = [_layers(model, layers) for layers in chunk_layer_ranges(split)]
    chunks[0] += _input(model)
    chunks[-1] += _output(model)
    return tuple(chunks)


def chunk_layer_ranges(split: Sequence[int]) -> tuple[range, ...]:
    """Indices of the layers of each chunk, counted through the model; `split`: how many each."""
    ranges: list[range] = []
    first = 0
    for num_layers in split:
        ranges.append(range(first, first + num_layers))
        first += num_layers
    return tuple(ranges)


def layer_parameters(model: ModelConfig, layer: int) -> ParameterCount:
    """Parameters of one transformer layer; `layer` counts from 0, dense layers come first."""
    hidden = model.hidden_size
    attention = ParameterCount(
        attention=_attention_matrices(model),
        norms=2 * hidden + (model.q_lora_rank or 0) + model.kv_lora_rank,
    )
    if layer < model.num_dense_layers:
        return attention + ParameterCount(dense_ffn=3 * hidden * model.intermediate_size)
    expert = 3 * hidden * model.moe_intermediate_size
    return attention + ParameterCount(
        router=model.num_routed_experts * hidden,
        shared_experts=model.num_shared_experts * expert,
        routed_experts=model.num_routed_experts * expert,
    )


def _attention_matrices(model: ModelConfig) -> int:
    hidden, heads = model.hidden_size, model.num_attention_heads
    query_width = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        query = hidden * query_width
    else:
        query = model.q_lora_rank * (hidden + query_width)
    kv_down = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    kv_up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    output = heads * model.v_head_dim * hidden
    return query + kv_down + kv_up + output


def _layers(model: ModelConfig, layers: Iterable[int]) -> ParameterCount:
    return sum((layer_parameters(model, layer) for layer in layers), ParameterCount())


def _input(model: ModelConfig) -> ParameterCount:
    return ParameterCount(embedding=model.vocab_size * model.hidden_size)


def _output(model: ModelConfig) -> ParameterCount:
    return ParameterCount(norms=model.hidden_size, head=model.vocab_size * model.hidden_size)
