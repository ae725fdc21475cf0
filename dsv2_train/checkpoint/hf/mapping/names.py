"""Our tensors under their Hugging Face names: one table (names and shapes of the released model).

megatron-core stacks what Hugging Face keeps apart: the gate and up projections of an MLP, and the
experts of a layer. Nothing is permuted: row layouts of the MLA projections agree.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_GLOBAL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}

_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}

_GATE_UP = {
    "mlp.linear_fc1.weight": "mlp",
    "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts",
}


@dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor as a flat range of one of ours.

    Attributes:
        name: Hugging Face name.
        shape: its shape.
        offset: first element, in our flattened global tensor.
    """

    name: str
    shape: tuple[int, ...]
    offset: int


def hf_tensors(name: str, shape: tuple[int, ...]) -> Iterator[HfTensor]:
    """Cut one of our global tensors into the Hugging Face tensors it holds, in order of offset.

    Args:
        name: global name, e.g. `decoder.layers.3.mlp.experts.fc1`.
        shape: shape of the whole tensor.

    Raises:
        KeyError: for a name that the table does not know.
    """
    if name in _GLOBAL:
        yield HfTensor(_GLOBAL[name], shape, 0)
        return
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    layer, rest = f"model.layers.{match[1]}", match[2]
    if rest in _GATE_UP:
        yield from _gate_and_up(f"{layer}.{_GATE_UP[rest]}", shape, 0)
    elif rest == "mlp.experts.fc1":
        for expert in range(shape[0]):
            start = expert * shape[1] * shape[2]
            yield from _gate_and_up(f"{layer}.mlp.experts.{expert}", shape[1:], start)
    elif rest == "mlp.experts.fc2":
        for expert in range(shape[0]):
            target = f"{layer}.mlp.experts.{expert}.down_proj.weight"
            yield HfTensor(target, shape[1:], expert * shape[1] * shape[2])
    else:
        yield HfTensor(f"{layer}.{_IN_LAYER[rest]}", shape, 0)


def _gate_and_up(prefix: str, shape: tuple[int, ...], start: int) -> Iterator[HfTensor]:
    half = (shape[0] // 2, *shape[1:])
    numel = half[0] * half[1]
    yield HfTensor(f"{prefix}.gate_proj.weight", half, start)
    yield HfTensor(f"{prefix}.up_proj.weight", half, start + numel)
