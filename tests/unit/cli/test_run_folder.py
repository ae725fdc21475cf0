from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.integrity import marker_of
from dsv2_train.cli.compose import compose_values
from dsv2_train.cli.launch import __main__ as launcher
from dsv2_train.cli.launch import start
from dsv2_train.cli.launch.place import on_nodes
from dsv2_train.cli.run_folder.inspect import inspect
from dsv2_train.config.load import check, load_file
from dsv2_train.config.problems import ConfigError
from dsv2_train.config.run import RunConfig
from dsv2_train.recipe.clock import Clock
from tests.helpers.tiny import tiny_config
from tests.unit.cli.folders import write_checkpoint, write_data_folder


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> RunConfig:
    return tiny_config("run.name=r", "recipe.num_steps=40", *overrides)


def test_a_new_run_begins() -> None:
    launch = inspect(config())
    assert launch.checkpoint is None
    assert not launch.is_finished
    assert launch.describe() == "run r begins: 40 steps, 1 ranks (PP 1, DP 1, EP 1)"


def test_an_unfinished_run_goes_on() -> None:
    write_checkpoint(config(), 10)
    write_checkpoint(config(), 20)
    launch = inspect(config())
    assert launch.clock == Clock(20, 160)
    assert launch.describe().startswith("run r goes on, newest checkpoint step 20: 40 steps")


def test_a_finished_run_says_so() -> None:
    write_checkpoint(config(), 40)
    launch = inspect(config())
    assert launch.is_finished
    assert "run r is finished: 40 of 40 steps, in runs/r" in launch.describe()


def test_what_is_known_to_be_wrong_does_not_hide_what_this_node_lacks() -> None:
    values, _ = compose_values(["experiment=quickstart", "parallel.pp=0", "parallel.world_size=64"])
    partial, problems = check(values)
    with pytest.raises(ConfigError) as caught:
        inspect(partial, problems, machines=on_nodes(1))
    assert [problem.path for problem in caught.value.problems] == [
        "parallel.pp",
        "parallel.world_size",
    ]


def test_a_longer_budget_makes_a_finished_run_go_on() -> None:
    write_checkpoint(config(), 40)
    launch = inspect(config("recipe.num_steps=60"))
    assert not launch.is_finished
    assert "recipe.num_steps: 40 -> 60" in launch.describe()


def by_tokens(*overrides: str) -> RunConfig:
    """400 steps of the quickstart's batch, 8 samples of 24 tokens."""
    return config("recipe.num_steps=null", f"recipe.num_tokens={400 * 8 * 24}", *overrides)


@pytest.mark.parametrize(
    ("override", "last_step"),
    [
        ("recipe.global_batch_size=16", 250 + 75),
        ("recipe.global_batch_size=4", 250 + 300),
        ("recipe.batch_ramp={start_batch_size:4,ramp_tokens:96000,multiple_of:4}", 250 + 300),
        ("recipe.num_steps=260", 260),
    ],
)
def test_another_batch_from_here_on_moves_the_end(override: str, last_step: int) -> None:
    """After 250 of 400 steps, 1,200 samples are left."""
    write_checkpoint(by_tokens(), 250)
    launch = inspect(by_tokens(override))
    assert not launch.is_finished
    assert launch.describe().startswith(
        f"run r goes on, newest checkpoint step 250: {last_step} steps"
    )


def test_a_run_that_has_its_tokens_is_finished_whatever_the_batch() -> None:
    write_checkpoint(by_tokens(), 400)
    launch = inspect(by_tokens("recipe.global_batch_size=4"))
    assert launch.is_finished
    assert "run r is finished: 400 of 400 steps" in launch.describe()


SMALL_FILES = [layout.STATE, layout.CONFIG, layout.MANIFEST]


@pytest.mark.parametrize("name", [*SMALL_FILES, layout.MARKER])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_goes_on(
    name: str, content: bytes | None
) -> None:
    write_checkpoint(config(), 10)
    damage(write_checkpoint(config("optim.lr=1"), 20) / name, content)
    if name == layout.MARKER and not content:
        assert inspect(config("optim.lr=1")).clock == Clock(20, 160), "nothing else is wrong"
        return
    launch = inspect(config())
    assert launch.clock == Clock(10, 80)
    assert launch.changes == (), "told against the checkpoint that is gone on from"
    first, *_, last = launch.describe().splitlines()
    assert first.startswith("CHECKPOINT PASSED OVER  ")
    assert "step_00000020" in first
    assert name in launch.describe()
    assert last.startswith("run r goes on, newest checkpoint step 10")


def damage(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_if_all_are_damaged_no_run_begins_anew(name: str) -> None:
    for step in (10, 20):
        damage(write_checkpoint(config(), step) / name, None)
    with pytest.raises(ConfigError) as caught:
        inspect(
            config("parallel.world_size=16", "recipe.global_batch_size=32"), machines=on_nodes(1)
        )
    paths = [problem.path.rpartition("/")[2] for problem in caught.value.problems]
    assert paths == ["parallel.world_size", "checkpoints"], "it hides no other problem"
    told = str(caught.value)
    assert all(word in told for word in ("step_00000010", "step_00000020", name, "run.name"))
    assert len(told.splitlines()) == 3


def test_a_newer_format_is_refused_in_one_line() -> None:
    path = write_checkpoint(config(), 10)
    text = (path / layout.MANIFEST).read_text()
    text = text.replace('"format_version": 1', '"format_version": 2')
    (path / layout.MANIFEST).write_text(text)
    (path / layout.MARKER).write_bytes(marker_of(text.encode()))
    write_checkpoint(config(), 5)
    with pytest.raises(ConfigError) as caught:
        inspect(config())
    [problem] = caught.value.problems
    assert "format_version: found 2; this dsv2_train reads 1; take the dsv2_train" in str(problem)
    assert "step_00000010" in str(problem)


def test_checkpoints_that_may_not_be_looked_at_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_checkpoint(config(), 10)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "checkpoints")

    monkeypatch.setattr(layout, "step_folders", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        inspect(config())


def test_an_only_checkpoint_without_marker_is_no_new_run() -> None:
    path = write_checkpoint(config(), 10)
    (path / "COMPLETE").unlink()
    assert inspect(config()).checkpoint == path
    (path / layout.STATE).unlink()
    with pytest.raises(ConfigError, match=r"state\.json: missing"):
        inspect(config())


def test_all_changes_that_mean_another_run_are_refused_at_once() -> None:
    write_checkpoint(config(), 10)
    with pytest.raises(ConfigError) as caught:
        inspect(config("model.num_layers=3", "run.seed=4", "optim.lr=1", "data.skip=[[79,90]]"))
    assert [problem.path for problem in caught.value.problems] == [
        "data.skip",
        "model.num_layers",
        "run.seed",
    ]
    assert "runs/r was trained with 1234" in str(caught.value)


def test_what_is_wrong_hides_no_change_of_meaning() -> None:
    write_checkpoint(config(), 10)
    overrides = ["parallel.pp=0", "model.num_heads=x", "run.seed=4", "model.num_layers=3"]
    values, _ = compose_values(["experiment=quickstart", "run.name=r", *overrides])
    partial, problems = check(values)
    with pytest.raises(ConfigError) as caught:
        inspect(partial, problems)
    paths = [problem.path for problem in caught.value.problems]
    assert {"parallel.pp", "model.num_heads", "run.seed", "model.num_layers"} <= set(paths)
    assert len(paths) == len(set(paths)), "nothing twice"


def test_a_finished_run_whose_tensors_are_damaged_is_not_finished() -> None:
    write_checkpoint(config(), 30)
    path = write_checkpoint(config(), 40, {layout.data_file(0): b"tensors"})
    assert inspect(config()).is_finished
    (path / layout.data_file(0)).write_bytes(b"Tensors")
    launch = inspect(config())
    assert (launch.is_finished, launch.clock.step) == (False, 30)
    first, second, *_ = launch.describe().splitlines()
    assert first == f"CHECKPOINT PASSED OVER  {path}: damaged files:"
    assert second == "  - __0_0.distcp: its CRC-32 is not the manifest's"
    assert inspect(config("recipe.num_steps=50")).clock.step == 40, "read by the ranks"


def test_files_of_others_in_a_run_folder_are_no_obstacle() -> None:
    Path("runs/r/logs").mkdir(parents=True)
    for name in ("launch_old", "launch_", "launch_\u0663", "config_old.yaml"):
        (Path("runs/r/logs") / name).touch()
    Path("runs/r/config.yaml").write_bytes(b"\xff\xfe")
    launch = inspect(config())
    assert launch.next_log_dir().name == "launch_0001"
    launch.write_config()
    assert Path("runs/r/logs/config_0001.yaml").read_bytes() == b"\xff\xfe"


def test_samples_to_come_are_skipped_from_here_on() -> None:
    write_checkpoint(config(), 10)
    launch = inspect(config("data.skip=[[80,88]]"))
    assert launch.describe().splitlines()[-1] == "  data.skip: [] -> [[80, 88]]"
    launch.write_config()
    assert load_file(Path("runs/r/config.yaml")).data.skip == ((80, 88),)


def test_the_checkpoint_decides_not_the_last_launch() -> None:
    write_checkpoint(config(), 10)
    inspect(config("recipe.num_steps=60")).write_config()
    assert [change.path for change in inspect(config("recipe.num_steps=60")).changes] == [
        "recipe.num_steps"
    ]
    assert inspect(config()).changes == ()


def test_one_node_is_the_limit() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.world_size: found 16; must be at most"):
        inspect(
            config("parallel.world_size=16", "recipe.global_batch_size=32"), machines=on_nodes(1)
        )


def test_config_is_written_and_the_one_before_is_kept() -> None:
    inspect(config()).write_config()
    inspect(config()).write_config()
    inspect(config("optim.lr=1")).write_config()
    inspect(config("optim.lr=2")).write_config()
    assert load_file(Path("runs/r/config.yaml")) == config("optim.lr=2")
    assert load_file(Path("runs/r/logs/config_0001.yaml")) == config()
    assert load_file(Path("runs/r/logs/config_0002.yaml")) == config("optim.lr=1")
    assert sorted(path.name for path in Path("runs/r").iterdir()) == ["config.yaml", "logs"]


def test_every_launch_has_its_own_logs() -> None:
    launch = inspect(config())
    assert launch.next_log_dir().name == "launch_0001"
    launch.next_log_dir().mkdir(parents=True)
    assert launch.next_log_dir().name == "launch_0002"


def test_a_folder_that_cannot_be_written_is_a_config_error() -> None:
    launch = inspect(config())
    Path("runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"run\.dir: .* \(runs is a file\)"):
        inspect(config())
    with pytest.raises(ConfigError, match=r"run\.dir"):
        launch.write_config()


def test_a_folder_of_someone_else_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _: path != Path("theirs"))
    Path("theirs").mkdir()
    with pytest.raises(ConfigError, match=r"run\.dir: .* \(theirs is not yours to write\)"):
        inspect(config("run.dir=theirs/runs"))
    assert inspect(config("run.dir=ours/runs")).checkpoint is None


def test_nothing_begins_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no look beforehand finds: a link that leads nowhere."""
    write_data_folder(Path("data/stdlib"), vocab_size=4096)
    Path("runs").symlink_to("nowhere/at/all")
    monkeypatch.setattr(start, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert launcher.main(["experiment=quickstart"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "run.dir: found 'runs'; must be a folder that can be written" in told.err
