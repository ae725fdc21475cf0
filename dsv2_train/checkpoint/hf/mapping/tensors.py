"""Every tensor of a model, in its order: ours, and the Hugging Face tensors they hold."""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv2_train.checkpoint.hf.mapping.names import HfTensor, hf_tensors
from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.distributed.sharding import GlobalTensor

WEIGHT = "weight/"


@dataclass(frozen=True)
class Cut:
    """A Hugging Face tensor, and where it is in a checkpoint of ours.

    Attributes:
        whole: our tensor that holds it.
        part: which range of it, flattened.
    """

    whole: GlobalTensor
    part: HfTensor

    @property
    def key(self) -> str:
        """Under which our tensor is in a checkpoint."""
        return WEIGHT + self.whole.name

    @property
    def numel(self) -> int:
        """Elements of the Hugging Face tensor."""
        return GlobalTensor(self.part.name, self.part.shape).numel


def cuts(model: ModelConfig) -> Iterator[Cut]:
    """Every Hugging Face tensor of a model; those that one of ours holds follow each other."""
    for whole in global_tensors(model):
        for part in hf_tensors(whole.name, whole.shape):
            yield Cut(whole, part)


def global_tensors(model: ModelConfig) -> Iterator[GlobalTensor]:
    """Name and shape of every tensor of a model, as `model.build` tags its parameters."""
    hidden = model.hidden_size
    yield GlobalTensor("embedding.word_embeddings.weight", (model.vocab_size, hidden))
    for layer in range(model.num_layers):
        dense = layer < model.num_dense_layers
        shapes = {
            "input_layernorm.weight": (hidden,),
            **{f"self_attention.{name}": shape for name, shape in _attention(model).items()},
            "pre_mlp_layernorm.weight": (hidden,),
            **{f"mlp.{name}": shape for name, shape in _mlp(model, dense).items()},
        }
        for name, shape in shapes.items():
            yield GlobalTensor(f"decoder.layers.{layer}.{name}", shape)
    yield GlobalTensor("decoder.final_layernorm.weight", (hidden,))
    yield GlobalTensor("output_layer.weight", (model.vocab_size, hidden))


def _attention(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads, q_rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    query_width = heads * model.qk_head_dim
    if q_rank is None:
        query: dict[str, tuple[int, ...]] = {"linear_q_proj.weight": (query_width, hidden)}
    else:
        query = {
            "linear_q_down_proj.weight": (q_rank, hidden),
            "q_layernorm.weight": (q_rank,),
            "linear_q_up_proj.weight": (query_width, q_rank),
        }
    kv_width = heads * (model.qk_nope_head_dim + model.v_head_dim)
    return {
        **query,
        "linear_kv_down_proj.weight": (model.kv_lora_rank + model.qk_rope_head_dim, hidden),
        "kv_layernorm.weight": (model.kv_lora_rank,),
        "linear_kv_up_proj.weight": (kv_width, model.kv_lora_rank),
        "linear_proj.weight": (hidden, heads * model.v_head_dim),
    }


def _mlp(model: ModelConfig, dense: bool) -> dict[str, tuple[int, ...]]:
    hidden, experts = model.hidden_size, model.num_routed_experts
    if dense:
        return _swiglu("linear_", ".weight", model.intermediate_size, hidden)
    width, shared = model.moe_intermediate_size, model.shared_intermediate_size
    return {
        "router.weight": (experts, hidden),
        **_swiglu("shared_experts.linear_", ".weight", shared, hidden),
        "experts.fc1": (experts, 2 * width, hidden),
        "experts.fc2": (experts, hidden, width),
    }


def _swiglu(prefix: str, suffix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}fc1{suffix}": (2 * width, hidden), f"{prefix}fc2{suffix}": (hidden, width)}
