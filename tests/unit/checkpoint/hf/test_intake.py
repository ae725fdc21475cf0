"""What is imported is the folder's tensors to the bit; what is no DeepSeek-V2 is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import load

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.hf.export import export
from dsv2_train.checkpoint.hf.intake import blocks_of, import_folder
from dsv2_train.checkpoint.hf.mapping.config import CONFIG
from dsv2_train.checkpoint.hf.mapping.tensors import cuts
from dsv2_train.checkpoint.hf.safetensors import INDEX, StoredTensor, read_header
from dsv2_train.checkpoint.hf.source import open_source
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.load import check_model, read_values
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.sharding import Piece
from tests.helpers.run import run_config
from tests.helpers.saved import blank_weights, files_up_to, save_weights
from tests.helpers.tiny import tiny_config

SINGLE = "model.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config(tmp_path, tmp_path / "data", "run.name=run")


@pytest.fixture
def weights(config: RunConfig) -> list[Piece]:
    return save_weights(config)[1]


@pytest.fixture
def folder(config: RunConfig, weights: list[Piece], tmp_path: Path) -> Path:
    """A Hugging Face folder of several files."""
    assert weights
    checkpoint = layout.step_folder(config.run.checkpoint_folder, 5)
    export(open_source(checkpoint), tmp_path / "hf", 100_000, {"tokenizer.json": b"{}"})
    return tmp_path / "hf"


def single(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Put all tensors of a folder into one file, as the library writes it, after a change."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / SINGLE)


def refusal(folder: Path, out: Path) -> str:
    """What an import says that must leave nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        import_folder(folder, out)
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize("files", ["several", "one, in another order"])
def test_a_run_of_any_layout_can_read_its_ranges(
    folder: Path, tmp_path: Path, config: RunConfig, weights: list[Piece], files: str
) -> None:
    if files != "several":
        single(folder, lambda _: None)
    path = import_folder(folder, tmp_path / "imported")
    assert path == tmp_path / "imported" / "step_00000000"
    loaded = blank_weights(config, torch.bfloat16)
    halves = [
        Piece(piece.key, piece.shape, start, piece.data[start:end])
        for piece in loaded
        for start, end in (
            (0, piece.data.numel() // 3),
            (piece.data.numel() // 3, piece.data.numel()),
        )
    ]
    state = CheckpointManager(tmp_path / "imported", 1).restore(halves)
    assert state == TrainState(0, 0, 0, 0)
    assert all(
        torch.equal(ours.data, theirs.data) for ours, theirs in zip(loaded, weights, strict=True)
    )
    manifest, _ = open_verified(path)
    assert manifest.files.keys() == {
        *("__0_0.distcp", ".metadata", "config.yaml", "state.json"),
        *("config.json", "tokenizer.json"),
    }
    values = read_values(path / layout.CONFIG)
    assert values.keys() == {"model"}
    assert check_model(values["model"]) == (config.model, [])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_s_own_reader_reads_it_too(
    folder: Path, tmp_path: Path, weights: list[Piece]
) -> None:
    path = import_folder(folder, tmp_path / "imported")
    expected = {piece.key: piece.data for piece in weights}
    found = {key: torch.zeros_like(data) for key, data in expected.items()}
    load(found, checkpoint_id=path, no_dist=True)
    assert all(torch.equal(found[key], data) for key, data in expected.items())


def test_large_tensors_are_read_in_blocks() -> None:
    wanted = list(cuts(tiny_config().model))
    found = {
        cut.part.name: StoredTensor(cut.part.name, cut.part.shape, "BF16", Path("f"), 64 * idx)
        for idx, cut in enumerate(wanted)
    }
    blocks = blocks_of(wanted, found, "bfloat16", most=100)
    assert max(block.place.numel for block in blocks) == 100
    assert sum(block.place.numel for block in blocks) == sum(cut.numel for cut in wanted)
    first = [block for block in blocks if block.place.key == wanted[0].key]
    assert [block.byte_offset for block in first[:3]] == [0, 200, 400]
    assert [block.place.offset for block in first[:3]] == [0, 100, 200]


def test_every_difference_of_the_tensors_is_told(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        name = "model.layers.1.mlp.gate.weight"
        tensors[name] = tensors[name].t().contiguous()

    single(folder, change)
    assert refusal(folder, tmp_path / "out").splitlines() == [
        f"{folder}: 4 differences between its tensors and the model of its config.json:",
        "  - element types: found BF16, F32; must be BF16 or F32, for all",
        "  - model.layers.0.self_attn.rotary_emb.inv_freq: not in the model",
        "  - model.layers.1.mlp.gate.weight: found (48, 16); the model of config.json has (16, 48)",
        "  - model.norm.weight: missing",
    ]


def test_half_precision_is_refused(folder: Path, tmp_path: Path) -> None:
    single(folder, lambda all: all.update({name: one.half() for name, one in all.items()}))
    assert "element types: found F16; must be BF16 or F32" in refusal(folder, tmp_path / "out")


def test_a_config_that_is_not_the_files_is_refused_quickly(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / CONFIG).read_text()) | {"num_hidden_layers": 10**12}
    (folder / CONFIG).write_text(json.dumps(values))
    assert "holds 198 tensors; the model of its config.json has more" in refusal(
        folder, tmp_path / "out"
    )


def test_a_config_that_cannot_be_run_is_refused(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values |= {"tie_word_embeddings": True, "attention_bias": True}
    (folder / CONFIG).write_text(json.dumps(values))
    told = refusal(folder, tmp_path / "out").splitlines()
    assert told[0] == f"{folder / CONFIG}: 2 reasons why this model cannot be run here:"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("by", ["its name", "the index", "a false name"])
def test_a_hostile_pickle_is_never_opened(folder: Path, tmp_path: Path, by: str) -> None:
    exploded = tmp_path / "exploded"
    name = SINGLE if by == "a false name" else "pytorch_model.bin"
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    if by == "the index":
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / INDEX).write_text(json.dumps(index))
    told = refusal(folder, tmp_path / "out")
    assert "no safetensors file" in told if by == "a false name" else "a pickle is never" in told
    assert not exploded.exists()
    os.close(pickle.loads(pickle.dumps(Bomb(exploded))))
    assert exploded.exists(), "the bomb is one"


def test_a_pickle_beside_safetensors_is_passed_over(folder: Path, tmp_path: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": "../hf/model-00001-of-00003.safetensors"}, "must be a file of this folder"),
        ({"a": 7}, "7: must be a file of this folder"),
        ({"a": "gone.safetensors"}, "gone.safetensors: missing"),
        ({}, "weight_map: must name the file of every tensor"),
        ([], "weight_map: must name the file of every tensor"),
    ],
)
def test_an_index_that_cannot_be_used(
    folder: Path, tmp_path: Path, weight_map: object, told: str
) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert told in refusal(folder, tmp_path / "out")


def test_an_index_that_contradicts_the_files(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] |= {"lm_head.weight": names[0], "no.such": names[0]}
    (folder / INDEX).write_text(json.dumps(index))
    told = refusal(folder, tmp_path / "out")
    assert f"lm_head.weight: not in {names[0]}" in told
    assert f"no.such: not in {names[0]}" in told


@pytest.mark.parametrize("name", [CONFIG, INDEX])
@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_a_json_file_that_is_none(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    assert name in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(folder: Path, tmp_path: Path, share: float) -> None:
    path = min(folder.glob("*.safetensors"))
    os.truncate(path, int(share * path.stat().st_size))
    assert str(path) in refusal(folder, tmp_path / "out")


def test_no_byte_of_a_header_ends_in_another_error(folder: Path, tmp_path: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    data = path.read_bytes()
    first = data.index(b"}") + 1  # behind the remarks, which are free
    for position in (*range(8), *range(first, first + 400, 3)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 21]) + data[position + 1 :])
        refusal(folder, tmp_path / "out")


def header_file(path: Path, header: dict[str, object], num_bytes: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def entry(start: int, end: int, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4], "data_offsets": [start, end]}


def test_a_header_that_is_nested_without_end(tmp_path: Path) -> None:
    text = b'{"a":' * 100_000
    (tmp_path / "nested").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="no safetensors file: its header: RecursionError"):
        read_header(tmp_path / "nested")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b: found at byte 4 of the data; the one before"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "b: found at byte 8 of the data; the one before"),
        ({"a": entry(0, 8), "b": entry(8, 12, None)}, "dtype None"),
        ({"a": entry(0, 12, ["F32"])}, "dtype ['F32']"),
    ],
)
def test_a_header_that_contradicts_itself(
    tmp_path: Path, header: dict[str, object], said: str
) -> None:
    good = {"a": entry(0, 8), "b": entry(8, 12)}
    assert len(read_header(header_file(tmp_path / "x", good, 12))) == 2
    with pytest.raises(CheckpointError) as error:
        read_header(header_file(tmp_path / "x", header, 12))
    assert said in str(error.value)


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    assert "nowhere: no such folder; must be" in refusal(tmp_path / "nowhere", tmp_path / "out")
    for path in folder.glob("model*"):
        path.unlink()
    assert "holds neither model.safetensors.index.json" in refusal(folder, tmp_path / "out")
    (folder / CONFIG).unlink()
    assert "hf: holds no config.json; must be" in refusal(folder, tmp_path / "out")


def test_the_checkpoints_of_a_run_are_no_place(
    folder: Path, tmp_path: Path, config: RunConfig
) -> None:
    checkpoints = config.run.checkpoint_folder
    before = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")}
    assert f"{checkpoints}: is there already; give another folder" in refusal(folder, checkpoints)
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")} == before


def test_a_disk_that_fills_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    with files_up_to(50_000):
        told = refusal(folder, out)
    assert told == f"{out}: not written: [Errno 27] File too large; nothing is left behind"
