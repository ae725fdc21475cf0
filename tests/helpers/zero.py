"""Worlds that train the toy with ZeRO-1, and the unsharded AdamW they are compared with."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.optim.adam import choose_adam
from dsv2_train.optim.build import build_optimizer, wrap
from tests.helpers.toy import EXPERTS, NUM_LAYERS, SHAPES, Toy, whole_value

CONFIG = OptimConfig(lr=0.01, clip_grad_norm=2.0)
LEARNING_RATES = (0.01, 0.02, 0.005)
NUM_MICROBATCHES = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One world: world size, pipeline stages, expert-parallel ranks, and how it communicates."""

    layout: tuple[int, int, int]
    precision: str = "fp32"
    overlap: bool = True
    bucket_size: int | None = 300
    clip_grad_norm: float = CONFIG.clip_grad_norm
    adam: str = "torch"
    sabotage: str = ""

    @property
    def parallel(self) -> ParallelConfig:
        world_size, pp, ep = self.layout
        return ParallelConfig(
            world_size=world_size,
            pp=pp,
            ep=ep,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap,
            bucket_size=self.bucket_size,
        )

    @property
    def config(self) -> OptimConfig:
        return CONFIG.model_copy(update={"clip_grad_norm": self.clip_grad_norm})


class Rank:
    """What one rank of a case builds and does."""

    def __init__(self, rank: int, case: Case) -> None:
        self.case = case
        self.groups = process_groups.build(case.parallel, timeout_s=60)
        self.stage = self.groups.pp.rank()
        count = NUM_LAYERS // case.parallel.pp
        layers = range(self.stage * count, (self.stage + 1) * count)
        ep = self.groups.ep
        toy = Toy(layers, ep.rank(), ep.size(), DTYPES[case.precision])
        self.chunk = wrap(toy, case.parallel, case.precision, self.groups)
        with warnings.catch_warnings():
            if case.adam == "deepspeed_cpu":
                warnings.simplefilter("ignore")  # about its accelerator, when it is imported
            choice = choose_adam(case.adam, torch.device("cpu"))
            self.optimizer = build_optimizer([self.chunk], case.config, choice, self.groups)

    def run(self, steps: range) -> list[float]:
        return [self._step(step) for step in steps]

    def _step(self, step: int) -> float:
        chunk = self.chunk
        self.optimizer.zero_grad()
        for microbatch in range(NUM_MICROBATCHES):
            last = microbatch == NUM_MICROBATCHES - 1
            with nullcontext() if last else chunk.no_sync():
                chunk(dict(self._gradients(step, microbatch))).backward()
        if self.case.sabotage == "expert scale":
            for expert_buffer in chunk.expert_parallel_buffers:
                expert_buffer.grad_data.mul_(2)
        chunk.finish_grad_sync()
        if self.case.sabotage == "missing bucket":
            chunk.bucket_groups[0].buckets[0].grad_data.zero_()
        norm = self.optimizer.measure()[0]
        self.optimizer.update(LEARNING_RATES[step], norm)
        return norm.item()

    def _gradients(self, step: int, microbatch: int) -> Iterator[tuple[str, Tensor]]:
        """Dense: this rank's own. Experts: what the tokens of the whole EP group ask of ours."""
        ep_rank, ep_size = self.groups.ep.rank(), self.groups.ep.size()
        dp_rank = self.groups.dp.rank()
        first = dp_rank // ep_size * ep_size
        for name in SHAPES:
            sources = range(first, first + ep_size) if name in EXPERTS else [dp_rank]
            total = sum(whole_value(name, f"{s}/{step}/{microbatch}") for s in sources)
            assert isinstance(total, Tensor)
            local = total.chunk(ep_size)[ep_rank] if name in EXPERTS else total
            yield name, local.to(DTYPES[self.case.precision])

    def state(self) -> dict[str, Any]:
        return {
            "pieces": [(p.key, p.shape, p.offset, p.data.clone()) for p in self.optimizer.pieces()],
            "adam_step": self.optimizer.adam_step,
        }

    def weights(self) -> dict[tuple[str, int], Tensor]:
        self.chunk.start_param_sync(force_sync=True)
        found = {}
        for parameter in self.chunk.parameters():
            place = whole_of(parameter)
            found[place.name, place.offset] = parameter.detach().clone()
        return found


def train(rank: int, case: Case, steps: range) -> tuple[list[float], dict[str, Any], Any]:
    worker = Rank(rank, case)
    norms = worker.run(steps)
    return norms, worker.state(), worker.weights()


def resume(rank: int, case: Case, saved: list[Any], steps: range) -> Any:
    worker = Rank(rank, case)
    with torch.no_grad():
        for parameter in worker.chunk.parameters():
            parameter.fill_(torch.nan)  # whatever is not loaded or gathered shows
    mine = {(key, offset): data for key, _, offset, data in saved[rank]["pieces"]}
    for piece in worker.optimizer.pieces():
        piece.data.copy_(mine[piece.key, piece.offset])
    worker.optimizer.adam_step = saved[rank]["adam_step"]
    worker.optimizer.after_load()
    assert all(weight.isfinite().all() for weight in worker.chunk.parameters())
    return worker.run(steps), worker.state(), worker.weights()


def reference(case: Case, num_steps: int) -> tuple[list[float], dict[str, dict[str, Tensor]]]:
    """Unsharded AdamW (torch's plain loop) in fp64, on the mean gradient over dp ranks.

    Returns:
        Gradient norms before clipping, and whole tensors by kind (as keys of pieces) and name.
    """
    dp = case.parallel.dp
    weights = {name: whole_value(name, "weight").double() for name in SHAPES}
    moved = [name for name in SHAPES if "norm" not in name]
    still = [name for name in SHAPES if "norm" in name]
    adam = torch.optim.AdamW(
        [
            {"params": [weights[name] for name in moved], "weight_decay": CONFIG.weight_decay},
            {"params": [weights[name] for name in still], "weight_decay": 0.0},
        ],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
        foreach=False,
    )
    norms = []
    for step in range(num_steps):
        for name, weight in weights.items():
            parts = [
                whole_value(name, f"{rank}/{step}/{microbatch}").double()
                for rank in range(dp)
                for microbatch in range(NUM_MICROBATCHES)
            ]
            weight.grad = torch.stack(parts).sum(0) / dp
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        for gradient in gradients:
            gradient *= min(1.0, case.clip_grad_norm / norms[-1])
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATES[step]
        adam.step()
    state = {"weight": weights, "master": weights}
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = {name: adam.state[weight][kind] for name, weight in weights.items()}
    return norms, state


def assemble(results: list[Any], kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole tensors from all ranks' pieces, and how often each element was written."""
    values: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for _, state, _ in results:
        for key, shape, offset, data in state["pieces"]:
            if not key.startswith(f"{kind}/"):
                continue
            name = key.removeprefix(f"{kind}/")
            value = values.setdefault(name, torch.zeros(shape).flatten())
            count = counts.setdefault(name, torch.zeros(shape, dtype=torch.int64).flatten())
            value[offset : offset + data.numel()] = data.float()
            count[offset : offset + data.numel()] += 1
    return values, counts


def largest_error(results: list[Any], expected: dict[str, dict[str, Tensor]], kind: str) -> float:
    """Largest difference of any element, relative to the largest value of its tensor."""
    found, _ = assemble(results, kind)
    assert set(found) == set(expected[kind])
    errors = []
    for name, value in expected[kind].items():
        flat = value.flatten()
        errors.append(((found[name] - flat).abs().max() / flat.abs().max()).item())
    return max(errors)
