"""Console and metrics.jsonl."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dsv2_train.monitor.rows import encode_row, read_rows, step_of_row
from dsv2_train.monitor.sinks.console import ConsoleSink, _duration
from dsv2_train.monitor.sinks.jsonl import JsonlSink


class Clock:
    """A clock that goes on by half a second a step."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self) -> float:
        return 0.5 * self.step


def make_row(step: int, **metrics: float) -> dict[str, float]:
    position = {"step": step, "consumed_samples": 2 * step, "consumed_tokens": 512 * step}
    return {**position, "train/loss": 5.0, **metrics}


def plain_console() -> Console:
    return Console(file=io.StringIO(), markup=False, highlight=False)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_row_is_one_plain_line() -> None:
    console, clock = plain_console(), Clock()
    sink = ConsoleSink(400, console, clock)
    for clock.step in (10, 20):
        metrics = {
            "train/lr": 2e-4,
            "train/grad_norm": 0.5,
            "perf/tokens_per_s": 12345.6,
            "perf/step_time_s": 1.0,
            "moe/expert_load_max_over_mean": 1.5,
        }
        sink.record(make_row(clock.step, **metrics))
    sink.close()
    words = "loss 5.0000  lr 2.00e-04  grad norm 0.500  tokens/s 12,346  expert load 1.50"
    # The first row knows its step time only (1 s), the second the pace since the first (0.5 s).
    assert shown_on(console) == (
        f"step  10/400  {words}  eta 6m30s\nstep  20/400  {words}  eta 3m10s\n"
    )


def test_row_without_any_time_has_no_eta() -> None:
    console = plain_console()
    ConsoleSink(10, console, Clock()).record(make_row(1))
    assert shown_on(console) == "step  1/10  loss 5.0000  eta ?\n"


def test_two_rows_of_one_step_are_both_shown() -> None:
    console, clock = plain_console(), Clock()
    sink = ConsoleSink(10, console, clock)
    sink.record(make_row(2, **{"perf/step_time_s": 1.0}))
    sink.record({"step": 2, "consumed_samples": 4, "consumed_tokens": 8, "eval/loss": 4.5})
    assert shown_on(console).splitlines()[1] == "step  2/10  eval loss 4.5000  eta ?"


def test_long_and_bracketed_messages_stay_as_they_are() -> None:
    console = plain_console()
    text = "[red]not markup[/red] " + "x" * 300
    ConsoleSink(10, console).message(text)
    assert shown_on(console) == text + "\n"


def test_on_a_terminal_a_bar_is_redrawn_and_evaluations_stay() -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, markup=False, highlight=False
    )
    clock = Clock()
    sink = ConsoleSink(400, console, clock)
    for clock.step in (100, 200):
        sink.record(make_row(clock.step, **{"train/lr": 2e-4}))
    before_evaluation = shown_on(console)
    clock.step = 300
    sink.record(make_row(300, **{"eval/loss": 4.25}))
    sink.message("a message")
    sink.close()
    shown = shown_on(console)
    assert "step 100/400" in before_evaluation
    assert "step 200/400" in before_evaluation
    assert "lr 2.00e-04" in before_evaluation
    assert "step 300/400  loss 5.0000  eval loss 4.2500" in shown
    assert "a message\n" in shown
    assert "eta 0m50s" in shown
    # The cursor is never left hidden, even by a kill.
    assert before_evaluation.rfind("\x1b[?25h") > before_evaluation.rfind("\x1b[?25l")


def test_message_after_close_is_shown() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, markup=False, highlight=False)
    sink = ConsoleSink(4, console)
    sink.record(make_row(4))
    sink.close()
    sink.message("the end")
    assert shown_on(console).endswith("the end\n")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "?"),
        (0.4, "0m00s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (90061, "1d01h"),
    ],
)
def test_duration(seconds: float | None, words: str) -> None:
    assert _duration(seconds) == words


def test_row_is_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, tmp_path / "logs", step_of_row)
    for step in (10, 20):
        sink.write(encode_row(make_row(step)))
        assert read_rows(path)[-1] == make_row(step)
    sink.close()


def test_resumed_file_tells_one_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first_step, steps in ((0, (10, 20, 30)), (10, (20, 30, 40)), (40, (50,))):
        sink = JsonlSink(path, first_step, tmp_path / "logs", step_of_row)
        for step in steps:
            sink.write(encode_row(make_row(step)))
        sink.close()
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30, 40, 50]
    (aside,) = (tmp_path / "logs").iterdir()
    assert aside.name == "metrics_after_step_00000010_1.jsonl"
    assert [row["step"] for row in read_rows(aside)] == [20, 30]


def test_a_rewound_file_tells_one_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, tmp_path / "logs", step_of_row)
    for step in (10, 20, 30):
        sink.write(encode_row(make_row(step)))
    sink.rewind(10)
    assert sink.moved_aside == tmp_path / "logs" / "metrics_after_step_00000010_1.jsonl"
    assert [row["step"] for row in read_rows(sink.moved_aside)] == [20, 30]
    sink.write(encode_row(make_row(20)))
    sink.rewind(20)
    assert sink.moved_aside is None
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [10, 20]
