"""Chosen steps, looked at closely: a timeline beside its plan, a window of torch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place
from dsv2_train.distributed.env import Env
from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.simulate import simulate
from dsv2_train.pipeline.stage.recorder import Recorded, Recorder
from dsv2_train.pipeline.timeline import (
    Timeline,
    mean_costs,
    of_simulation,
    write_picture,
    write_trace,
)
from dsv2_train.recipe.rank_map import pipelines


class Profiler:
    """Looks at the steps that `monitor.profile` names.

    Args:
        config: the run.
        env: this process among all.
        executor: of this rank's stage.
        hosts: all ranks, over a back end that takes objects.
    """

    def __init__(
        self, config: RunConfig, env: Env, executor: Executor, hosts: dist.ProcessGroup
    ) -> None:
        self._profile, self._env, self._executor = config.monitor.profile, env, executor
        self._hosts, self._pipelines = hosts, pipelines(config.parallel)
        self._folder = config.run.folder
        self._torch: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, counted from 1.

        Note:
            Where the step's timeline is drawn: collective over all ranks.
        """
        is_drawn = number in self._profile.timeline_steps
        self._start_torch(number)
        try:
            with self._executor.recording() if is_drawn else nullcontext() as recorder:
                yield
        finally:
            if number == self._profile.torch_last_step:
                self.end()
        if recorder is not None:
            recorder.mark("update", "update")
            self._draw(number, recorder)

    def end(self) -> None:
        """Write the trace of a window that is open."""
        if self._torch is None:
            return
        self._torch.stop()
        folder = self._folder / "torch_profile"
        folder.mkdir(parents=True, exist_ok=True)
        self._torch.export_chrome_trace(str(folder / f"rank_{self._env.rank:05}.json"))
        self._torch = None

    def _start_torch(self, number: int) -> None:
        first, last = self._profile.torch_first_step, self._profile.torch_last_step
        is_inside = first is not None and last is not None and first <= number <= last
        if not is_inside or self._torch is not None:
            return
        if self._env.rank not in self._profile.torch_ranks:
            return
        activities = [ProfilerActivity.CPU]
        if self._env.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._torch = profile(activities=activities)
        self._torch.start()

    def _draw(self, number: int, recorder: Recorder) -> None:
        """Rank 0's pipeline beside its plan as picture and trace; the others in the trace."""
        assert self._executor.last is not None
        plan = self._executor.last.plan
        everyone = self._gathered(recorder.recorded())
        if everyone is None:
            return
        measured: dict[str, Timeline] = {}
        waits: dict[str, Timeline] = {}
        for ranks in self._pipelines:
            title = f"step {number}, measured, ranks {', '.join(map(str, ranks))}"
            measured[title] = [everyone[rank].events for rank in ranks]
            waits[title] = [everyone[rank].waits for rank in ranks]
        (first, timeline), *others = measured.items()
        simulated = of_simulation(simulate(plan, mean_costs(plan, timeline)))
        pair = {first: timeline, f"{plan.schedule} at the measured means": simulated}
        folder = self._folder / "timelines"
        folder.mkdir(parents=True, exist_ok=True)
        write_picture(pair, folder / f"step_{number:08}.png", waits)
        write_trace({**pair, **dict(others)}, folder / f"step_{number:08}.json", waits)

    def _gathered(self, recorded: Recorded) -> list[Recorded] | None:
        """What every rank has recorded, by rank, on rank 0."""
        is_first = self._env.rank == 0
        everyone: list[Recorded | None] | None = [None] * self._hosts.size() if is_first else None
        with activity.waiting(Place.OBJECTS):
            dist.gather_object(recorded, everyone, group=self._hosts, group_dst=0)
        return cast(list[Recorded] | None, everyone)
