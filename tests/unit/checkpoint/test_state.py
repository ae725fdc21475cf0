"""The clock survives a round trip; what does not belong is refused by name."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.state import GuardState, TrainState

STATE = TrainState(7, 14, 1792, 7, "a1b2")


@given(
    counts=st.lists(st.integers(0, 2**62 - 1), min_size=4, max_size=4),
    run_id=st.none() | st.text(),
    ends=st.sets(st.integers(0, 2**62 - 1), max_size=8),
    corpus=st.none() | st.text(),
    losses=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5),
)
def test_round_trip(
    counts: list[int],
    run_id: str | None,
    ends: set[int],
    corpus: str | None,
    losses: list[float],
) -> None:
    in_order = sorted(ends)
    skip_list = tuple(zip(in_order[::2], in_order[1::2], strict=False))
    guard = GuardState(tuple(losses), *counts)
    state = TrainState(*counts, run_id, skip_list, corpus, guard)
    assert TrainState.from_json(state.to_json()) == state


def guard(**values: object) -> str:
    return changed(guard={**json.loads(STATE.to_json())["guard"], **values})


def changed(**values: object) -> str:
    return json.dumps({**json.loads(STATE.to_json()), **values})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed(schema_version=2), "schema_version: found 2; this dsv2_train reads 1"),
        (changed(iteration=7), "iteration: unknown key; allowed: step, consumed_samples"),
        (changed(step=-1), "step: found -1; allowed: an integer >= 0"),
        (changed(adam_step=1.5), "adam_step: found 1.5"),
        (changed(consumed_tokens=True), "consumed_tokens: found True"),
        (changed(wandb_run_id=3), "wandb_run_id: found 3; allowed: a string or null"),
        (changed(corpus=3), "corpus: found 3; allowed: a string or null"),
        (changed(skip_list=[[3, 2]]), "skip_list: found [[3, 2]]; allowed: ranges [first, end)"),
        (changed(skip_list=[[1, 5], [5, 6]]), "skip_list: found"),
        (changed(skip_list=[[1, 2, 3, 4]]), "skip_list: found"),
        (changed(skip_list=[[1, 2], 3]), "skip_list: found"),
        (changed(skip_list=[["1", 2]]), "skip_list: found"),
        (changed(guard=None), "guard: found None; allowed: an object with finite losses"),
        (guard(losses=["1"]), "guard: found"),
        (guard(losses=[float("nan")]), "guard: found"),
        (guard(rollbacks=-1), "guard: found"),
        (guard(more=1), "guard: found"),
        ('{"schema_version": 1, "step": 3}', "consumed_samples: missing"),
        (changed(step=2**62), "step: found 4611686018427387904"),
        (changed(skip_list=[[1, 2**70]]), "skip_list: found"),
        ("[" * 100_000, "not JSON"),
        ("[]", "found list; allowed: an object"),
        ("{", "not JSON"),
    ],
)
def test_what_does_not_belong_is_refused(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=r"^state") as error:
        TrainState.from_json(text)
    assert said in str(error.value)


def test_all_problems_are_listed() -> None:
    with pytest.raises(CheckpointError) as error:
        TrainState.from_json(changed(step=None, iteration=7))
    assert len(str(error.value).splitlines()) == 3
