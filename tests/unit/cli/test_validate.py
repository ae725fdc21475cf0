"""`dsv2 validate` tells what a corpus comes to at the run's sequence length."""

from pathlib import Path

import pytest
import yaml

from dsv2_train.cli.main import main
from tests.helpers.corpus import synthetic_folder
from tests.helpers.tiny import TINY


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    folder = synthetic_folder(tmp_path / "data", train_tokens=3000, validation_tokens=2000)
    return ["validate", *TINY, f"data.path={folder}", "recipe.eval_num_samples=2"]


def test_samples_unused_tokens_and_long_documents_are_told(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Both splits have 10 documents of equal length; 3000 = 14 * 210 + 1 + 59, 2000 = 9 * 210 + 110.
    assert main([*words, "recipe.sequence_length=210"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "valid: quickstart",
        "  train       14 samples of 210 tokens; 59 of 3,000 tokens unused at the end",
        "              10 documents, the longest 300 tokens; 10 longer than a sample go on in the "
        "next one",
        "  validation  9 samples of 210 tokens; 109 of 2,000 tokens unused at the end",
        "              10 documents, the longest 200 tokens; 0 longer than a sample go on in the "
        "next one",
    ]


def test_the_resolved_configuration_is_shown_alone(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["name"] == "quickstart"
