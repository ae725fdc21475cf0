"""Attention's back end: the fastest of those that take the heads, told with its times."""

from collections.abc import Callable

import pytest
import torch

from dsv2_train.model.implementation import Choice, choose
from dsv2_train.model.sdpa import fastest, measure_sdpa
from dsv2_train.ops.attention import BACKENDS
from tests.helpers.tiny import tiny_config

LENGTH = 4096


def takes(milliseconds: float) -> Callable[[int], float]:
    return lambda positions: milliseconds * positions / LENGTH


def refuses(positions: int) -> float:
    raise RuntimeError("No available kernel. Aborting execution.")


def has_no_room(positions: int) -> float:
    if positions == LENGTH:
        raise torch.OutOfMemoryError
    return 0.1


def test_the_fastest_serves_and_the_table_says_why() -> None:
    fused = {"sdpa_cudnn": takes(9.0), "sdpa_flash": refuses, "sdpa_efficient": takes(4.0)}
    assert fastest("attention", fused, LENGTH) == Choice(
        "attention",
        "sdpa_efficient",
        "forward and backward here: sdpa_cudnn 9.00 ms, sdpa_efficient 4.00 ms; "
        "sdpa_flash cannot serve these heads",
    )


def test_the_first_serves_where_two_are_as_fast() -> None:
    fused = {"sdpa_cudnn": takes(4.1), "sdpa_flash": takes(4.0)}
    choice = fastest("attention", fused, LENGTH)
    assert choice.implementation == "sdpa_cudnn"
    assert "all of torch's can serve" in choice.reason


def test_what_has_no_room_for_a_real_sample_does_not_serve() -> None:
    fused = {"sdpa_cudnn": has_no_room, "sdpa_flash": takes(4.0)}
    assert fastest("attention", fused, LENGTH).implementation == "sdpa_flash"


def test_plain_operations_serve_where_nothing_else_does() -> None:
    choice = fastest("attention", {"sdpa_cudnn": refuses, "sdpa_flash": has_no_room}, LENGTH)
    assert choice.implementation == "sdpa_math"
    assert choice.reason == "sdpa_cudnn, sdpa_flash cannot serve these heads"


def test_any_other_error_is_not_taken_for_a_refusal() -> None:
    def wrong(positions: int) -> float:
        raise TypeError("a mistake of ours")

    with pytest.raises(TypeError, match="ours"):
        fastest("attention", {"sdpa_cudnn": wrong}, LENGTH)


def test_nothing_changes_on_a_cpu() -> None:
    config, cpu = tiny_config(), torch.device("cpu")
    choice = choose(config.parallel, cpu)["attention"]
    assert measure_sdpa(choice, config, cpu) is choice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_asked() -> None:
    device = torch.device("cuda")
    choice = measure_sdpa(Choice("attention", "sdpa", "asked for"), tiny_config(), device)
    assert choice.implementation in BACKENDS
