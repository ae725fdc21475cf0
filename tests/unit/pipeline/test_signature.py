"""The executor is called as megatron-core's schedules are: no argument of theirs is unknown."""

import inspect
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules
from torch import nn

from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.stage.signature import require_nothing_else

THEIRS = inspect.signature(schedules.forward_backward_pipelining_with_interleaving).parameters
OURS = inspect.signature(Executor.__call__).parameters
OTHERS = {name: each.default for name, each in THEIRS.items() if name not in OURS}


def test_every_argument_of_megatron_core_is_known_and_its_default_is_served() -> None:
    chunks = [nn.Linear(1, 1), nn.Linear(1, 1)]
    assert OTHERS.keys() > {"model", "decoder_seq_length", "p2p_communicator"}
    require_nothing_else({**OTHERS, "model": chunks}, chunks)
    require_nothing_else({"model": chunks[0]}, chunks[:1])
    for name in THEIRS.keys() & OURS.keys():
        assert THEIRS[name].default == OURS[name].default, name


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    given: Any = nn.Linear(1, 1) if name == "model" else 1
    with pytest.raises(ValueError, match=f"^{name}: "):
        require_nothing_else({name: given}, [nn.Linear(1, 1)])


def test_what_megatron_core_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="'modle'"):
        require_nothing_else({"modle": None}, [])
