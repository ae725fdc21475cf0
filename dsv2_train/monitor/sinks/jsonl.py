"""JSON lines: one history a file."""

from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from dsv2_train.monitor.rows import keep_until


class JsonlSink:
    """Appends lines to a file, each on disk before the next step (kept by the system's cache).

    Attributes:
        moved_aside: the file that lines have moved to when it was opened or rewound, or None.
    """

    def __init__(
        self, path: Path, first_step: int, aside_folder: Path, step_of: Callable[[bytes], int]
    ) -> None:
        """Lines after `first_step`, of a run that got further and was stopped, move aside.

        Args:
            path: of the file; made if it is not there.
            first_step: steps done before this start.
            aside_folder: where they move to.
            step_of: the step of a line; raises ValueError for one that is not whole.
        """
        self._path, self._aside_folder, self._step_of = path, aside_folder, step_of
        self.moved_aside = keep_until(path, first_step, aside_folder, step_of)
        self._file = self._opened()

    def rewind(self, step: int) -> None:
        """Go on after an earlier step: lines after it move aside."""
        self._file.close()
        self.moved_aside = keep_until(self._path, step, self._aside_folder, self._step_of)
        self._file = self._opened()

    def write(self, line: str) -> None:
        """Write one line, its newline included."""
        self._file.write(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _opened(self) -> TextIO:
        return self._path.open("a", encoding="utf-8", buffering=1)
