"""A layout that a schedule cannot run is refused; what the refusal names instead really works."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.config.schedules import (
    SCHEDULES,
    Layout,
    Refusal,
    is_possible,
    placement_shape,
    why_impossible,
)
from dsv2_train.pipeline.schedules.build import build_plan

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"schedule": "zbv"},
        "parallel.schedule: found 'zbv'; there is no such schedule; possible: "
        "parallel.schedule=interleaved, zb_v, interleaved_zb or search",
    ),
    (
        {"schedule": "zb_v", "chunks": 1},
        "parallel.chunks: found 1; must be 2 for zb_v; possible: "
        "parallel.schedule=1f1b, zb_h1 or search, or parallel.chunks=2",
    ),
    (
        {"schedule": "interleaved", "chunks": 1},
        "parallel.chunks: found 1; must be at least 2 for interleaved; possible: "
        "parallel.schedule=1f1b, zb_h1 or search, or parallel.chunks=2",
    ),
    (
        {"schedule": "interleaved", "chunks": 1, "pp": 1},
        "parallel.chunks: found 1; must be at least 2 for interleaved; possible: "
        "parallel.schedule=1f1b, zb_h1 or search",
    ),
    (
        {"pp": 1},
        "parallel.chunks: found 2; must be 1 with parallel.pp=1: the chunks of a single stage are "
        "one; possible: parallel.pp=2",
    ),
    (
        {"num_microbatches": 0},
        "num_microbatches: found 0; must be at least 1; possible: num_microbatches=1",
    ),
    ({"pp": 0}, "parallel.pp: found 0; must be at least 1; possible: parallel.pp=2"),
    (
        {"chunks": 4, "num_layers": 60},  # DeepSeek-V2
        "parallel.chunks: found 4; 64 chunks need as many layers; there are 60; possible: "
        "parallel.pp=15, or parallel.chunks=3",
    ),
    (
        {"num_layers": 20},
        "parallel.chunks: found 2; 32 chunks need as many layers; there are 20; possible: "
        "parallel.pp=10",
    ),
    (
        {"num_layers": 10},
        "parallel.pp: found 16; 32 chunks need as many layers; there are 10; possible: "
        "parallel.pp=5",
    ),
    (
        {"num_layers": 1},
        "parallel.pp: found 16; 32 chunks need as many layers; there is 1; possible: "
        "parallel.schedule=1f1b parallel.pp=1 parallel.chunks=1",
    ),
    (
        {"schedule": "search", "chunks": 3, "max_activations": 2},
        "parallel.max_activations: found 2; must be at least parallel.chunks = 3: every chunk "
        "holds a micro-batch; possible: parallel.chunks=2, or parallel.max_activations=3",
    ),
]


def layout(arguments: dict[str, Any]) -> Layout:
    defaults = {"schedule": "interleaved_zb", "pp": 16, "chunks": 2, "num_microbatches": 18}
    return Layout(**(defaults | arguments))


def refusal(arguments: dict[str, Any]) -> Refusal | None:
    return why_impossible(layout(arguments))


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_refusal_names_the_nearest_choices(arguments: dict[str, Any], message: str) -> None:
    assert str(refusal(arguments)) == message


counts = st.integers(-2, 12)
ARGUMENTS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from([*SCHEDULES, "zbv"]),
        "pp": counts,
        "num_microbatches": counts,
        "chunks": counts,
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
    assert refused.choices
    for choice in refused.choices:
        assert choice.items() - arguments.items() == choice.items()
        assert is_possible(layout(arguments | dict(choice))), choice


@settings(max_examples=100)
@given(ARGUMENTS)
def test_only_what_fits_is_suggested(arguments: dict[str, Any]) -> None:
    refused = why_impossible(layout(arguments), lambda changes: changes.get("pp", 2) % 2 == 0)
    for choice in refused.choices if refused is not None else ():
        assert choice.get("pp", 2) % 2 == 0


@settings(max_examples=100)
@given(ARGUMENTS)
def test_build_plan_refuses_what_is_impossible_and_nothing_else(arguments: dict[str, Any]) -> None:
    arguments["num_layers"] = None
    refused = refusal(arguments)
    if arguments["schedule"] == "search" and refused is None:
        return  # test_search.py
    try:
        plan = build_plan(
            arguments["schedule"],
            arguments["pp"],
            arguments["num_microbatches"],
            arguments["chunks"],
            max_activations=arguments["max_activations"],
        )
    except ValueError as error:
        assert refused is None or str(error) == str(refused)
        assert refused is not None or "holds" in str(error)  # more activations than allowed
    else:
        assert refused is None
        assert len(plan.ops) == arguments["pp"]


def test_nothing_is_refused_without_a_reason() -> None:
    assert refusal({}) is None
    assert refusal({"num_layers": 32, "max_activations": 2}) is None
    assert refusal({"schedule": "search", "chunks": 5, "num_layers": 80}) is None


def test_a_search_of_two_chunks_is_a_v() -> None:
    shapes = [placement_shape("search", chunks) for chunks in (1, 2, 3)]
    assert shapes == ["loop", "v", "loop"]
    assert placement_shape("zb_v", 2) == "v"
    assert placement_shape("interleaved_zb", 2) == "loop"
