"""One layer of DeepSeek-V2's shape on one rank, forward and backward: its mixture, or all of it.

20 experts, those of one of 8 expert ranks; six serve a token, as in the whole model. Ours adds
the gradients of weights to fp32 buffers, as training does; transformers leaves them in bf16.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn
from transformers import DeepseekV2ForCausalLM

from benchmarks.kernel_time import KernelTime, kernel_time
from benchmarks.timing import Ratio, Times, alternate, ratio
from dsv2_kernels.testing import machine
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS
from dsv2_train.model.build import build_model
from dsv2_train.model.gpt import DeepSeekV2Model
from dsv2_train.model.implementation import choose
from dsv2_train.model.moe.statistics import LayerStatistics
from dsv2_train.ops.kernels import why_no_kernels
from dsv2_train.optim.build import wrap
from dsv2_train.recipe.flops import forward_flops
from tests.helpers.hf import write_folder

ROOT = Path(__file__).parents[1]
Kind = Literal["moe", "transformer"]
KINDS: tuple[Kind, ...] = ("moe", "transformer")
TOKENS = (4096, 8192, 16384, 32768)
LENGTH = 4096
OURS = "ours"
# What of the model's operations a layer of each kind does.
_MIXTURE = ("router", "shared_experts", "routed_experts")
_PARTS: dict[Kind, tuple[str, ...]] = {
    "moe": _MIXTURE,
    "transformer": ("attention_projections", "attention_core", *_MIXTURE),
}

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


@dataclass(frozen=True)
class LayerRow:
    """A contender's figures.

    Attributes:
        seconds: of forward and backward.
        tflop_per_s: of the model's operations; recomputation counts as time alone.
        of_ours: its time over ours, run by run; ours is the first row.
        work: where its time goes.
        busiest: tokens of the busiest expert over the mean; None for a peer.
    """

    name: str
    seconds: Times
    tflop_per_s: float
    of_ours: Ratio
    work: KernelTime
    busiest: float | None


def compare_all(groups: ProcessGroupCollection, repeats: int) -> Iterator[dict[str, Any]]:
    """Both kinds of layer on this machine's GPU; without one, tiny ones on the CPU.

    Returns:
        After each comparison all so far, since a lent machine may be taken away: rows by kind and
        tokens, why contenders are missing, and where this was measured.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        torch.compiler.set_stance("force_eager")
    timer = machine.timer_of(device)
    found: dict[str, Any] = {
        "device": machine.describe(device, ROOT),
        "speeds": machine.measure_speeds(device, timer, seconds=2.0 if on_gpu else 0.0),
        "layers": {},
        "missing": {},
    }
    del timer  # its buffer is of 1 GiB
    for tokens in TOKENS if on_gpu else (64,):
        for kind in KINDS:
            length, overrides = (LENGTH, {}) if on_gpu else (32, TINY)
            config = layer_config(tokens, length, overrides)
            title = f"{kind} layer, {tokens} tokens"
            rows, missing = compare_layers(kind, config, groups, device, repeats)
            show(title, rows, missing)
            found["layers"][title], found["missing"][title] = rows, missing
            yield found


def show(title: str, rows: list[LayerRow], missing: dict[str, str]) -> None:
    """Print one comparison, and where the time of each contender goes."""
    print(f"\n{title}, forward and backward")
    print(f"{'':24}{'ms':>9}{'TFLOP/s':>9}{'of ours':>9}{'busiest':>9}  work")
    for row in rows:
        busiest = "" if row.busiest is None else f"{row.busiest:.2f}"
        work = ", ".join(f"{name} {share:.0%}" for name, share in row.work.shares.items())
        print(
            f"{row.name:24}{1000 * row.seconds.median:9.2f}{row.tflop_per_s:9.1f}"
            f"{row.of_ours.median:8.2f}x{busiest:>9}  {work}"
        )
    for name, why in missing.items():
        print(f"{name:24} not run: {why}")


def layer_config(tokens: int, length: int, overrides: dict[str, object]) -> RunConfig:
    """A model of one layer; `tokens` of a batch in sequences of `length`."""
    sizes = {
        "recipe.sequence_length": length,
        "recipe.micro_batch_size": tokens // length,
        "recipe.global_batch_size": tokens // length,
    }
    words = [f"{key}={value}" for key, value in (_LAYER | sizes | overrides).items()]
    return resolve(words, need_data=False)


def compare_layers(
    kind: Kind,
    config: RunConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    repeats: int,
) -> tuple[list[LayerRow], dict[str, str]]:
    """Time all contenders on one batch, in turns.

    Returns:
        A row each, ours first; and, by name, why others could not run.
    """
    layers, missing = contenders(kind, config, groups, device)
    hidden, gradient = batch(config, device)
    calls = {}
    for name, layer in layers.items():
        try:
            layer.step(hidden, gradient)
            calls[name] = _call(layer, hidden, gradient)
        except Exception as error:
            if name == OURS:
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = alternate(list(calls.values()), repeats, now=_now)
    by_name = dict(zip(calls, times, strict=True))
    flops = layer_flops(kind, config)
    rows = [
        LayerRow(
            name=name,
            seconds=seconds,
            tflop_per_s=flops / seconds.median / 1e12,
            of_ours=ratio(seconds, by_name[OURS]),
            work=kernel_time(calls[name], device),
            busiest=busiest() if (busiest := layers[name].busiest) else None,
        )
        for name, seconds in by_name.items()
    ]
    return rows, missing


def layer_flops(kind: Kind, config: RunConfig) -> int:
    """Operations of forward and backward over a batch; attention is causal."""
    recipe = config.recipe
    parts = forward_flops(config.model, recipe.sequence_length, "causal")
    tokens = recipe.sequence_length * recipe.micro_batch_size
    return int(3 * tokens * sum(getattr(parts, part) for part in _PARTS[kind]))


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


def _call(layer: Layer, hidden: Tensor, gradient: Tensor) -> Callable[[], object]:
    return lambda: layer.step(hidden, gradient)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
