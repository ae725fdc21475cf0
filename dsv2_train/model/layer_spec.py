"""DeepSeek-V2's layers as megatron-core specs (read against 0.16.1)."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.model.implementation import Choice
from dsv2_train.model.modules.attention import LatentAttention, NoCoreAttention
from dsv2_train.model.modules.mlp import GatedMLP, SharedExperts
from dsv2_train.model.modules.norms import LatentNorm, RMSNorm
from dsv2_train.model.moe.experts import GroupedExperts
from dsv2_train.model.moe.layer import MixtureOfExperts
from dsv2_train.model.moe.router import DeviceLimitedRouter
from dsv2_train.ops.attention import BACKENDS


def block_spec(
    model: ModelConfig,
    choices: dict[str, Choice],
    layers: range,
    groups: ProcessGroupCollection,
) -> TransformerBlockSubmodules:
    """The layers of one chunk and the final norm.

    Args:
        model: dense layers come first, then mixtures of experts.
        choices: which code serves each op.
        layers: the chunk's layers by their index in the whole model.
        groups: the rank's process groups; megatron-core hands them only to classes it knows.
    """
    classes = _Classes(choices)
    dense = _dense_mlp(model, classes, groups)
    mixture = _mixture(classes, choices, groups)
    specs = [
        _layer(model, classes, dense if index < model.num_dense_layers else mixture)
        for index in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=classes.norm)


class _Classes:
    """The class for each kind of module, from the choices."""

    def __init__(self, choices: dict[str, Choice]) -> None:
        self.column: Any = ColumnParallelLinear
        self.row: Any = RowParallelLinear
        self.norm: Any = RMSNorm
        self.attention: Any = LatentAttention
        self.core_attention: Any = NoCoreAttention
        attention = choices["attention"].implementation
        self.attention_params = {
            "rope": choices["rope"].implementation,
            "backend": attention if attention in BACKENDS else None,
        }
        self.activation = choices["activation"].implementation
        if not any(choice.implementation == "transformer_engine" for choice in choices.values()):
            return
        # Optional package: importable only where transformer-engine is installed.
        from megatron.core.extensions import transformer_engine as te  # noqa: PLC0415

        if choices["linear"].implementation == "transformer_engine":
            self.column, self.row = te.TEColumnParallelLinear, te.TERowParallelLinear
        if choices["norm"].implementation == "transformer_engine":
            self.norm = te.TENorm
        if attention == "transformer_engine":
            self.attention, self.core_attention = MLASelfAttention, te.TEDotProductAttention
            self.attention_params = {}


def _layer(model: ModelConfig, classes: _Classes, mlp: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=classes.norm,
            self_attention=_attention(model, classes),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=classes.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention(model: ModelConfig, classes: _Classes) -> ModuleSpec:
    return ModuleSpec(
        module=classes.attention,
        params={"attn_mask_type": AttnMaskType.causal, **classes.attention_params},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=classes.column,
            linear_q_down_proj=classes.column,
            linear_q_up_proj=classes.column,
            linear_kv_down_proj=classes.column,
            linear_kv_up_proj=classes.column,
            core_attention=classes.core_attention,
            linear_proj=classes.row,
            q_layernorm=_latent_norm(model.q_latent_scale),
            kv_layernorm=_latent_norm(model.kv_latent_scale),
        ),
    )


def _latent_norm(scale: float) -> ModuleSpec:
    return ModuleSpec(module=LatentNorm, params={"scale": scale})


def _mlp_submodules(classes: _Classes) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=classes.column, linear_fc2=classes.row)


def _dense_mlp(model: ModelConfig, classes: _Classes, groups: ProcessGroupCollection) -> ModuleSpec:
    return ModuleSpec(
        module=GatedMLP,
        params={
            "ffn_hidden_size": model.intermediate_size,
            "tp_group": groups.tp,
            "activation": classes.activation,
        },
        submodules=_mlp_submodules(classes),
    )


def _mixture(
    classes: _Classes, choices: dict[str, Choice], groups: ProcessGroupCollection
) -> ModuleSpec:
    activation = {"activation": classes.activation}
    routed = {"implementation": choices["experts"].implementation, **activation}
    return ModuleSpec(
        module=MixtureOfExperts,
        params={
            "pg_collection": groups,
            "dispatcher": choices["dispatcher"].implementation,
            "permute": choices["permute"].implementation,
        },
        submodules=MoESubmodules(
            router=partial(DeviceLimitedRouter, implementation=choices["routing"].implementation),
            experts=ModuleSpec(module=GroupedExperts, params=routed),
            shared_experts=ModuleSpec(
                module=SharedExperts, params=activation, submodules=_mlp_submodules(classes)
            ),
        ),
    )
