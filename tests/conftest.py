"""What every test gets: warnings are errors, except those named here; worlds of processes."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.world import World

# Said by megatron-core and torch when they are imported; none concerns how we use them.
IMPORT_WARNINGS = (
    "ignore:Transformer Engine and Apex are not installed:UserWarning",
    "ignore:Apex is not installed:UserWarning",
    "ignore:`torch.jit.script:DeprecationWarning",
    "ignore:The following imports from `dynamic_context.py`:DeprecationWarning",
    "ignore:Warning. tp_group is None:DeprecationWarning",  # of its own calls
    "ignore:`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is:FutureWarning",
    "ignore:MLP requires ffn_hidden_size:DeprecationWarning",  # of its own shared experts
    "ignore:\\s*The 'megatron.core.transformer.custom_layers:DeprecationWarning",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="a skipped test fails, unless it is marked gpu"
    )
    parser.addoption(
        "--kills", type=int, metavar="N", help="trials of each way to save (2; 50 with --soak)"
    )
    parser.addoption(
        "--damages",
        type=int,
        metavar="N",
        help="checkpoints to damage at random (200; 2000 with --soak)",
    )
    parser.addoption("--soak", action="store_true", help="tests marked soak at full count")


@pytest.fixture(scope="session")
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether trials are to be run at full count."""
    return bool(pytestconfig.getoption("--soak"))


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our kernels, compiled for this machine's processor."""
    # Optional package: importable only where the kernels are installed.
    from dsv2_kernels.native.build import build_emulated  # noqa: PLC0415

    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    build_emulated(target)
    return target


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched, one by one."""
    # Optional package: importable only where the kernels are installed.
    from dsv2_kernels.native import library  # noqa: PLC0415

    names: list[str] = []
    launch = library._call

    def noted(path: object, name: str, *rest: Any) -> None:
        names.append(name)
        launch(path, name, *rest)

    monkeypatch.setattr(library, "_call", noted)
    return names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips") and "gpu" not in item.keywords:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report


def pytest_configure(config: pytest.Config) -> None:
    # Cores are shared with ranks of other tests: how long an example takes says nothing.
    settings.register_profile(
        "no deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("no deadline")
    for line in IMPORT_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> Iterator[World]:
    """`world.run(function, world_size, *args)`: results by rank; starts when first used."""
    pool = World(pytestconfig.getini("filterwarnings"))
    yield pool
    pool.close()
