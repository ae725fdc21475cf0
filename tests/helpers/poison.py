"""Samples that make numbers bad: whoever trains on one gets NaN, or a loss that is far too high."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv2_train.distributed.sharding import whole_of
from dsv2_train.train.run import Run

EMBEDDING, HEAD = "embedding", "output_layer"


def poison(run: Run, samples: Iterable[int], kind: str) -> None:
    """Make samples bad, wherever in the order of a run they come.

    Args:
        run: of a rank; what it does not train on does it no harm.
        samples: ids.
        kind: `nan` for hidden states that are none, `spike` for a head that is far off; the second
            needs embedding and head on one rank.
    """
    windows = run.train_split.windows_of(np.array(list(samples)))
    known = {run.train_split.windows[window, :-1].astype(np.int64).tobytes() for window in windows}
    seen = False

    def look(_: object, _inputs: object, named: dict[str, Tensor], output: Tensor) -> Tensor:
        nonlocal seen
        tokens = named["input_ids"].numpy()
        seen = any(row.tobytes() in known for row in tokens)
        return output * torch.nan if seen and kind == "nan" else output

    def enlarge(_module: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0] * 1000, *inputs[1:]) if seen and kind == "spike" else None

    for chunk in run.chunks:
        for name, module in chunk.module.named_modules():
            if name == EMBEDDING:
                module.register_forward_hook(look, with_kwargs=True)
            if name == HEAD:
                module.register_forward_pre_hook(enlarge)


def omit_update(run: Run, step: int) -> None:
    """Have a step, counted from 1, computed and its update left out: what skipping must equal."""
    update = run.optimizer.update

    def unless(lr: float, norm: Tensor) -> None:
        if run.clock.step + 1 != step:
            update(lr, norm)

    run.optimizer.update = unless  # type: ignore[method-assign]


def flip_a_bit(run: Run, step: int, name: str) -> None:
    """Flip the lowest bit of a parameter's last element in a step, when its gradients are there."""
    measure = run.optimizer.measure

    def flip(*numbers: Tensor) -> Tensor:
        if run.clock.step + 1 == step:
            for chunk in run.chunks:
                for parameter in chunk.parameters():
                    if whole_of(parameter).name == name:
                        parameter.data.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        return measure(*numbers)

    run.optimizer.measure = flip  # type: ignore[method-assign]


def incidents(folder: Path) -> list[str]:
    """Names of what was written down."""
    return sorted(path.name for path in (folder / "incidents").glob("*"))
