"""What this rank is doing now, in memory that the launcher of its node reads from outside.

A rank that a launcher has started keeps one record in a file of a folder that is in memory. Each
thing it begins and ends is a mark; the record says what came last, and stays readable when the
process is stopped or stuck. In a process without a launcher nothing is written. Where time goes is
told from the same marks: an observer hears each of them.
"""

import enum
import faulthandler
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "DSV2_ACTIVITY"  # set by the launcher
HEARTBEAT_S = 0.5
STACKS_SIGNAL = signal.SIGQUIT


class Phase(enum.Enum):
    """What a run is at."""

    SETUP = "setup"
    BETWEEN_STEPS = "between steps"
    TRAINING = "forward and backward"
    OPTIMIZER = "optimizer"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"
    END = "end"


class Place(enum.Enum):
    """What a rank works on, or waits for others in, within its phase or pipeline op."""

    NOWHERE = ""
    DATA = "data"
    ACTIVATION = "receive from another stage"
    SENDS = "sends to other stages"
    STEP_AGREEMENT = "agreement of the stages on the step"
    CAPACITY = "all-gather of assignments"
    DISPATCH = "dispatch"
    COMBINE = "combine"
    GRADIENTS = "reduction of gradients"
    WEIGHTS = "gathering of weights"
    REDUCTION = "all-reduce"
    OBJECTS = "exchange of objects between hosts"


Observer = Callable[[Phase, str, Place, bool], None]


@dataclass(frozen=True)
class Record:
    """One rank, at the moment at which it was read.

    Attributes:
        pid: its process.
        heartbeat: grows every `HEARTBEAT_S` while the process can run Python at all.
        ticks: grow with what threads behind training have done.
        step: that runs, counted from 1; 0 before the first.
        marks: things begun and ended within the step.
        phase: what the run is at.
        op: F, B, W or BW; empty outside of pipeline ops.
        microbatch: of the op.
        chunk: of the op.
        place: innermost thing that was begun and has not ended.
        waits: the rank waits for others there.
    """

    pid: int
    heartbeat: int
    ticks: int
    step: int
    marks: int
    phase: Phase
    op: str
    microbatch: int
    chunk: int
    place: Place
    waits: bool

    def __str__(self) -> str:
        """For people: `step 3, F of microbatch 2, chunk 0, waits in dispatch`."""
        parts = [f"step {self.step}"] if self.step else []
        if self.op:
            during = "" if self.phase is Phase.TRAINING else f"{self.phase.value}, "
            parts.append(f"{during}{self.op} of microbatch {self.microbatch}, chunk {self.chunk}")
        else:
            parts.append(self.phase.value)
        if self.place is not Place.NOWHERE:
            parts.append(f"{'waits in' if self.waits else 'in'} {self.place.value}")
        return ", ".join(parts)


def start() -> None:
    """Begin to keep the record, and dump all stacks whenever the launcher asks.

    Does nothing unless `FOLDER_VARIABLE` names the launcher's folder. Starts one thread.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        _OURS.start(Path(folder), int(os.environ["RANK"]))


def observe(observer: Observer) -> None:
    """Tell `observer` of what this rank is at now and at every mark, until it is dismissed.

    Args:
        observer: takes phase, pipeline op (empty outside), place and whether the rank waits there;
            from autograd's thread too.
    """
    _OURS.observe(observer)


def dismiss(observer: Observer) -> None:
    """Tell an observer no more."""
    _OURS.dismiss(observer)


def begin_step(step: int) -> None:
    """A step begins, counted from 1."""
    _OURS.begin_step(step)


def tick() -> None:
    """A thread behind training has done something; may be called from any thread."""
    _OURS.tick()


def begin_op(kind: str, microbatch: int, chunk: int) -> None:
    """A pipeline op begins, with the wait for its input: F, B, W or BW."""
    _OURS.set_op(kind, microbatch, chunk)


def end_op() -> None:
    """The op that was begun last has ended, and its result is on its way."""
    _OURS.set_op("", 0, 0)


def phase(phase: Phase) -> AbstractContextManager[None]:
    """What the run is at while the block runs; afterwards, what it was at before."""
    return _PHASES[phase] if _OURS.is_marked else _NOTHING


def working(place: Place) -> AbstractContextManager[None]:
    """This rank works there, and others may wait for it, while the block runs."""
    return _WORKING[place] if _OURS.is_marked else _NOTHING


def waiting(place: Place) -> AbstractContextManager[None]:
    """This rank may wait for others while the block runs."""
    return _WAITING[place] if _OURS.is_marked else _NOTHING


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank keeps its record."""
    return folder / f"rank_{rank:05}"


def ranks_in(folder: Path) -> list[int]:
    """Ranks that keep a record there."""
    return sorted(int(file.name[5:]) for file in folder.glob("rank_*") if not file.suffix)


def stacks_of(folder: Path, rank: int) -> Path:
    """Where a rank dumps its stacks on `STACKS_SIGNAL`."""
    return folder / f"rank_{rank:05}.stacks"


def read(folder: Path, rank: int) -> Record | None:
    """The record of a rank of this node; None before it has begun to keep one."""
    try:
        data = file_of(folder, rank).read_bytes()
    except FileNotFoundError:
        return None
    pid, heartbeat, ticks = _HEADER.unpack_from(data, 0)
    step, marks, microbatch, chunk, op, phase_at, place_at, waits = _NOW.unpack_from(data, _NOW_AT)
    return Record(
        pid=pid,
        heartbeat=heartbeat,
        ticks=ticks,
        step=step,
        marks=marks,
        phase=_EVERY_PHASE[phase_at],
        op=op.rstrip(b"\0").decode(),
        microbatch=microbatch,
        chunk=chunk,
        place=_EVERY_PLACE[place_at],
        waits=waits,
    )


_HEADER = struct.Struct("<QQQ")  # pid, heartbeat, ticks
_NOW = struct.Struct("<IIII2sBB?")  # step, marks, microbatch, chunk, op, phase, place, waits
_NOW_AT = _HEADER.size
_END = _NOW_AT + _NOW.size
_EVERY_PHASE, _EVERY_PLACE = tuple(Phase), tuple(Place)
_KINDS = {kind: kind.encode() for kind in ("", "F", "B", "W", "BW")}


class _Activity:
    """The record of this process. Main thread and autograd's never write at the same time."""

    def __init__(self) -> None:
        self.is_kept = False
        self.is_marked = False
        self._observers: tuple[Observer, ...] = ()
        self._memory: mmap.mmap | bytearray = bytearray(_END)
        self._step = self._marks = self._microbatch = self._chunk = self._ticks = 0
        self._op = b""
        self._phases: list[int] = [_EVERY_PHASE.index(Phase.SETUP)]
        self._places: list[tuple[int, bool]] = [(_EVERY_PLACE.index(Place.NOWHERE), False)]

    def start(self, folder: Path, rank: int) -> None:
        path = file_of(folder, rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(bytes(_END))
        with temporary.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _END)
        self.is_kept = self.is_marked = True
        _HEADER.pack_into(self._memory, 0, os.getpid(), 0, 0)
        self._write()
        # The signal ends a process that has not said what to do with it: first this, then the name.
        self._stacks = stacks_of(folder, rank).open("w")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        temporary.rename(path)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def observe(self, observer: Observer) -> None:
        self._observers = (*(each for each in self._observers if each != observer), observer)
        self.is_marked = True
        self._tell(observer)

    def dismiss(self, observer: Observer) -> None:
        self._observers = tuple(each for each in self._observers if each != observer)
        self.is_marked = self.is_kept or bool(self._observers)

    def begin_step(self, step: int) -> None:
        self._step, self._marks = step, 0
        self._mark()

    def tick(self) -> None:
        if self.is_kept:
            self._ticks += 1
            struct.pack_into("<Q", self._memory, 16, self._ticks)

    def set_op(self, kind: str, microbatch: int, chunk: int) -> None:
        self._op, self._microbatch, self._chunk = _KINDS[kind], microbatch, chunk
        self._mark()

    def push_phase(self, phase: int) -> None:
        self._phases.append(phase)
        self._mark()

    def pop_phase(self) -> None:
        self._phases.pop()
        self._mark()

    def push_place(self, place: tuple[int, bool]) -> None:
        self._places.append(place)
        self._mark()

    def pop_place(self) -> None:
        self._places.pop()
        self._mark()

    def _mark(self) -> None:
        if self.is_kept:
            self._marks += 1
            self._write()
        for observer in self._observers:
            self._tell(observer)

    def _tell(self, observer: Observer) -> None:
        place, waits = self._places[-1]
        phase = _EVERY_PHASE[self._phases[-1]]
        observer(phase, self._op.decode(), _EVERY_PLACE[place], waits)

    def _write(self) -> None:
        place, waits = self._places[-1]
        self._memory[_NOW_AT:_END] = _NOW.pack(
            self._step,
            self._marks,
            self._microbatch,
            self._chunk,
            self._op,
            self._phases[-1],
            place,
            waits,
        )

    def _beat(self) -> None:
        beats = 0
        while True:
            time.sleep(HEARTBEAT_S)
            beats += 1
            struct.pack_into("<Q", self._memory, 8, beats)


class _InPhase:
    def __init__(self, phase: Phase) -> None:
        self._phase = _EVERY_PHASE.index(phase)

    def __enter__(self) -> None:
        _OURS.push_phase(self._phase)

    def __exit__(self, *error: object) -> None:
        _OURS.pop_phase()


class _InPlace:
    def __init__(self, place: Place, waits: bool) -> None:
        self._place = _EVERY_PLACE.index(place), waits

    def __enter__(self) -> None:
        _OURS.push_place(self._place)

    def __exit__(self, *error: object) -> None:
        _OURS.pop_place()


_OURS = _Activity()  # there is one a process, as there is one process to stop
_NOTHING = nullcontext()
_PHASES = {each: _InPhase(each) for each in Phase}
_WORKING = {each: _InPlace(each, waits=False) for each in Place}
_WAITING = {each: _InPlace(each, waits=True) for each in Place}
