"""Marks become events: by the host's clock, and by events in a GPU's stream."""

import itertools
from unittest import mock

import pytest
import torch

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.pipeline.stage.recorder import Recorder
from dsv2_train.pipeline.timeline import Event


def test_by_the_host_s_clock() -> None:
    recorder = Recorder(torch.device("cpu"))
    with mock.patch("time.perf_counter", side_effect=[10.0, 10.5, 12.0]):
        recorder.begin()
        recorder.mark("wait", "wait")
        recorder.mark("F", "F0.0")
    assert recorder.recorded().events == [
        Event("wait", "wait", 0.0, 0.5),
        Event("F0.0", "F", 0.5, 2.0),
    ]


def test_what_is_waited_for_is_noted_within() -> None:
    recorder = Recorder(torch.device("cpu"))
    with (
        mock.patch("time.perf_counter", side_effect=map(float, range(10, 20))),
        recorder.listening(),
    ):
        with activity.waiting(Place.OBJECTS):
            pass  # before the step
        recorder.begin()  # 10
        with activity.working(Place.DATA), activity.waiting(Place.DISPATCH):  # 11
            pass  # 12
        with activity.waiting(Place.COMBINE), activity.waiting(Place.GRADIENTS):  # 13, 14
            pass  # 15: in combine again; 16
        recorder.mark("F", "F0.0")  # 17
    with activity.waiting(Place.COMBINE):
        pass  # nobody listens
    recorded = recorder.recorded()
    assert recorded.events == [Event("F0.0", "F", 0.0, 7.0)]
    assert recorded.waits == [
        Event("dispatch", "wait", 1.0, 2.0),
        Event("combine", "wait", 3.0, 4.0),
        Event("reduction of gradients", "wait", 4.0, 5.0),
        Event("combine", "wait", 5.0, 6.0),
    ]


def test_a_step_begins_anew() -> None:
    recorder = Recorder(torch.device("cpu"))
    for _ in range(2):
        recorder.begin()
        recorder.mark("F", "F0.0")
    assert len(recorder.recorded().events) == 1


class _StreamEvent:
    """torch's event: when the stream came to it, in milliseconds, known once it has."""

    stream_ms = itertools.count(100.0, 250.0)
    is_synchronized = False

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = next(self.stream_ms)

    def synchronize(self) -> None:
        type(self).is_synchronized = True

    def elapsed_time(self, later: "_StreamEvent") -> float:
        assert type(self).is_synchronized, "asked for a time before the GPU was there"
        return later.at_ms - self.at_ms


def test_by_events_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        _StreamEvent.is_synchronized = True

    monkeypatch.setattr(torch.cuda, "Event", _StreamEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    recorder = Recorder(torch.device("cuda"))
    recorder.begin()
    _StreamEvent.is_synchronized = False
    recorder.mark("F", "F0.0")
    recorder.mark("BW", "BW0.0")
    assert recorder.recorded().events == [
        Event("F0.0", "F", 0.0, 0.25),
        Event("BW0.0", "BW", 0.25, 0.5),
    ]
