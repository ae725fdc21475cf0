"""Speed of a window, against arithmetic by hand."""

from collections.abc import Iterator

import pytest

from dsv2_train.monitor.throughput import Stopwatch, Window, throughput


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_row_by_hand() -> None:
    window = Window(
        num_steps=10,
        num_tokens=40_000,
        elapsed_s=10.0,
        data_time_s=0.5,
        eval_time_s=1.5,
        checkpoint_time_s=0.5,
    )
    row = throughput(window, training_flops_per_token=2e9, num_devices=4, peak_tflops=10.0)
    # 8 s of training: 5,000 tokens/s, 1e13 operations a second on 4 devices.
    assert row == pytest.approx(
        {
            "perf/tokens_per_s": 5000.0,
            "perf/step_time_s": 0.8,
            "perf/data_time_s": 0.05,
            "perf/eval_time_s": 1.5,
            "perf/checkpoint_time_s": 0.5,
            "perf/model_tflops_per_gpu": 2.5,
            "perf/mfu": 0.25,
        }
    )


def test_paper_speed_is_its_mfu() -> None:
    # DeepSeek-V2, section 3.2.3: 172.8K GPU hours per trillion tokens; 155.3 GFLOP a token.
    window = Window(num_steps=1, num_tokens=10**12, elapsed_s=172_800 * 3600.0)
    row = throughput(window, 155.3e9, num_devices=1, peak_tflops=989.4)
    assert row["perf/tokens_per_s"] == pytest.approx(1607, rel=1e-3)
    assert row["perf/model_tflops_per_gpu"] == pytest.approx(250, rel=2e-3)
    assert row["perf/mfu"] == pytest.approx(0.252, rel=2e-3)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    row = throughput(Window(1, 1000, 1.0), 1e9, num_devices=1, peak_tflops=None)
    assert set(row) == {
        "perf/tokens_per_s",
        "perf/step_time_s",
        "perf/data_time_s",
        "perf/model_tflops_per_gpu",
    }


def test_stopwatch_keeps_kinds_of_time_apart() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def slow() -> Iterator[str]:
        for item in ("a", "b"):
            clock.now_s += 0.25
            yield item

    for _ in watch.timed(slow()):
        clock.now_s += 1.0
    watch.add_step(num_tokens=300)
    with watch.evaluation():
        clock.now_s += 4.0
    with watch.checkpoint():
        clock.now_s += 8.0
    watch.add_step(num_tokens=400)

    assert watch.cut() == Window(
        num_steps=2,
        num_tokens=700,
        elapsed_s=14.5,
        data_time_s=0.5,
        eval_time_s=4.0,
        checkpoint_time_s=8.0,
    )


def test_cut_starts_a_new_window() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    watch.add_step(1)
    clock.now_s += 5.0
    watch.cut()
    clock.now_s += 2.0
    watch.add_step(7)
    assert watch.cut() == Window(num_steps=1, num_tokens=7, elapsed_s=2.0)


def test_timed_data_ends_where_the_data_ends() -> None:
    assert list(Stopwatch().timed(iter([1, 2, 3]))) == [1, 2, 3]
