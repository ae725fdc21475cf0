import subprocess
import sys
from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.cli import main as cli
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.data.manifest import DataError

DSV2 = [sys.executable, "-m", "dsv2_train.cli.main"]


def test_config_error_is_two_lines_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise ConfigError([Problem("optim.lr", -1, "must be positive")])

    assert cli.report_errors(run) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "1 configuration problem:\n  - optim.lr: found -1; must be positive\n"


@pytest.mark.parametrize("kind", [DataError, CheckpointError])
def test_its_line_and_no_traceback(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise kind("data/mine: no such folder")

    assert cli.report_errors(run) == 2
    assert capsys.readouterr().err == "data/mine: no such folder\n"


def test_interruption_is_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise KeyboardInterrupt

    assert cli.report_errors(run) == 1
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_keep_their_traceback() -> None:
    def run() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.report_errors(run)


def test_verb_gets_its_arguments_and_returns_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--without-data", "experiment=quickstart"]) == 0
    assert capsys.readouterr().out == "valid: quickstart\n"
    assert cli.main(["validate", "--without-data", "optim.lr=x", "model.y=1"]) == 2
    assert "2 configuration problems" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([], 0),
        (["--help"], 0),
        (["checkpoint", "--help"], 0),
        (["checkpoint", "fly"], 2),
        (["fly"], 2),
    ],
)
def test_help_and_unknown_verbs(
    words: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == status
    told = capsys.readouterr()
    assert all(verb in told.out + told.err for verb in cli.VERBS)


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: dsv2 {verb} " in capsys.readouterr().out


def test_planning_and_validating_never_import_torch() -> None:
    program = (
        "import sys\n"
        "from dsv2_train.cli.main import main\n"
        "assert main(['plan', 'experiment=dsv2_236b_pretrain']) == 0\n"
        "assert main(['validate', 'experiment=quickstart', '--without-data']) == 0\n"
        "loaded = {'torch', 'megatron', 'wandb'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    plan = subprocess.Popen(
        [*DSV2, "validate", "--without-data", "--show", "experiment=quickstart"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert plan.stdout is not None and plan.stderr is not None
    plan.stdout.close()
    assert plan.stderr.read() == b""
    plan.stderr.close()
    assert plan.wait() == 1
