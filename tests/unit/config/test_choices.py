"""What is offered in place of a layout that cannot run really runs, and nothing nearer does."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check
from dsv2_train.config.problems import Problem
from dsv2_train.config.schedules import SCHEDULES

Layout = dict[str, Any]  # fields of `parallel`

QUICKSTART, _ = compose_values(["experiment=quickstart"])
V2 = ["experiment=dsv2_236b_pretrain", "data.path=any"]  # 16 stages of 2 chunks, split by hand
FIELDS = {"schedule", "pp", "chunks"}


def of_16(layers: int) -> str:
    """Layers of 16 chunks."""
    return ",".join(str(layers // 16 + (idx < layers % 16)) for idx in range(16))


SPLIT = "parallel.layers_per_chunk"
OF_48 = ",".join(["2"] * 12 + ["1"] * 36)
OF_32 = ",".join(["2"] * 28 + ["1"] * 4)


@pytest.mark.parametrize(
    ("overrides", "paths", "choices"),
    [
        (
            ["parallel.schedule=interleaved_zb", "parallel.chunks=4"],
            ["parallel.chunks", SPLIT],
            ["parallel.chunks=2", "parallel.pp=8", f"parallel.chunks=3 {SPLIT}=[{OF_48}]"],
        ),
        (
            ["parallel.schedule=interleaved_zb", "parallel.chunks=4", f"{SPLIT}=null"],
            ["parallel.chunks"],
            [
                "parallel.pp=4 parallel.chunks=3",
                "parallel.pp=4 parallel.chunks=5",
                f"parallel.chunks=3 {SPLIT}=[{OF_48}]",
            ],
        ),
        (
            ["parallel.schedule=search", "parallel.chunks=4", f"{SPLIT}=null"],
            ["parallel.chunks"],
            [
                "parallel.pp=4 parallel.chunks=3",
                "parallel.pp=4 parallel.chunks=5",
                f"parallel.chunks=3 {SPLIT}=[{OF_48}]",
            ],
        ),
        (
            ["parallel.schedule=interleaved", "parallel.chunks=5", f"{SPLIT}=null"],
            ["parallel.chunks"],
            ["parallel.pp=4", f"parallel.chunks=3 {SPLIT}=[{OF_48}]"],
        ),
        (
            ["parallel.pp=64"],
            ["parallel.pp", SPLIT, "parallel.world_size"],
            ["parallel.pp=16", f"parallel.pp=8 {SPLIT}=[{of_16(60)}]"],
        ),
        (
            ["parallel.pp=64", f"{SPLIT}=null"],
            ["parallel.pp", "parallel.world_size"],
            ["parallel.pp=2", f"parallel.pp=16 {SPLIT}=[{OF_32}]"],
        ),
        ([f"{SPLIT}=null"], [SPLIT], ["parallel.pp=2", f"{SPLIT}=[{OF_32}]"]),
        (["parallel.pp=15", "parallel.world_size=120"], [SPLIT], [f"{SPLIT}=null"]),
        (
            ["parallel.schedule=zb_h1"],
            ["parallel.chunks"],
            [
                "parallel.schedule=interleaved",
                "parallel.schedule=zb_v",
                "parallel.schedule=interleaved_zb",
                "parallel.schedule=search",
                f"parallel.chunks=1 {SPLIT}=[{of_16(60)}]",
            ],
        ),
        (
            ["parallel.schedule=search", "parallel.max_activations=1"],
            ["parallel.max_activations"],
            ["parallel.max_activations=2"],
        ),
        (
            ["parallel.max_activations=8"],
            ["parallel.max_activations"],
            ["parallel.max_activations=null"],
        ),
        (["parallel.world_size=100"], ["parallel.world_size"], []),
        (
            ["parallel.chunks=1", "model.num_layers=x"],
            ["model.num_layers", "parallel.chunks", SPLIT],
            [],
        ),
    ],
)
def test_what_is_offered_for_deepseek_v2(
    overrides: list[str], paths: list[str], choices: list[str]
) -> None:
    problems = problems_of(*V2, *overrides)
    assert [each.path for each in problems] == paths
    assert offered(problems) == choices
    for choice in choices:
        assert problems_of(*V2, *overrides, *choice.split()) == []


def test_how_it_is_told() -> None:
    (problem,) = problems_of("experiment=quickstart", "parallel.schedule=zb_v")
    assert str(problem) == (
        "parallel.chunks: found 1; must be 2 with parallel.schedule=zb_v; possible: "
        "parallel.chunks=2, or parallel.schedule=1f1b, or parallel.schedule=zb_h1, or "
        "parallel.schedule=search"
    )


@st.composite
def layouts(draw: st.DrawFn, max_layers: int, max_stages: int) -> dict[str, Any]:
    """Values of a run whose layout may be anything; at times another section is wrong as well."""
    values: dict[str, Any] = deepcopy(QUICKSTART)
    values["model"]["num_layers"] = draw(st.integers(2, max_layers))
    values["recipe"]["global_batch_size"] = draw(st.sampled_from([48, 96, 7]))
    splits = st.lists(st.integers(1, 5), min_size=1, max_size=12)
    ep, pp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, max_stages))
    values["parallel"] |= {
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "pp": pp,
        "ep": ep,
        "chunks": draw(st.integers(1, 5)),
        "world_size": draw(st.sampled_from([ep * pp, 2 * ep * pp, 12 * ep, 48 * ep, 7])),
        "layers_per_chunk": draw(st.none() | st.none() | splits),
        "max_activations": draw(st.none() | st.none() | st.integers(1, 8)),
    }
    return values


@settings(max_examples=80)
@given(layouts(max_layers=80, max_stages=20))
def test_what_is_offered_runs(values: dict[str, Any]) -> None:
    """It leaves no problem with the layout, and none that was not there."""
    problems = check(values)[1]
    others = [each for each in problems if not is_of_the_layout(each)]
    for choice in offered(problems):
        assert all(each in others for each in check(changed(values, parsed(choice)))[1]), choice


@settings(max_examples=80)
@given(layouts(max_layers=80, max_stages=20))
def test_something_is_offered_where_anything_runs(values: dict[str, Any]) -> None:
    problems = check(values)[1]
    others = [each for each in problems if not is_of_the_layout(each)]
    plain = {"schedule": "1f1b", "pp": 1, "chunks": 1, "max_activations": None}
    left = check(changed(values, {**plain, "layers_per_chunk": None}))[1]
    if problems != others and all(each in others for each in left):
        assert offered(problems)


@settings(max_examples=60, deadline=None)
@given(layouts(max_layers=12, max_stages=16))
def test_nothing_nearer_runs(values: dict[str, Any]) -> None:
    """Every other layout is tried, with the split there is and with equal chunks."""
    problems = check(values)[1]
    others = [each for each in problems if not is_of_the_layout(each)]
    choices = [parsed(choice) for choice in offered(problems)]
    without_example = [each for each in choices if not each.get("layers_per_chunk")]
    for layout in every_layout(values):
        if any(is_nearer(values, layout, choice) for choice in without_example):
            left = check(changed(values, layout))[1]
            assert not all(each in others for each in left), layout


@settings(max_examples=60)
@given(num_layers=st.integers(2, 80), pp=st.integers(2, 16))
def test_layers_that_do_not_divide_need_a_split_and_one_is_offered(
    num_layers: int, pp: int
) -> None:
    layout = {"pp": pp, "ep": 1, "world_size": pp, "schedule": "1f1b"}
    values = changed(QUICKSTART, layout)
    values["model"]["num_layers"] = num_layers
    problems = check(values)[1]
    assert bool(problems) == (num_layers % pp != 0)
    if num_layers > pp and problems:
        example = parsed(offered(problems)[-1])
        assert example.keys() == {"layers_per_chunk"}
        split = example["layers_per_chunk"]
        assert (len(split), sum(split)) == (pp, num_layers)
        assert max(split) - min(split) == 1


def problems_of(*overrides: str) -> list[Problem]:
    values, problems = compose_values(list(overrides))
    assert not problems
    return check(values)[1]


def offered(problems: list[Problem]) -> list[str]:
    return [choice for problem in problems for choice in problem.choices]


def is_of_the_layout(problem: Problem) -> bool:
    words = ("world_size", "pp", "chunks", "layers_per_chunk", "max_activations")
    return problem.path in [f"parallel.{word}" for word in words]


def parsed(choice: str) -> Layout:
    """Fields of `parallel` and their values."""
    pairs = [each.removeprefix("parallel.").split("=") for each in choice.split()]
    return {name: yaml.safe_load(value) for name, value in pairs}


def changed(values: dict[str, Any], layout: Layout) -> dict[str, Any]:
    new: dict[str, Any] = deepcopy(values)
    new["parallel"] |= layout
    return new


def every_layout(values: dict[str, Any]) -> Iterator[Layout]:
    """All that could run, room as is and as it would have to be."""
    parallel, num_layers = values["parallel"], values["model"]["num_layers"]
    counts = range(1, num_layers + 1)
    for schedule, pp, chunks in product(SCHEDULES, counts, counts):
        if pp * chunks <= num_layers:
            for room, split in product((parallel["max_activations"], None, chunks), (0, 1)):
                yield {
                    "schedule": schedule,
                    "pp": pp,
                    "chunks": chunks,
                    "max_activations": room,
                    "layers_per_chunk": parallel["layers_per_chunk"] if split else None,
                }


def is_nearer(values: dict[str, Any], layout: Layout, choice: Layout) -> bool:
    """Whether it changes fewer of the fields, or the same ones by less."""
    old = values["parallel"]

    def change(one: Layout) -> tuple[set[str], int]:
        fields = {name for name in FIELDS if one.get(name, old[name]) != old[name]}
        return fields, sum(abs(one[name] - old[name]) for name in fields - {"schedule"})

    (mine, distance), (others, further) = change(layout), change(choice)
    return len(mine) < len(others) or (mine == others and distance < further)
