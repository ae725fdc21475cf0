"""Which ranks others wait for, from the parts of a step that every rank takes by itself."""

# W ranks, P parts

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from dsv2_train.config.sections.monitor import SlowRankConfig
from dsv2_train.monitor.ranks.parts import PARTS, Part

Times = Sequence[Sequence[float]]  # [W, P] seconds, parts as in PARTS
# Time in the exchange is others' slowness, not a rank's own.
_OWN: tuple[Part, ...] = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Slow:
    """A rank that is slow in a part of the step.

    Attributes:
        rank: which.
        part: of its step.
        elapsed_s: what it takes.
        ratio: to the median of the ranks of its stage.
    """

    rank: int
    part: Part
    elapsed_s: float
    ratio: float


class Stragglers:
    """Holds measured steps against the rule of `SlowRankConfig`; tells once when one begins.

    A rank is held against the ranks of its own pipeline stage, which compute the same: of two, the
    faster one is the median, and a rank that is alone in its stage is not judged.

    Args:
        slow_ranks: the rule.
        stages: ranks of each.
        hosts: by rank.
    """

    def __init__(
        self, slow_ranks: SlowRankConfig, stages: Sequence[Sequence[int]], hosts: Sequence[str]
    ) -> None:
        self._slow_ranks, self._stages, self._hosts = slow_ranks, stages, hosts
        self._times_slow: dict[tuple[int, Part], int] = {}

    def check(self, times_s: Times) -> list[str]:
        """Take the next measured step.

        Returns:
            A sentence for each rank and part that have now been slow as often in a row as it takes.
            Both are named again only after a step in which they were not.
        """
        slow = {(one.rank, one.part): one for one in self._slow(times_s)}
        self._times_slow = {key: self._times_slow.get(key, 0) + 1 for key in slow}
        patience = self._slow_ranks.patience
        begun = [slow[key] for key, count in self._times_slow.items() if count == patience]
        return [self._sentence(one) for one in begun]

    def row(self, times_s: Times) -> dict[str, float]:
        """Of each part, the slowest rank against the median of its stage, in the worst stage."""
        found: dict[str, float] = {}
        for part, place in zip(PARTS, range(len(PARTS)), strict=True):
            stages = [[times_s[rank][place] for rank in stage] for stage in self._stages]
            ratios = [max(each) / median_low(each) for each in stages if median_low(each) > 0]
            if ratios:
                found[f"perf/{part}_max_over_median"] = max(ratios)
        return found

    def _slow(self, times_s: Times) -> Iterator[Slow]:
        for stage in self._stages:
            step_s = median(sum(times_s[rank]) for rank in stage)
            for part in _OWN:
                place = PARTS.index(part)
                usual_s = median_low(times_s[rank][place] for rank in stage)
                for rank in stage:
                    elapsed_s = times_s[rank][place]
                    costs = elapsed_s - usual_s >= self._slow_ranks.min_share * step_s
                    if costs and elapsed_s >= self._slow_ranks.min_ratio * usual_s:
                        ratio = elapsed_s / usual_s if usual_s else float("inf")
                        yield Slow(rank, part, elapsed_s, ratio)

    def _sentence(self, one: Slow) -> str:
        times = f"{self._slow_ranks.patience} measured steps"
        return (
            f"rank {one.rank} ({self._hosts[one.rank]}) is slow: {one.part} takes "
            f"{one.elapsed_s:.3g} s of its step, {one.ratio:.2f} times the median of its stage, "
            f"and was slow in each of the last {times}"
        )
