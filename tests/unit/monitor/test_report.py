"""What a run says at its start and its end."""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

from dsv2_train.monitor.report import Closing, StartUp, closing_message, start_up_table


@dataclass(frozen=True)
class Row:
    op: str
    implementation: str
    reason: str


START = StartUp(
    run_name="quickstart",
    device="cpu",
    layout={"pp": 2, "ep": 2, "dp": 2, "edp": 1},
    schedule="zb_h1",
    layers_per_chunk=(3, 2),
    num_parameters=12_345_678,
    num_activated_parameters=2_345_678,
    parameters_per_rank=(4_000_001, 3_000_002),
    sequence_length=256,
    global_batch_size=16,
    micro_batch_size=2,
    num_microbatches=4,
    first_step=100,
    total_steps=400,
    total_tokens=1_638_400,
    staging_bytes=3 << 29,
    implementations=(
        Row("attention", "sdpa", "no CUDA device"),
        Row("experts", "loop", "fastest on a CPU"),
    ),
)

CLOSING = Closing(
    headline="Done: 400 of 400 steps.",
    checkpoint=Path("runs/a/checkpoints/step_00000400"),
    plots=(Path("runs/a/plots/loss.png"),),
    metrics=Path("runs/a/metrics.jsonl"),
    wandb_folder=Path("runs/a/wandb/offline-run-1"),
    wandb_is_offline=True,
    commands=(("resume", "launch/local.sh experiment=quickstart"),),
)


def text_of(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_start_up_table_names_everything_in_80_columns() -> None:
    shown = text_of(start_up_table(START))
    for words in (
        "quickstart",
        "pp 2  ep 2  dp 2  edp 1  on cpu",
        "3 + 2",
        "12,345,678 (2,345,678 activated)",
        "stage 0: 4,000,001  stage 1: 3,000,002",
        "16 samples x 256 tokens = 4,096 tokens a step",
        "4 of 2 samples",
        "100 to 400, 1,638,400 tokens",
        "from 1.50 GiB",
        "sdpa",
        "no CUDA device",
        "fastest on a CPU",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_many_stages_are_shown_as_a_range() -> None:
    start = dataclasses.replace(START, parameters_per_rank=(5, 9, 7, 8, 6))
    assert "5 to 9 over 5 stages" in text_of(start_up_table(start))


def test_closing_message_gives_places_and_commands() -> None:
    shown = closing_message(CLOSING).plain
    assert shown == (
        "Done: 400 of 400 steps.\n"
        "  checkpoint         runs/a/checkpoints/step_00000400\n"
        "  plot               runs/a/plots/loss.png\n"
        "  metrics            runs/a/metrics.jsonl\n"
        "  offline wandb run  runs/a/wandb/offline-run-1\n"
        "\n"
        "next\n"
        "  resume           launch/local.sh experiment=quickstart\n"
        "  upload to wandb  wandb sync runs/a/wandb/offline-run-1"
    )


def test_closing_message_leaves_out_what_is_not_there() -> None:
    closing = Closing(
        headline="Stopped at step 3.",
        checkpoint=None,
        plots=(),
        metrics=Path("m.jsonl"),
        wandb_folder=None,
        wandb_is_offline=False,
        commands=(),
    )
    assert closing_message(closing).plain == "Stopped at step 3.\n  metrics  m.jsonl"


def test_uploaded_run_needs_no_upload_command() -> None:
    shown = closing_message(dataclasses.replace(CLOSING, wandb_is_offline=False)).plain
    assert "upload" not in shown
    assert "  wandb run" in shown
