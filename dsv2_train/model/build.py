"""One of the chunks of the model that a rank holds."""

from functools import partial
from math import isclose
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import nn

from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.distributed.sharding import GlobalTensor, tag
from dsv2_train.model.gpt import DeepSeekV2Model, OutputHead
from dsv2_train.model.implementation import Choice
from dsv2_train.model.initialize import initialize
from dsv2_train.model.layer_spec import block_spec
from dsv2_train.model.modules.linears import replace_linears, take_weight_gradients
from dsv2_train.model.transformer_config import ChunkLayout, build_transformer_config
from dsv2_train.recipe.parameters import chunk_layer_ranges
from dsv2_train.recipe.yarn import frequency_ratios, rotary_scale, softmax_scale


def build_model(
    config: RunConfig,
    groups: ProcessGroupCollection,
    choices: dict[str, Choice],
    device: torch.device,
    chunk: int = 0,
) -> DeepSeekV2Model:
    """Build, tag and initialize a chunk of this rank's pipeline stage.

    Args:
        config: the run.
        groups: the rank's process groups; its place in them decides which layers and experts.
        choices: which code serves each op.
        device: where the weights live; on `meta` nothing is allocated or initialized.
        chunk: which of the stage's.

    Returns:
        The chunk, with every parameter tagged by its `GlobalTensor`. No communication.
    """
    place, stage = config.parallel.placement, groups.pp.rank()
    ranges = chunk_layer_ranges(config.parallel.split(config.model.num_layers))
    layers = ranges[place.virtual_stage(stage, chunk)]
    transformer = build_transformer_config(config.model, config.parallel, config.recipe)
    transformer.pipeline_model_parallel_layout = ChunkLayout(layers)
    transformer.use_cpu_initialization = device.type != "cuda"
    with torch.device(device):
        model = DeepSeekV2Model(
            config=transformer,
            transformer_layer_spec=block_spec(config.model, choices, layers, groups),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.recipe.sequence_length,
            pre_process=place.is_first(stage, chunk),
            post_process=place.is_last(stage, chunk),
            position_embedding_type="none",
            pg_collection=groups,
        )
    replace_linears(model)
    if choices["linear"].implementation == "transformer_engine":
        take_weight_gradients(model)
    if model.post_process:
        model.output_layer = OutputHead(model.output_layer.weight)
    tag_parameters(model, layers.start, groups.ep.rank(), groups.ep.size())
    _check_softmax_scale(model, config.model)
    if device.type != "meta":
        _check_rotation(model, config.model)
        initialize(model, config.run.seed, config.model.init_std)
    return model


def tag_parameters(model: nn.Module, first_layer: int, ep_rank: int, ep_size: int) -> None:
    """Give every parameter its place in the whole model.

    The global name is megatron-core's module path with the layer's index in the whole model;
    stacked experts are the ep_rank-th part of the stack of all experts.
    """
    for name, parameter in model.named_parameters():
        shape: tuple[int, ...] = tuple(parameter.shape)
        offset = 0
        if parameter.dim() == 3:
            offset = ep_rank * parameter.numel()
            shape = (shape[0] * ep_size, *shape[1:])
        tag(parameter, GlobalTensor(_global_name(name, first_layer), shape, offset))


def _global_name(local_name: str, first_layer: int) -> str:
    parts: list[Any] = local_name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def _check_softmax_scale(model: nn.Module, config: ModelConfig) -> None:
    """Hold megatron-core's softmax scale against the paper's, whatever its YaRN defaults become.

    Raises:
        RuntimeError: if they differ; 0.16.1 applies the YaRN temperature even to plain RoPE.
    """
    expected = softmax_scale(config)
    for name, module in model.named_modules():
        if isinstance(module, MLASelfAttention) and not isclose(module.softmax_scale, expected):
            found = module.softmax_scale
            raise RuntimeError(f"{name}: softmax scale {found}, must be {expected}")


def _check_rotation(model: nn.Module, config: ModelConfig) -> None:
    """Hold megatron-core's frequencies and its factor on cos and sin against the paper's.

    Raises:
        RuntimeError: if they differ by more than its fp32 arithmetic explains.
    """
    width = config.qk_rope_head_dim
    plain = [config.rope_theta ** (-2 * j / width) for j in range(width // 2)]
    factor, ratios = 1.0, (1.0,) * len(plain)
    if config.yarn is not None:
        factor = rotary_scale(config.yarn)
        ratios = frequency_ratios(config.yarn, config.rope_theta, width)
    expected = [factor, *(theta * ratio for theta, ratio in zip(plain, ratios, strict=True))]
    for name, module in model.named_modules():
        if not isinstance(module, MLASelfAttention):
            continue
        angles, found_factor = module.rotary_pos_emb(2)
        found = [found_factor, *angles[1, 0, 0, : width // 2].tolist()]
        # fp32 of theta's power and of the ramp: a few units in the last place of 6e-8.
        if not all(map(partial(isclose, rel_tol=1e-5), found, expected)):
            raise RuntimeError(f"{name}: rotates by {found} a position, must be {expected}")
