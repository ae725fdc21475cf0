"""`dsv2 export` and `dsv2 import`: what they say, and that mistakes are a line and status 2."""

import json
from pathlib import Path

import pytest

from dsv2_train.cli.hf.export_verb import _num_bytes
from dsv2_train.cli.main import main
from dsv2_train.data.manifest import read_manifest
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import run_config
from tests.helpers.saved import save_weights

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = run_config(tmp_path, tmp_path / "data", "run.name=run")
    save_weights(config)
    return config.run.folder


def read_config(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / "config.json").read_text())
    return values


def test_there_and_back(run_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    synthetic_folder(tmp_path / "data")
    out = str(tmp_path / "hf")
    assert main(["export", str(run_folder), "--out", out, "--shard-size", "100KB"]) == 0
    told = capsys.readouterr().out
    assert "198 tensors of bfloat16" in told
    assert "in 5 files, each equal to its checksum" in told
    assert f"tokenizer of {tmp_path / 'data'}" in told
    assert read_config(tmp_path / "hf")["eos_token_id"] == 1
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    assert main(["import", out, "--out", str(tmp_path / "imported")]) == 0
    assert "step_00000000: the weights of" in capsys.readouterr().out
    again = ["--out", str(tmp_path / "again"), "--shard-size", "100KB"]
    assert main(["export", str(tmp_path / "imported"), *again]) == 0
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} < names
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_without_the_data_it_says_so(run_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(run_folder), "--out", str(tmp_path / "hf")]) == 0
    told = capsys.readouterr().out
    assert f"no tokenizer, bos and eos null: {tmp_path / 'data'}: no such folder" in told
    assert read_config(tmp_path / "hf")["eos_token_id"] is None
    assert not list((tmp_path / "hf").glob("*token*"))


def test_the_tokenizer_of_other_data_is_asked_for_or_refused(
    run_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    synthetic_folder(tmp_path / "data", vocab_size=129)
    words = ["export", str(run_folder), "--out", str(tmp_path / "hf")]
    assert main([*words, "--data", str(tmp_path / "data")]) == 2
    assert "its tokenizer has 129 tokens, the model 128" in capsys.readouterr().err
    assert main([*words, "--data", str(tmp_path / "nowhere")]) == 2
    assert main([*words, "--data", str(synthetic_folder(tmp_path / "other"))]) == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_tokenizer_that_was_changed_is_not_taken(
    run_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    path = synthetic_folder(tmp_path / "data") / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert main(["export", str(run_folder), "--out", str(tmp_path / "hf")]) == 0
    assert f"no tokenizer, bos and eos null: {path}: not the file" in capsys.readouterr().out


def test_a_folder_that_was_prepared_anew_is_not_taken(tmp_path: Path, capsys: Captured) -> None:
    data = synthetic_folder(tmp_path / "data")
    config = run_config(tmp_path, data, "run.name=run")
    corpus = read_manifest(data).splits["train"].bin.sha256
    for name, sha256 in (("same", corpus), ("other", "0" * 64)):
        save_weights(run_config(tmp_path, data, f"run.name={name}"), corpus=sha256)
    words = ["export", str(config.run.folder.with_name("same")), "--out", str(tmp_path / "hf")]
    assert main(words) == 0
    assert f"tokenizer of {data}" in capsys.readouterr().out
    words = ["export", str(config.run.folder.with_name("other")), "--out", str(tmp_path / "hf2")]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"no tokenizer, bos and eos null: {data}: the model was trained on a train.bin" in told
    assert not (tmp_path / "hf2" / "tokenizer.json").exists()
    assert main([*words[:-1], str(tmp_path / "hf3"), "--data", str(data)]) == 0
    assert (tmp_path / "hf3" / "tokenizer.json").exists(), "who names it, knows it"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "nowhere", "--out", "hf"], "nowhere: no such folder; must be a run folder"),
        (["export", "run", "--out", "run/config.yaml/x"], "run/config.yaml"),
        (["import", "nowhere", "--out", "a"], "nowhere: no such folder; must be a Hugging Face"),
        (["import", "run", "--out", "a"], "run: holds no config.json; must be a Hugging Face"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    run_folder: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    (run_folder / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("1.5 gib", 3 << 29), ("200MB", 2 * 10**8), ("1000", 1000)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert _num_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["0", "-1GB", "5 apples", "GB", "", "0.1"])
def test_what_is_no_size(text: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["export", "run", "--out", "hf", f"--shard-size={text}"])
    assert "must be a size, for instance 5GB" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_as_the_option_it_is(
    run_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    run, out = str(run_folder), str(tmp_path / "hf")
    assert main(["export", run, "--out", out]) == 0
    for words in (["export", run, "--out", run], ["import", out, "--out", run]):
        capsys.readouterr()
        assert main(words) == 2
        told = f"--out {run}: is there already; give another folder, or remove it\n"
        assert capsys.readouterr().err == told
