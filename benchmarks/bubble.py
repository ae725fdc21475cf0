"""Idle share of a step under every schedule, 16 stages; simulated, nothing is timed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.layer_split import head_layers, split_layers
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.placement import Placement
from dsv2_train.config.schedules import SCHEDULES, TRAITS, placement_shape
from dsv2_train.config.sections.parallel import Recomputed
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.schedules.build import build_plan
from dsv2_train.pipeline.schedules.model_costs import model_costs
from dsv2_train.pipeline.schedules.run_plan import H800
from dsv2_train.pipeline.simulate import Simulation, simulate
from dsv2_train.pipeline.timeline import of_simulation, write_picture

NUM_STAGES = 16
NUM_MICROBATCHES = (16, 18, 32, 36, 72, 80, 144)
MAX_CHUNKS = 4
EQUAL = {"F:B:W = 1:1:1": (1.0, 1.0, 1.0), "F:B:W = 1.27:2.02:1": (1.27, 2.02, 1.0)}
LAYERS = "DeepSeek-V2's layers and head"
RECOMPUTE: tuple[Recomputed, ...] = ("mla_up_projection",)
SEQUENCE_LENGTH = 4096
DRAWN_S = (0.0235, 0.0374, 0.0185)  # F, B, W of four of its layers


@dataclass(frozen=True)
class Row:
    """A schedule with a number of chunks.

    Attributes:
        schedule: its name.
        num_chunks: of each stage.
        activations: the most that a stage holds, in those of a whole stage.
        bubbles: idle share of a step, by number of microbatches.
    """

    schedule: str
    num_chunks: int
    activations: float
    bubbles: Mapping[int, float]


def compare() -> dict[str, list[Row]]:
    """Every schedule, by what its ops cost; a searched one has room for 16 activations."""
    tables = {
        title: [_row(each, _equal(each, durations)) for each in _layouts()]
        for title, durations in EQUAL.items()
    }
    model = resolve(["experiment=dsv2_236b_pretrain"], need_data=False).model
    head = head_layers(model, SEQUENCE_LENGTH, H800, RECOMPUTE)
    tables[LAYERS] = []
    for schedule, place in _layouts(model.num_layers):
        layers = split_layers(model.num_layers, place, head)
        costs = model_costs(model, layers, SEQUENCE_LENGTH, H800, RECOMPUTE)
        tables[LAYERS].append(_row((schedule, place), costs))
    return tables


def show(tables: Mapping[str, list[Row]]) -> None:
    """Print a table for each kind of costs."""
    for title, rows in tables.items():
        print(f"\nidle share of a step in percent, 16 stages, {title}")
        counts = "".join(f"{f'm={count}':>8}" for count in NUM_MICROBATCHES)
        print(f"{'':24}{counts}{'activations':>14}")
        for row in rows:
            cells = "".join(f"{100 * row.bubbles[count]:8.1f}" for count in NUM_MICROBATCHES)
            name = f"{row.schedule}, {row.num_chunks} a stage"
            print(f"{name:24}{cells}{row.activations:14.2f}")


def draw(path: Path) -> None:
    """All schedules of 8 microbatches on 4 stages at DeepSeek-V2's costs below each other."""
    timelines = {}
    for schedule, chunks in (
        ("1f1b", 1),
        ("interleaved", 2),
        ("zb_h1", 1),
        ("interleaved_zb", 2),
        ("zb_v", 2),
        ("search", 4),
    ):
        place = Placement(4, chunks, placement_shape(schedule, chunks))
        costs = Costs.equal(place, *DRAWN_S)
        simulation = _simulate(schedule, place, 8, costs)
        held = max(simulation.peak_activations) / chunks
        title = f"{schedule}, {chunks} a stage, {simulation.bubble:.1%} idle, {held:g} activations"
        timelines[title] = of_simulation(simulation)
    write_picture(timelines, path)


def _layouts(num_layers: int | None = None) -> Iterator[tuple[str, Placement]]:
    for schedule in SCHEDULES:
        for chunks in range(1, MAX_CHUNKS + 1):
            has_layers = num_layers is None or NUM_STAGES * chunks <= num_layers
            if TRAITS[schedule].runs(chunks) and has_layers:
                shape = placement_shape(schedule, chunks)
                yield schedule, Placement(NUM_STAGES, chunks, shape)


def _equal(layout: tuple[str, Placement], durations: tuple[float, float, float]) -> Costs:
    return Costs.equal(layout[1], *durations)


def _row(layout: tuple[str, Placement], costs: Costs) -> Row:
    schedule, place = layout
    found = {count: _simulate(schedule, place, count, costs) for count in NUM_MICROBATCHES}
    held = max(max(each.peak_activations) for each in found.values())
    bubbles = {count: each.bubble for count, each in found.items()}
    return Row(schedule, place.num_chunks, held / place.num_chunks, bubbles)


def _simulate(schedule: str, place: Placement, count: int, costs: Costs) -> Simulation:
    return simulate(build_plan(schedule, place, count, costs=costs), costs)
