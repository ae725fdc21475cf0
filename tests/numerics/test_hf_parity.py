"""Our logits equal those of transformers' DeepseekV2ForCausalLM on the same weights."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.modules import attention
from dsv2_train.model.moe import router, routing
from dsv2_train.ops.latent_heads import latent_heads
from tests.helpers.hf import write_folder
from tests.helpers.model import build_on_cpu, logits_of, roughen
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World

Break = Callable[[torch.nn.Module], AbstractContextManager[None]]

# fp32 accumulates about sqrt(width) * depth * 6e-8 of relative error; observed: 5e-7 to 5e-6.
TOLERANCE = 1e-5

YARN = (
    "model.yarn.factor=8.0",
    "model.yarn.original_max_position=16",
    "model.rope_theta=100.0",
)
SHAPES: dict[str, tuple[str, ...]] = {
    "eight groups, M 3": (),
    "four groups, M 2, lambda 16": (
        "model.num_device_groups=4",
        "model.num_limited_devices=2",
        "model.routed_scaling_factor=16.0",
    ),
    "M 1": (
        "model.num_device_groups=4",
        "model.num_limited_devices=1",
        "model.num_experts_per_tok=3",
    ),
    "one group, no query latent": (
        "model.num_device_groups=1",
        "model.num_limited_devices=1",
        "model.q_lora_rank=null",
        "model.routed_scaling_factor=1.0",
    ),
    "a large eps, which the latent norms do not take": ("model.rms_norm_eps=1e-2",),
    "two dense layers": ("model.num_dense_layers=2",),
    "yarn": YARN,
    "yarn, two mscales, no query latent": (
        *YARN,
        "model.yarn.mscale=1.0",
        "model.q_lora_rank=null",
    ),
}


def _tokens(config: RunConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (2, config.recipe.sequence_length)
    return torch.randint(config.model.vocab_size, shape, generator=generator)


def _difference(rank: int, config: RunConfig, broken: Break | None = None) -> float:
    """Largest logit difference over the logits' scale; `broken` is entered for our forward."""
    # Seconds to import, and only the ranks of this test need it.
    from transformers import DeepseekV2ForCausalLM  # noqa: PLC0415

    model, _ = build_on_cpu(config)
    roughen(model)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, config.model, Path(folder))
        oracle = DeepseekV2ForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
    tokens = _tokens(config)
    with torch.no_grad():
        expected = oracle(tokens).logits
    with broken(model) if broken else nullcontext():
        ours = logits_of(model.eval(), tokens)
    process_groups.destroy()
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(world: World, shape: str) -> None:
    config = tiny_config(*SHAPES[shape])
    [difference] = world.run(_difference, 1, config)
    assert difference < TOLERANCE


@contextmanager
def rotated_halves(model: torch.nn.Module) -> Iterator[None]:
    """Pair channel j with j + half instead of 2j with 2j + 1."""
    nope, rope = model.config.qk_head_dim, model.config.qk_pos_emb_head_dim
    order = torch.arange(rope).view(-1, 2).t().flatten()

    def halves(
        q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, *rotation: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        # Channels j and j + half stand beside each other before the rotation: other pairs turn.
        q = torch.cat([q[..., :nope], q[..., nope:][..., order.argsort()]], dim=-1)
        return latent_heads(q, kv, k_rope[..., order.argsort()], *rotation)

    with mock.patch.object(attention, "latent_heads", halves):
        yield


@contextmanager
def lambda_one(model: torch.nn.Module) -> Iterator[None]:
    """Leave out the routed scaling factor."""

    def unscaled(affinities: torch.Tensor, experts: torch.Tensor, _: float) -> torch.Tensor:
        return routing.gate_values(affinities, experts, 1.0)

    with mock.patch.object(router, "gate_values", unscaled):
        yield


@contextmanager
def renormalised(model: torch.nn.Module) -> Iterator[None]:
    """Make the gates of a token sum to lambda."""

    def normed(affinities: torch.Tensor, experts: torch.Tensor, scale: float) -> torch.Tensor:
        gates = routing.gate_values(affinities, experts, 1.0)
        return scale * gates / gates.sum(dim=-1, keepdim=True)

    with mock.patch.object(router, "gate_values", normed):
        yield


@contextmanager
def top_two_sum(model: torch.nn.Module) -> Iterator[None]:
    """Score groups as DeepSeek-V3 and megatron-core do."""

    def by_sum(affinities: torch.Tensor, groups: int, limit: int, top_k: int) -> torch.Tensor:
        grouped = affinities.view(affinities.size(0), groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(limit, dim=-1).indices
        keep = torch.zeros_like(grouped, dtype=torch.bool)
        keep[torch.arange(len(best)).unsqueeze(1), best] = True
        return affinities.masked_fill(~keep.flatten(1), -1.0).topk(top_k, dim=-1).indices

    with mock.patch.object(router, "select_experts", by_sum):
        yield


@contextmanager
def no_temperature(model: torch.nn.Module) -> Iterator[None]:
    """Drop YaRN's m^2 from the softmax scale."""
    attentions = [module for module in model.modules() if hasattr(module, "softmax_scale")]
    before = [module.softmax_scale for module in attentions]
    for module in attentions:
        module.softmax_scale = model.config.qk_head_dim + model.config.qk_pos_emb_head_dim
        module.softmax_scale **= -0.5
    yield
    for module, scale in zip(attentions, before, strict=True):
        module.softmax_scale = scale


@contextmanager
def large_eps(model: torch.nn.Module) -> Iterator[None]:
    """RMSNorm eps of 1e-5, megatron-core's default."""
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    for module in norms:
        module.eps = 1e-5
    yield
    for module in norms:
        module.eps = 1e-6


@contextmanager
def tied_embeddings(model: torch.nn.Module) -> Iterator[None]:
    """Use the embedding as output head."""
    head = model.output_layer.weight.detach().clone()
    model.output_layer.weight.data.copy_(model.embedding.word_embeddings.weight)
    yield
    model.output_layer.weight.data.copy_(head)


CONTROLS = {
    "rope layout": (rotated_halves, ()),
    "lambda": (lambda_one, ()),
    "renormalised gates": (renormalised, ()),
    "top-2 group score": (top_two_sum, ()),
    "no m^2": (no_temperature, YARN),
    "eps 1e-5": (large_eps, ()),
    "tied embeddings": (tied_embeddings, ()),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_controls_break_parity(world: World, control: str) -> None:
    broken, shape = CONTROLS[control]
    [difference] = world.run(_difference, 1, tiny_config(*shape), broken)
    assert difference > 2 * TOLERANCE
