"""Who rotates and assembles attention's heads, and what is said of it."""

from pathlib import Path

import pytest
import torch

from dsv2_kernels.native import library
from dsv2_train.config.problems import ConfigError
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.model import implementation
from dsv2_train.model.implementation import Choice, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def rope(device: torch.device, **fields: str) -> Choice:
    return choose(ParallelConfig(world_size=1).model_copy(update=fields), device)["rope"]


@pytest.fixture
def with_te(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "why_no_package", lambda package, device: None)


def test_torch_serves_until_a_kernel_is_measured() -> None:
    assert rope(CPU).implementation == rope(CUDA, attention="sdpa").implementation == "torch"
    assert "no kernel of ours was measured" in rope(CPU).reason


def test_a_kernel_serves_where_it_is_asked_for(emulated_library: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.rope: found 'kernel'; not possible here"):
        rope(CPU, rope="kernel")
    with library.emulated(emulated_library):
        assert rope(CPU, rope="kernel") == Choice("rope", "kernel", "asked for")


@pytest.mark.parametrize("asked", ["auto", "torch"])
@pytest.mark.parametrize("attention", ["auto", "te"])
def test_heads_of_transformer_engine_are_megatron_cores(
    with_te: None, attention: str, asked: str
) -> None:
    choice = rope(CUDA, attention=attention, rope=asked)
    assert choice.implementation == "megatron_core"
    assert "transformer-engine" in choice.reason


def test_a_kernel_cannot_serve_transformer_engine(with_te: None) -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.rope: found 'kernel'; not possible here: megatron-core"
    ):
        rope(CUDA, attention="te", rope="kernel")


def test_an_attention_that_is_missing_is_told_once() -> None:
    with pytest.raises(ConfigError) as refused:
        rope(CPU, attention="te", rope="torch")
    assert [problem.path for problem in refused.value.problems] == ["parallel.attention"]
