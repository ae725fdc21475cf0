"""The map of layers and experts: its line and its picture."""

import numpy as np
import pytest

from dsv2_train.monitor.expert_map import ExpertMap, decode_map, encode_map, picture

ONE = ExpertMap(layers=[1, 2], load=[[0.0, 1.0, 3.0], [1.5, 1.5, 0.0]], sent=[[1.0], [0.5]])


def test_a_line_reads_back() -> None:
    line = encode_map(40, ONE)
    assert line.count("\n") == 1 and line.endswith("\n")
    assert decode_map(line) == (40, ONE)


def test_values_are_short() -> None:
    assert "0.333," in encode_map(1, ExpertMap([1], [[1 / 3, 2 / 3]], [[1.0]]))


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b'{"step": 1}', b'{"layers": [], "x": 1}'])
def test_what_is_no_map_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode_map(line)


def test_the_picture_is_a_square_an_expert_and_brighter_with_load() -> None:
    pixels = picture(ONE)
    assert pixels.shape == (2 * 8, 3 * 8, 3) and pixels.dtype == np.uint8
    brightness = pixels.astype(float).sum(axis=-1)[::8, ::8]
    assert brightness[0].tolist() == sorted(brightness[0].tolist())
    assert brightness[0, 0] < brightness[1, 0] < brightness[0, 2]
    assert np.array_equal(pixels[:8, :8], np.broadcast_to(pixels[0, 0], (8, 8, 3)))
