"""A plan as tables for people."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv2_train.planner.layout import StagePlan
from dsv2_train.planner.report import Report

_GIB = 2**30


def render(report: Report) -> RenderableType:
    """Every part of the plan, in the order a reader needs it."""
    return Group(
        Text(_heading(report), style="bold"),
        _parameters(report),
        _flops(report),
        _stages(report),
        _ranks(report),
        _memory(report),
        _bubbles(report),
        _timetable(report),
        Text(_cost(report)),
        Text(report.not_modelled, style="dim"),
    )


def _heading(report: Report) -> str:
    return (
        f"{report.name}: {report.world_size} ranks on {report.num_nodes} nodes = "
        f"pp {report.pp} x dp {report.dp}; each dp = ep {report.ep} x edp {report.edp}"
    )


def _parameters(report: Report) -> Table:
    rows = [(_words(part), f"{count:,}") for part, count in asdict(report.parameters).items()]
    activated = report.activated
    rows += [
        ("all", f"{report.num_parameters:,}"),
        ("activated, embedding and head counted", f"{activated.with_embedding_and_head:,}"),
        ("activated, head counted", f"{activated.with_head:,}"),
        ("activated, neither counted", f"{activated.without_either:,}"),
    ]
    return _table("Parameters", ("part", "parameters"), rows)


def _flops(report: Report) -> Table:
    causal, full = report.flops_causal, report.flops_full
    rows = [
        (_words(part), _giga(flops), _giga(asdict(full.parts)[part]))
        for part, flops in asdict(causal.parts).items()
    ]
    rows.append(("forward", _giga(causal.forward), _giga(full.forward)))
    rows.append(("training", _giga(causal.training), _giga(full.training)))
    columns = ("part", "causal", "full square")
    return _table("FLOPs per token, in GFLOP", columns, rows)


def _stages(report: Report) -> Table:
    mean = sum(stage.forward_flops_per_token for stage in report.stages) / len(report.stages)
    rows = [
        (
            str(stage.pp_rank),
            _holds(stage),
            f"{stage.parameters:,}",
            f"{stage.parameters_per_rank:,}",
            _giga(stage.forward_flops_per_token),
            f"{stage.forward_flops_per_token / mean:.2f}",
        )
        for stage in report.stages
    ]
    columns = ("stage", "holds", "parameters", "on each rank", "forward GFLOP/token", "of mean")
    return _table("Stage split", columns, rows)


def _holds(stage: StagePlan) -> str:
    layers = f"layers {', '.join(_span(first, last) for first, last in stage.layers)}"
    return " + ".join(
        ["embedding"] * stage.has_embedding + [layers] + ["norm + head"] * stage.has_head
    )


def _ranks(report: Report) -> Table:
    rows = []
    for stage in report.stages:
        groups = [group for group in report.expert_groups if group.pp_rank == stage.pp_rank]
        most_nodes = max(len(group.nodes) for group in groups)
        rows.append(
            (
                str(stage.pp_rank),
                _span(stage.first_rank, stage.last_rank),
                _span(stage.first_node, stage.last_node),
                str(len(groups)),
                str(most_nodes),
            )
        )
    columns = ("stage", "ranks", "nodes", "EP groups", "nodes of an EP group, at most")
    title = f"Rank map: EP group g of a stage is its g-th run of {report.ep} ranks"
    return _table(title, columns, rows)


def _memory(report: Report) -> Table:
    rows = []
    for what, pp_rank in (("fullest", report.fullest_stage), ("emptiest", report.emptiest_stage)):
        stage = report.stages[pp_rank]
        memory = stage.memory
        parts = (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes)
        all_parts = (*parts, memory.total_bytes, stage.host_bytes_per_rank)
        sizes = [f"{size / _GIB:.2f}" for size in all_parts]
        rows.append((what, str(pp_rank), f"{stage.parameters_per_rank:,}", *sizes))
    columns = ("rank", "stage", "parameters", "weights", "gradients", "optimizer", "all", "host")
    title = "Model state on a rank, in GiB; host: its copy for asynchronous checkpoints"
    return _table(title, columns, rows)


def _bubbles(report: Report) -> Table:
    rows = [
        (
            f"{bubble.global_batch_size:,}",
            f"{bubble.num_microbatches:,}",
            f"{bubble.share:.1%}",
            str(bubble.peak_activations),
        )
        for bubble in report.bubbles
    ]
    columns = ("global batch size", "microbatches", "idle share", "activations of a chunk held")
    return _table(f"Pipeline: {report.schedule}, simulated", columns, rows)


def _timetable(report: Report) -> Table:
    rows = [
        (
            moment.event,
            f"{moment.consumed_tokens:,}",
            f"{moment.step:,}",
            f"{moment.lr:.4e}",
            f"{moment.global_batch_size:,}",
            f"{moment.num_microbatches:,}",
            moment.recipe_stage,
        )
        for moment in report.timetable
    ]
    columns = ("event", "consumed tokens", "step", "lr", "batch", "microbatches", "recipe stage")
    return _table("Recipe", columns, rows)


def _cost(report: Report) -> str:
    cost = report.cost
    text = (
        f"Whole run: {cost.num_steps:,} steps, {cost.num_tokens:,} tokens, "
        f"{cost.training_flops:.3g} FLOP (causal), {cost.training_flops_full:.3g} (full square)."
    )
    if cost.peak_tflops is None or cost.least_device_hours is None:
        return text
    return (
        f"{text} At 100% of {cost.peak_tflops} TFLOP/s, which no run reaches: "
        f"{cost.least_device_hours:,.0f} device-hours."
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Text to the left in the first column and in `holds`, figures to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        left = index == 0 or column in ("holds", "recipe stage")
        table.add_column(column, justify="left" if left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.4g}"


def _words(field: str) -> str:
    return field.replace("_", " ")
