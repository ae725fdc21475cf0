"""A layout that a schedule cannot run is refused; what the refusal names instead really works."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.config.schedules import SCHEDULES, Refusal, placement_shape, why_impossible
from dsv2_train.pipeline.schedules.build import build_plan

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"schedule": "zbv"},
        "schedule: found 'zbv'; there is no such schedule; possible: "
        "schedule interleaved, zb_v, interleaved_zb, search",
    ),
    (
        {"schedule": "zb_v", "num_chunks": 1},
        "num_chunks: found 1; must be 2 for zb_v; possible: "
        "schedule 1f1b, zb_h1, search, or num_chunks 2",
    ),
    (
        {"schedule": "interleaved", "num_chunks": 1},
        "num_chunks: found 1; must be at least 2 for interleaved; possible: "
        "schedule 1f1b, zb_h1, search, or num_chunks 2",
    ),
    (
        {"num_microbatches": 0},
        "num_microbatches: found 0; must be at least 1; possible: num_microbatches 1",
    ),
    ({"num_stages": 0}, "num_stages: found 0; must be at least 1; possible: num_stages 1"),
    (
        {"num_chunks": 4, "num_layers": 60},  # DeepSeek-V2
        "num_chunks: found 4; 64 chunks need as many layers; there are 60; possible: "
        "num_stages 15, or num_chunks 3",
    ),
    (
        {"num_layers": 20},
        "num_chunks: found 2; 32 chunks need as many layers; there are 20; possible: num_stages 10",
    ),
    (
        {"num_layers": 10},
        "num_stages: found 16; 32 chunks need as many layers; there are 10; possible: num_stages 5",
    ),
    (
        {"num_layers": 1},
        "num_stages: found 16; 32 chunks need as many layers; there is 1; possible: "
        "num_chunks 1 and num_stages 1 and schedule 1f1b",
    ),
    (
        {"schedule": "search", "num_chunks": 3, "max_activations": 2},
        "max_activations: found 2; must be at least num_chunks: every chunk holds a microbatch; "
        "possible: num_chunks 2, or max_activations 3",
    ),
]


def refusal(arguments: dict[str, Any]) -> Refusal | None:
    defaults = {
        "schedule": "interleaved_zb",
        "num_stages": 16,
        "num_microbatches": 18,
        "num_chunks": 2,
    }
    return why_impossible(**(defaults | arguments))


def suggestions(text: str) -> list[dict[str, Any]]:
    """Changes of arguments that a refusal names."""
    found = []
    for choice in text.partition("; possible: ")[2].split(", or "):
        parts = [part.partition(" ") for part in choice.split(" and ")]
        if len(parts) > 1:
            found.append({field: _value(value) for field, _, value in parts})
        else:
            field, _, values = parts[0]
            found += [{field: _value(value)} for value in re.split(", | or ", values)]
    return found


def _value(text: str) -> str | int:
    return int(text) if text.isdigit() else text


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_refusal_names_the_nearest_choices(arguments: dict[str, Any], message: str) -> None:
    assert str(refusal(arguments)) == message


counts = st.integers(-2, 12)
ARGUMENTS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from([*SCHEDULES, "zbv"]),
        "num_stages": counts,
        "num_microbatches": counts,
        "num_chunks": counts,
        "num_layers": st.none() | st.integers(1, 40),
        "max_activations": st.none() | counts,
    }
)


@settings(max_examples=300)
@given(ARGUMENTS)
def test_whatever_is_suggested_works(arguments: dict[str, Any]) -> None:
    refused = refusal(arguments)
    if refused is None:
        return
    assert refused.found == arguments[refused.field]
    choices = suggestions(str(refused))
    assert choices
    for choice in choices:
        assert choice.items() - arguments.items() == choice.items()
        assert refusal(arguments | choice) is None, choice


@settings(max_examples=100)
@given(ARGUMENTS)
def test_build_plan_refuses_what_is_impossible_and_nothing_else(arguments: dict[str, Any]) -> None:
    arguments = {name: value for name, value in arguments.items() if name != "num_layers"}
    refused = refusal(arguments)
    if arguments["schedule"] == "search" and refused is None:
        return  # test_search.py
    try:
        plan = build_plan(**arguments)
    except ValueError as error:
        assert refused is None or str(error) == str(refused)
        assert refused is not None or "holds" in str(error)  # more activations than allowed
    else:
        assert refused is None
        assert len(plan.ops) == arguments["num_stages"]


def test_nothing_is_refused_without_a_reason() -> None:
    assert refusal({}) is None
    assert refusal({"num_layers": 32, "max_activations": 2}) is None
    assert refusal({"schedule": "search", "num_chunks": 5, "num_layers": 80}) is None


def test_a_search_of_two_chunks_is_a_v() -> None:
    shapes = [placement_shape("search", chunks) for chunks in (1, 2, 3)]
    assert shapes == ["loop", "v", "loop"]
    assert placement_shape("zb_v", 2) == "v"
    assert placement_shape("interleaved_zb", 2) == "loop"
