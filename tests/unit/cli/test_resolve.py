"""What training needs beside a right configuration: packages, a precision, data."""

from pathlib import Path

import pytest

from dsv2_train.cli.main import main
from dsv2_train.cli.resolve import examine
from dsv2_train.config import packages
from tests.helpers.corpus import synthetic_folder
from tests.unit.cli.folders import write_data_folder

TE = ("parallel.linear=te", "parallel.norm=te", "parallel.attention=te")


@pytest.fixture(autouse=True)
def in_folder_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data_folder(Path("data/stdlib"), vocab_size=4096)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)


def paths_of(*overrides: str, need_data: bool = True) -> list[str]:
    _, problems = examine(["experiment=quickstart", *overrides], need_data=need_data)
    return [problem.path for problem in problems]


@pytest.mark.usefixtures("nothing_installed")
def test_every_package_that_is_asked_for_and_missing_is_named() -> None:
    others = (
        "parallel.overlap_shared_experts=false",
        "recipe.capacity_factor=null",
        "recipe.precision=bf16",
    )
    overrides = (*TE, "parallel.dispatcher=deepep", *others)
    asked = [override.partition("=")[0] for override in (*TE, "parallel.dispatcher=")]
    for adam in ("te", "apex", "deepspeed_cpu"):
        assert paths_of(*overrides, f"optim.adam={adam}") == [*asked, "optim.adam"]
    assert paths_of() == []


@pytest.mark.usefixtures("nothing_installed")
def test_what_is_wrong_does_not_hide_what_is_missing() -> None:
    overrides = ("parallel.norm=x", "parallel.pp=0", "parallel.linear=te", "recipe.precision=fp64")
    assert sorted(paths_of(*overrides)) == [
        "parallel.linear",
        "parallel.norm",
        "parallel.pp",
        "recipe.precision",
    ]


def test_what_is_installed_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    assert paths_of(*TE, "optim.adam=apex") == []


@pytest.mark.usefixtures("nothing_installed")
def test_a_plan_needs_neither_data_nor_packages() -> None:
    overrides = (*TE, "optim.adam=apex", "recipe.precision=fp64", "data.path=nowhere")
    assert paths_of(*overrides, need_data=False) == []


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("override", ["recipe.precision=fp64", "optim.adam=apex", TE[1]])
def test_validate_refuses_what_the_launcher_refuses(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = synthetic_folder(tmp_path / "whole", vocab_size=4096, validation_tokens=20_000)
    line = ["validate", "experiment=quickstart", f"data.path={folder}"]
    assert main(line) == 0
    assert main([*line, override]) == 2
    assert capsys.readouterr().err.startswith("1 configuration problem:\n  - ")
