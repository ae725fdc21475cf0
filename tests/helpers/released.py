"""The tensors of a released checkpoint, as its files list them: an oracle for counts and names."""

from collections.abc import Iterator

from dsv2_train.config.sections.model import ModelConfig

Shape = tuple[int, ...]


def released_tensors(model: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the Hugging Face checkpoint of such a model."""
    return {f"{name}.weight": shape for name, shape in _tensors(model)}


def _tensors(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    d, heads, e = model.hidden_size, model.num_attention_heads, model.moe_intermediate_size
    yield "model.embed_tokens", (model.vocab_size, d)
    yield "lm_head", (model.vocab_size, d)
    yield "model.norm", (d,)
    for layer in range(model.num_layers):
        p = f"model.layers.{layer}"
        yield f"{p}.input_layernorm", (d,)
        yield f"{p}.post_attention_layernorm", (d,)
        query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        if model.q_lora_rank is None:
            yield f"{p}.self_attn.q_proj", (query, d)
        else:
            yield f"{p}.self_attn.q_a_proj", (model.q_lora_rank, d)
            yield f"{p}.self_attn.q_a_layernorm", (model.q_lora_rank,)
            yield f"{p}.self_attn.q_b_proj", (query, model.q_lora_rank)
        yield f"{p}.self_attn.kv_a_proj_with_mqa", (model.kv_lora_rank + model.qk_rope_head_dim, d)
        yield f"{p}.self_attn.kv_a_layernorm", (model.kv_lora_rank,)
        value = heads * (model.qk_nope_head_dim + model.v_head_dim)
        yield f"{p}.self_attn.kv_b_proj", (value, model.kv_lora_rank)
        yield f"{p}.self_attn.o_proj", (d, heads * model.v_head_dim)
        if layer < model.num_dense_layers:
            yield from _swiglu(f"{p}.mlp", d, model.intermediate_size)
            continue
        yield f"{p}.mlp.gate", (model.num_routed_experts, d)
        yield from _swiglu(f"{p}.mlp.shared_experts", d, model.num_shared_experts * e)
        for expert in range(model.num_routed_experts):
            yield from _swiglu(f"{p}.mlp.experts.{expert}", d, e)


def _swiglu(name: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate_proj", (width, hidden)
    yield f"{name}.up_proj", (width, hidden)
    yield f"{name}.down_proj", (hidden, width)
