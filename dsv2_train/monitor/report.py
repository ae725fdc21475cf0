"""What a run says before its first step and after its last."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


class ImplementationRow(Protocol):
    """Which code serves an op, and why."""

    @property
    def op(self) -> str:
        """The op."""

    @property
    def implementation(self) -> str:
        """What computes it."""

    @property
    def reason(self) -> str:
        """Why that and nothing else."""


@dataclass(frozen=True)
class StartUp:
    """What the start-up table shows.

    Attributes:
        run_name: `run.name`.
        device: name of the device of a rank, or `cpu`.
        layout: sizes of the parallel axes by name, e.g. pp, ep, dp, edp.
        schedule: of the pipeline.
        layers_per_chunk: transformer layers of each chunk, in the order of the model.
        num_parameters: of the whole model.
        num_activated_parameters: that one token meets.
        parameters_per_rank: on a rank of each pipeline stage.
        sequence_length: tokens a sample.
        global_batch_size: samples a step, now.
        micro_batch_size: samples a microbatch.
        num_microbatches: microbatches of a step on each pipeline, now.
        first_step: steps already done.
        total_steps: steps of the run.
        total_tokens: tokens of the run.
        staging_bytes: host memory of a rank for asynchronous checkpoints; 0 if there are none.
        implementations: ops and what serves them.
    """

    run_name: str
    device: str
    layout: dict[str, int]
    schedule: str
    layers_per_chunk: tuple[int, ...]
    num_parameters: int
    num_activated_parameters: int
    parameters_per_rank: tuple[int, ...]
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int
    first_step: int
    total_steps: int
    total_tokens: int
    staging_bytes: int
    implementations: Sequence[ImplementationRow]


@dataclass(frozen=True)
class Closing:
    """What the closing message shows; what is None is left out.

    Attributes:
        headline: how the run ended.
        checkpoint: folder of the last checkpoint.
        plots: pictures.
        metrics: metrics.jsonl.
        wandb_folder: files of the wandb run.
        wandb_is_offline: True if they have not been uploaded.
        commands: what to do next: a few words, and the command line.
    """

    headline: str
    checkpoint: Path | None
    plots: Sequence[Path]
    metrics: Path
    wandb_folder: Path | None
    wandb_is_offline: bool
    commands: Sequence[tuple[str, str]]


def start_up_table(start: StartUp) -> RenderableType:
    """Layout, parameters, batch and steps, and which implementation serves each op."""
    facts = Table(box=box.SIMPLE_HEAD, show_header=False, title=f"Run {start.run_name}")
    for name, value in _facts(start):
        facts.add_row(name, value)
    ops = Table("op", "served by", "why", box=box.SIMPLE_HEAD, title="Implementations")
    for row in start.implementations:
        ops.add_row(row.op, row.implementation, row.reason)
    for table in (facts, ops):
        table.title_justify = "left"
    return Group(facts, ops)


def closing_message(closing: Closing) -> Text:
    """Where everything is and what to do next, in lines that can be copied."""
    places: list[tuple[str, str]] = []
    if closing.checkpoint is not None:
        places.append(("checkpoint", str(closing.checkpoint)))
    places += [("plot", str(path)) for path in closing.plots]
    places.append(("metrics", str(closing.metrics)))
    if closing.wandb_folder is not None:
        kind = "offline wandb run" if closing.wandb_is_offline else "wandb run"
        places.append((kind, str(closing.wandb_folder)))
    commands = list(closing.commands)
    if closing.wandb_folder is not None and closing.wandb_is_offline:
        commands.append(("upload to wandb", f"wandb sync {closing.wandb_folder}"))
    text = Text.assemble((closing.headline, "bold"), "\n", *_aligned(places))
    if commands:
        text.append_text(Text.assemble(("\nnext", "bold"), "\n", *_aligned(commands)))
    text.rstrip()
    return text


def _facts(start: StartUp) -> Iterable[tuple[str, str]]:
    layout = "  ".join(f"{axis} {size}" for axis, size in start.layout.items())
    yield "layout", f"{layout}  on {start.device}"
    yield "pipeline", start.schedule
    yield "layers per chunk", " + ".join(str(layers) for layers in start.layers_per_chunk)
    yield "parameters", f"{start.num_parameters:,} ({start.num_activated_parameters:,} activated)"
    yield "parameters per rank", _by_stage(start.parameters_per_rank)
    tokens_a_step = start.global_batch_size * start.sequence_length
    yield (
        "batch",
        f"{start.global_batch_size:,} samples x {start.sequence_length:,} tokens = "
        f"{tokens_a_step:,} tokens a step",
    )
    yield (
        "microbatches",
        f"{start.num_microbatches:,} of {start.micro_batch_size} samples on each pipeline",
    )
    yield "steps", f"{start.first_step:,} to {start.total_steps:,}, {start.total_tokens:,} tokens"
    yield "checkpoints", _checkpoints(start.staging_bytes)


def _checkpoints(staging_bytes: int) -> str:
    if not staging_bytes:
        return "training waits until they are written"
    return (
        f"written behind training, from {staging_bytes / 2**30:.2f} GiB of this rank's host memory"
    )


def _by_stage(parameters: tuple[int, ...]) -> str:
    if len(parameters) <= 4:
        return "  ".join(f"stage {stage}: {count:,}" for stage, count in enumerate(parameters))
    return f"{min(parameters):,} to {max(parameters):,} over {len(parameters)} stages"


def _aligned(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"  {name:<{width}}  {value}\n" for name, value in pairs]
