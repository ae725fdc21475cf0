"""Layers of DeepSeek-V2's shape on one rank: ours with torch and with kernels, transformers'.

20 experts, those of one of 8 expert ranks; six serve a token, as in the whole model. Ours adds
the gradients of weights to fp32 buffers, as training does; transformers leaves them in bf16.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn
from transformers import DeepseekV2ForCausalLM

from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS
from dsv2_train.model.build import build_model
from dsv2_train.model.gpt import DeepSeekV2Model
from dsv2_train.model.implementation import choose
from dsv2_train.model.moe.statistics import LayerStatistics
from dsv2_train.ops.kernels import why_no_kernels
from dsv2_train.optim.build import wrap
from tests.helpers.hf import write_folder

Kind = Literal["moe", "transformer"]
KINDS: tuple[Kind, ...] = ("moe", "transformer")
OURS = "ours"

_LAYER = {
    "experiment": "quickstart",
    "parallel": "single",
    "model": "dsv2_236b",
    "model.num_layers": 1,
    "model.num_dense_layers": 0,
    "model.vocab_size": 1024,
    "model.num_routed_experts": 20,
    "model.num_device_groups": 4,
    "recipe.expert_balance_alpha": 0.0,
    "recipe.device_balance_alpha": 0.0,
    "recipe.communication_balance_alpha": 0.0,
    "recipe.capacity_factor": "null",
    "recipe.precision": "bf16",
}
# For machines without a GPU: tries this file, and times nothing of interest.
TINY: dict[str, object] = {
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.q_lora_rank": 32,
    "model.kv_lora_rank": 16,
    "model.qk_nope_head_dim": 16,
    "model.qk_rope_head_dim": 8,
    "model.v_head_dim": 16,
    "model.intermediate_size": 64,
    "model.moe_intermediate_size": 32,
}


@dataclass(frozen=True)
class Layer:
    """What is timed: forward and backward of one batch, and what the forward pass gave.

    Attributes:
        step: [B, S, h] hidden states and the gradient of the output -> output [B, S, h].
        busiest: tokens of the busiest expert over the mean, of all steps so far.
    """

    step: Callable[[Tensor, Tensor], Tensor]
    busiest: Callable[[], float] | None = None


def layer_config(tokens: int, length: int, overrides: dict[str, object]) -> RunConfig:
    """A model of one layer; `tokens` of a batch in sequences of `length`."""
    sizes = {
        "recipe.sequence_length": length,
        "recipe.micro_batch_size": tokens // length,
        "recipe.global_batch_size": tokens // length,
    }
    words = [f"{key}={value}" for key, value in (_LAYER | sizes | overrides).items()]
    return resolve(words, need_data=False)


def batch(config: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of the output: [B, S, h] bf16, random."""
    generator = torch.Generator(device).manual_seed(config.run.seed)
    recipe = config.recipe
    shape = (2, recipe.micro_batch_size, recipe.sequence_length, config.model.hidden_size)
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    return drawn[0], drawn[1]


def contenders(
    kind: Kind, config: RunConfig, groups: ProcessGroupCollection, device: torch.device
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers with the same weights by name, ours first; why others are not there."""
    torch.compiler.reset()
    missing = {}
    plain = _with(config, dict.fromkeys(KERNEL_SETTINGS, "auto"))
    model, ours = _ours(kind, plain, groups, device)
    layers = {OURS: ours}
    why = why_no_kernels(device)
    if why:
        missing[f"{OURS}, our kernels"] = why
    else:
        kernels = _with(config, dict.fromkeys(KERNEL_SETTINGS, "kernel"))
        layers[f"{OURS}, our kernels"] = _ours(kind, kernels, groups, device)[1]
    recomputing = _with(plain, {"recompute": ("moe", "mla_up_projection")})
    layers[f"{OURS}, recomputing"] = _ours(kind, recomputing, groups, device)[1]
    peer = _transformers(model, config, device)
    layers["transformers"] = _theirs(kind, peer, compiled=False)
    layers["transformers, compiled"] = _theirs(kind, peer, compiled=True)
    return layers, missing


def _with(config: RunConfig, changes: dict[str, object]) -> RunConfig:
    parallel = config.parallel.model_copy(update=changes)
    return config.model_copy(update={"parallel": parallel})


def _ours(
    kind: Kind, config: RunConfig, groups: ProcessGroupCollection, device: torch.device
) -> tuple[DeepSeekV2Model, Layer]:
    """One layer inside the data-parallel wrapper that gives its weights fp32 gradients."""
    model = build_model(config, groups, choose(config.parallel, device), device)
    chunk = wrap(model, config.parallel, config.recipe.precision, groups)
    layer = model.decoder.layers[0]
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device))
    module: nn.Module = layer.mlp if kind == "moe" else layer

    def step(hidden: Tensor, gradient: Tensor) -> Tensor:
        x = hidden.transpose(0, 1).contiguous().requires_grad_()
        with chunk.no_sync():
            output = (module(x) if kind == "moe" else module(x, attention_mask=None))[0]
            output.backward(gradient.transpose(0, 1))
        return output.detach().transpose(0, 1)

    def busiest() -> float:
        sizes = config.model.num_routed_experts, config.model.num_device_groups
        counts = LayerStatistics.unflatten(layer.mlp.statistics, *sizes).expert_counts
        return float(counts.max() / counts.mean())

    return model, Layer(step, busiest)


def _transformers(
    model: DeepSeekV2Model, config: RunConfig, device: torch.device
) -> DeepseekV2ForCausalLM:
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        write_folder(model, config.model, Path(folder))
        peer = DeepseekV2ForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    return peer.train()


def _theirs(kind: Kind, peer: DeepseekV2ForCausalLM, *, compiled: bool) -> Layer:
    layer = peer.model.layers[0]
    module = layer.mlp if kind == "moe" else layer
    called = torch.compile(module) if compiled else module

    def step(hidden: Tensor, gradient: Tensor) -> Tensor:
        x = hidden.detach().requires_grad_()
        more = {}
        if kind == "transformer":
            positions = torch.arange(x.size(1), device=x.device).unsqueeze(0)
            more["position_embeddings"] = peer.model.rotary_emb(x, position_ids=positions)
        output = called(x, **more)
        output.backward(gradient)
        module.zero_grad(set_to_none=True)
        detached: Tensor = output.detach()
        return detached

    return Layer(step)
