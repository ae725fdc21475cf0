"""A map of layers and experts: how loaded each expert was in one step."""

import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

# n layers that route, E experts, D device groups

MOST_LOAD = 3.0  # where the colours end: this many times the mean, and more
_DECIMALS = 3
_PIXELS = 8  # a side of an expert's square


@dataclass(frozen=True)
class ExpertMap:
    """One step's map.

    Attributes:
        layers: n indices of layers in the model.
        load: [n][E] assignments of an expert over the mean of its layer; 1 is even.
        sent: [n][D] tokens sent to a device group over M / D of all: the paper's f''.
    """

    layers: list[int]
    load: list[list[float]]
    sent: list[list[float]]


def encode_map(step: int, one: ExpertMap) -> str:
    """A map as one line of JSON, newline included; values with three decimals."""
    values = asdict(one)
    for key in ("load", "sent"):
        values[key] = [[round(value, _DECIMALS) for value in row] for row in values[key]]
    return json.dumps({"step": step, **values}, allow_nan=False) + "\n"


def decode_map(line: str | bytes) -> tuple[int, ExpertMap]:
    """Step and map of a line.

    Raises:
        ValueError: if the line is no map.
    """
    values = json.loads(line)
    try:
        step = values.pop("step")
        return int(step), ExpertMap(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"must be a map of experts, found {line[:80]!r}") from error


def picture(one: ExpertMap) -> NDArray[np.uint8]:
    """[height, width, 3]: a row of squares a layer, dark without load, bright at `MOST_LOAD`."""
    # Half a second of import that most ranks never need.
    from matplotlib import colormaps  # noqa: PLC0415

    shade = np.clip(np.asarray(one.load) / MOST_LOAD, 0.0, 1.0)
    pixels = colormaps["viridis"](shade, bytes=True)[..., :3]
    return np.repeat(np.repeat(pixels, _PIXELS, axis=0), _PIXELS, axis=1)
