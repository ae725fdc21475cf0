"""wandb: one of its runs per training run."""

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_WANDB_CONNECT_TIMEOUT_S = 30
_WANDB_FINISH_TIMEOUT_S = 120


class WandbSink:
    """One wandb run per training run, one at a time in a process; a resume goes on under its id.

    wandb drops a step that does not increase, which a resumed run repeats: its own step is left to
    it, and `step` is the x axis of every metric.

    Attributes:
        run_id: give it to the next sink to resume.
        folder: where wandb keeps the files of this session.
        is_offline: True if they are uploaded by `wandb sync <folder>` only.
    """

    def __init__(
        self,
        folder: Path,
        mode: Literal["online", "offline"],
        project: str,
        run_id: str | None,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start a run; without a login or a server it is an offline one, and `warn` says so.

        Args:
            folder: of the training run; its name is the run's name.
            mode: online or offline.
            project: wandb project.
            run_id: of the run to resume, None for a new one.
            config: shown beside the run.
            warn: called with one line for people.
        """
        # An import of 1 to 2 seconds, which only the writing rank should pay.
        import wandb  # noqa: PLC0415

        self._warn = warn
        self._teardown: Callable[[], object] = wandb.teardown
        self._errors = (OSError, wandb.errors.Error)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_WANDB_CONNECT_TIMEOUT_S,
            finish_timeout=_WANDB_FINISH_TIMEOUT_S,
            reinit="create_new",
        )
        wandb.setup(settings=settings)
        self.run_id = run_id or secrets.token_hex(4)
        init = partial(
            wandb.init,
            project=project,
            name=folder.name,
            id=self.run_id,
            dir=folder,
            config=dict(config),
            settings=settings,
        )
        self._run: Any = self._connect(init) if mode == "online" else init(mode="offline")
        self.folder = Path(self._run.dir).parent
        self.is_offline: bool = self._run.offline
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _connect(self, init: Callable[..., Any]) -> Any:
        import wandb  # noqa: PLC0415  # as above

        # Asked for here, since wandb.init would wait for a key to be typed in.
        if not wandb.login(prompt=False, verify=False):
            self._warn("wandb: not logged in, so the run is recorded offline")
            return init(mode="offline")
        try:
            return init(mode="online", resume="allow")
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            self._warn(f"wandb: no connection, so the run is recorded offline ({reason})")
            wandb.teardown()  # its process still holds the id
            return init(mode="offline")

    def record(self, row: Mapping[str, Any]) -> None:
        """Log a row; if wandb's process is gone, training goes on without it."""
        self._attempt(lambda run: run.log(dict(row)))

    def record_picture(self, key: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log an image [height, width, 3] under a key of its own."""
        import wandb  # noqa: PLC0415  # as above

        self.record({"step": step, key: wandb.Image(pixels)})

    def alert(self, title: str, text: str) -> None:
        """Let wandb tell people, as each of them has set it up there."""
        self._attempt(lambda run: run.alert(title=title, text=text))

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except self._errors as error:
            self._warn(f"wandb: stopped recording, metrics.jsonl goes on ({error})")
            self._run = None

    def close(self) -> None:
        """Finish the run; an upload is waited for, two minutes at most."""
        if self._run is None:
            return
        try:
            self._run.finish()
            self._teardown()  # what `finish` leaves to be written in the background is on disk now
        except self._errors as error:
            self._warn(f"wandb: could not finish the run ({error})")
        self._run = None
