"""What is known of a bad step: gathered from all ranks, written into the run folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.data.sampler import SkipList, joined, samples_at, step_places
from dsv2_train.model.moe.layer import MixtureOfExperts
from dsv2_train.model.moe.statistics import LayerStatistics
from dsv2_train.monitor.rows import encode_number
from dsv2_train.recipe.clock import Point
from dsv2_train.train.run import Run
from dsv2_train.train.telemetry.routing_metrics import gather_step, routing_row
from dsv2_train.train.telemetry.telemetry import StepResult

FOLDER = "incidents"
_MOST_NAMES = 3


@dataclass(frozen=True)
class Microbatch:
    """A microbatch of the step.

    Attributes:
        rank: which computed its loss.
        sample_ids: of its samples.
        loss: mean over its tokens.
    """

    rank: int
    sample_ids: list[int]
    loss: float


@dataclass(frozen=True)
class Incident:
    """What all ranks know of a bad step.

    Attributes:
        step: number of the step, from 1.
        consumed_samples: the clock before it.
        lr: learning rate of the update.
        loss: mean over its tokens.
        grad_norm: global norm before clipping.
        microbatches: all of them, by rank and in order.
        bad_tokens: layer, rank, and tokens of the rank whose router logits are not finite there.
        gradients: norm and number of elements that are not finite, by tensor.
        routing: what a row has of `moe/`, by layer.
    """

    step: int
    consumed_samples: int
    lr: float
    loss: float
    grad_norm: float
    microbatches: list[Microbatch]
    bad_tokens: list[tuple[int, int, int]]
    gradients: dict[str, tuple[float, int]]
    routing: dict[str, float]

    @property
    def bad_samples(self) -> SkipList:
        """Samples of microbatches whose loss is not finite."""
        bad = [each for each in self.microbatches if not math.isfinite(each.loss)]
        return joined((), [(one, one + 1) for each in bad for one in each.sample_ids])

    @property
    def where(self) -> str:
        """Where the first number is that is not finite; empty if all are."""
        if self.bad_tokens:
            layer, rank, count = self.bad_tokens[0]
            return f"layer {layer} on rank {rank}: {count} tokens with router logits not finite"
        if self.bad_samples:
            rank = next(one.rank for one in self.microbatches if not math.isfinite(one.loss))
            return f"the loss of samples {as_text(self.bad_samples)}, on rank {rank} first"
        names = [name for name, (_, num_bad) in self.gradients.items() if num_bad]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return f"gradients of {', '.join(names[:_MOST_NAMES])}{more}" if names else ""

    def to_record(self) -> dict[str, Any]:
        """Plain values for strict JSON."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "lr": self.lr,
            "loss": encode_number(self.loss),
            "grad_norm": encode_number(self.grad_norm),
            "where": self.where,
            "microbatches": [
                {**vars(each), "loss": encode_number(each.loss)} for each in self.microbatches
            ],
            "router_logits_not_finite": [
                {"layer": layer, "rank": rank, "num_tokens": count}
                for layer, rank, count in self.bad_tokens
            ],
            "gradients": {
                name: {"norm": encode_number(norm), "num_not_finite": num_bad}
                for name, (norm, num_bad) in self.gradients.items()
            },
            "routing": {key: encode_number(value) for key, value in self.routing.items()},
        }


def gather(run: Run, point: Point, result: StepResult) -> Incident:
    """Ask all ranks what they know of a step that has no update yet.

    Note:
        Collective over all ranks; reads some numbers a tensor and layer from the device.
    """
    mixtures = {
        layer: one for chunk in run.chunks for layer, one in chunk.module.mixtures().items()
    }
    model = run.config.model
    routed = gather_step(mixtures, model, run.world)
    ours = {
        "microbatches": _microbatches(run, point, result),
        "bad_tokens": [
            (layer, run.env.rank, count)
            for layer, one in mixtures.items()
            if (count := _num_bad_tokens(one, model))
        ],
        "gradients": run.optimizer.gradient_numbers(),
    }
    everyone: list[Any] = [None] * run.config.parallel.world_size
    dist.all_gather_object(everyone, ours, group=run.hosts)
    return Incident(
        step=run.clock.step + 1,
        consumed_samples=run.clock.consumed_samples,
        lr=point.lr,
        loss=result.loss,
        grad_norm=result.grad_norm,
        microbatches=[each for rank in everyone for each in rank["microbatches"]],
        bad_tokens=sorted(each for rank in everyone for each in rank["bad_tokens"]),
        gradients=_added_up([rank["gradients"] for rank in everyone]),
        routing=routing_row(routed, model),
    )


def tell(run: Run, step: int, title: str, told: str, record: dict[str, Any]) -> None:
    """Write a record to a file of its own, and alert people; on the rank that does.

    Args:
        run: in whose folder the file is: `incidents/step_<8 digits>_<n>.json`.
        step: number of the step, from 1.
        title: of the alert.
        told: its text.
        record: plain values, all finite.
    """
    if run.monitor is None:
        return
    try:
        path = _write(run.config.run.folder / FOLDER, step, record)
        run.monitor.alert(title, f"{told}\nwritten down in {path}")
    except OSError as error:
        run.monitor.alert(title, f"{told}\nnot written down: {error}")


def as_text(samples: SkipList) -> str:
    """Ranges [first, end) of samples for people: `8, 12 to 15`."""
    return ", ".join(
        str(first) if end == first + 1 else f"{first} to {end - 1}" for first, end in samples
    )


def _num_bad_tokens(mixture: MixtureOfExperts, model: ModelConfig) -> int:
    counts = LayerStatistics.unflatten(
        mixture.statistics, model.num_routed_experts, model.num_device_groups
    )
    return int(counts.num_bad_tokens.item())


def _microbatches(run: Run, point: Point, result: StepResult) -> list[Microbatch]:
    places = step_places(
        run.clock.consumed_samples,
        num_microbatches=run.num_microbatches(point.global_batch_size),
        micro_batch_size=run.config.recipe.micro_batch_size,
        dp_rank=run.groups.dp.rank(),
        dp_size=run.groups.dp.size(),
    )
    ids = samples_at(places, run.train_split.skip_list).tolist()
    losses = [loss.item() for loss in result.microbatch_losses]
    return [
        Microbatch(run.env.rank, ids[index], loss) for index, loss in enumerate(losses)
    ]  # no losses but on the last stage


def _added_up(of_ranks: list[dict[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Squares and counts of the parts of tensors -> norms and counts of tensors, by name."""
    whole: dict[str, tuple[float, int]] = {}
    for rank in of_ranks:
        for name, (square, num_bad) in rank.items():
            known_square, known_bad = whole.get(name, (0.0, 0))
            whole[name] = known_square + square, known_bad + num_bad
    return {name: (math.sqrt(square), num_bad) for name, (square, num_bad) in sorted(whole.items())}


def _write(folder: Path, step: int, record: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"step_{step:08d}_{number}.json").exists():
        number += 1
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    temporary.rename(path)
    return path
