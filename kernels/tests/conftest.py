"""Where kernels run in a test: emulated on this machine, or on its GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dsv2_kernels.native import library
from dsv2_kernels.native.build import build_emulated


def pytest_configure() -> None:
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    build_emulated(target)
    return target


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """In a test that takes it, tensors on it go through the kernels: emulated on the CPU."""
    return _device_of(request.param)


@pytest.fixture(params=["reference", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def anywhere(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """In a test that takes it, tensors on it go through the references, or through the kernels."""
    if request.param == "emulated":
        with library.emulated(request.getfixturevalue("emulated_library")):
            yield torch.device("cpu")
    else:
        yield _device_of("cpu" if request.param == "reference" else request.param)


def _device_of(name: str) -> torch.device:
    if name == "cuda" and (missing := library.why_missing()):
        pytest.skip(missing)
    return torch.device(name)


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """In a module that uses it, what a kernel leaves out is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _kernels_on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    if "device" not in request.fixturenames or request.getfixturevalue("device").type == "cuda":
        yield
        return
    with library.emulated(request.getfixturevalue("emulated_library")):
        yield
