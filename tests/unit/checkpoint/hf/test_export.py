"""An exported folder is the checkpoint's weights to the bit, or it is not there."""

import json
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dsv2_train.checkpoint.disk import integrity, layout, lifecycle
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.layout import checkpoint_at
from dsv2_train.checkpoint.hf import export as module
from dsv2_train.checkpoint.hf.export import export
from dsv2_train.checkpoint.hf.intake import import_folder
from dsv2_train.checkpoint.hf.mapping.tensors import cuts
from dsv2_train.checkpoint.hf.safetensors import INDEX
from dsv2_train.checkpoint.hf.source import open_source
from dsv2_train.distributed.sharding import Piece
from tests.helpers.released import released_tensors
from tests.helpers.run import run_config
from tests.helpers.saved import files_up_to, save_weights
from tests.helpers.world import ROOT

SMALL = 100_000
COMPANIONS = {"tokenizer.json": b"{}", "generation_config.json": b"{}"}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[Piece]]:
    return save_weights(run_config(tmp_path, tmp_path / "data", "run.name=run"))


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the library reads them through the index."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    found = {}
    for name in set(weight_map.values()):
        with safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == weight_map.keys()
    return found


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_tensor_is_the_checkpoints(
    saved: tuple[Path, list[Piece]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 512)  # so that tensors take several blocks
    checkpoint, weights = saved
    source = open_source(checkpoint)
    done = export(source, tmp_path / "out", SMALL, COMPANIONS)
    found = read(tmp_path / "out")
    assert {name: tuple(each.shape) for name, each in found.items()} == released_tensors(
        source.model
    )
    whole = {piece.key: piece.data for piece in weights}
    for cut in cuts(source.model):
        expected = whole[cut.key][cut.part.offset : cut.part.offset + cut.numel]
        assert torch.equal(found[cut.part.name].flatten(), expected), cut.part.name
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.num_bytes
    assert done.num_files == len(set(index["weight_map"].values())) > 3
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "yarn", [(), ("model.yarn.factor=4", "model.yarn.original_max_position=8")]
)
def test_export_import_export_is_byte_identical(
    tmp_path: Path, dtype: torch.dtype, yarn: tuple[str, ...]
) -> None:
    config = run_config(tmp_path, tmp_path / "data", "run.name=run", *yarn)
    checkpoint, _ = save_weights(config, dtype)
    export(open_source(checkpoint), tmp_path / "first", SMALL, COMPANIONS)
    imported = open_source(import_folder(tmp_path / "first", tmp_path / "imported"))
    assert imported.model == config.model
    assert imported.companions == COMPANIONS
    export(imported, tmp_path / "second", SMALL, imported.companions)
    assert entries(tmp_path / "first") == entries(tmp_path / "second")


def test_latent_scales_go_into_the_norms(tmp_path: Path) -> None:
    scales = ("model.q_latent_scale=1.5", "model.kv_latent_scale=3.0")
    checkpoint, weights = save_weights(run_config(tmp_path, tmp_path, *scales), torch.float32)
    export(open_source(checkpoint), tmp_path / "out", SMALL, {})
    found = read(tmp_path / "out")
    whole = {piece.key: piece.data for piece in weights}
    ours = "weight/decoder.layers.1.self_attention"
    theirs = "model.layers.1.self_attn"
    scaled = found[f"{theirs}.q_a_layernorm.weight"]
    assert torch.equal(scaled, 1.5 * whole[f"{ours}.q_layernorm.weight"])
    scaled = found[f"{theirs}.kv_a_layernorm.weight"]
    assert torch.equal(scaled, 3.0 * whole[f"{ours}.kv_layernorm.weight"])


def test_a_flipped_byte_in_any_weight_is_named_and_nothing_is_left(
    saved: tuple[Path, list[Piece]], tmp_path: Path
) -> None:
    checkpoint, _ = saved
    source = open_source(checkpoint)
    file = checkpoint / layout.data_file(0)
    before = sorted(tmp_path.iterdir())
    weights = {key: one for key, one in source.manifest.tensors.items() if "weight/" in key}
    for key in list(weights)[::7]:
        position = weights[key].chunks[0].byte_offset + 5
        flip(file, position)
        with pytest.raises(CheckpointError) as error:
            export(source, tmp_path / "some" / "where", SMALL, {})
        assert f"damaged: {key}: its checksum is not the manifest's" in str(error.value)
        assert "__0_0.distcp: its CRC-32 is not the manifest's" in str(error.value)
        assert sorted(tmp_path.iterdir()) == before
        flip(file, position)
    export(source, tmp_path / "some" / "where", SMALL, {})


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


def damage(folder: Path, rng: random.Random) -> None:
    """One byte flipped, the end cut off or something added, or the file gone, of any file."""
    path = rng.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    position = rng.randrange(len(data))
    kind = rng.choice(["flip", "flip", "cut", "grow", "gone"])
    if kind == "flip":
        flip(path, position)
    elif kind == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:position] if kind == "cut" else data + b"\0")


def test_any_damage_is_refused_or_harms_no_weight(
    saved: tuple[Path, list[Piece]], tmp_path: Path
) -> None:
    export(open_source(saved[0]), tmp_path / "whole", SMALL, {})
    whole = entries(tmp_path / "whole")
    copies, out = tmp_path / "copies", tmp_path / "copies" / "out"
    refused = 0
    for seed in range(40):
        damaged = shutil.copytree(saved[0], copies / saved[0].name)
        damage(damaged, random.Random(seed))
        try:
            export(open_source(checkpoint_at(damaged)), out, SMALL, {})
            assert entries(out) == whole
        except CheckpointError as error:
            assert str(damaged) in str(error)
            assert list(copies.iterdir()) == [damaged]
            refused += 1
        shutil.rmtree(copies)
    assert refused > 30


def test_a_file_that_goes_away_meanwhile_is_one_clear_error(
    saved: tuple[Path, list[Piece]], tmp_path: Path
) -> None:
    source = open_source(saved[0])
    (saved[0] / layout.data_file(0)).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000005: __0_0.distcp: missing"):
        export(source, tmp_path / "out", SMALL, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [layout.CONFIG, layout.MANIFEST, layout.data_file(0)])
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    saved: tuple[Path, list[Piece]], name: str, damage: Callable[[Path], None]
) -> None:
    damage(saved[0] / name)
    with pytest.raises(CheckpointError, match=name):
        open_source(saved[0])


def test_what_cannot_be_read_is_a_line(saved: tuple[Path, list[Piece]]) -> None:
    (saved[0] / layout.MANIFEST).unlink()
    (saved[0] / layout.MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=r"step_00000005: manifest.json: missing"):
        open_source(saved[0])


def test_a_configuration_that_cannot_be_used_is_told_with_its_file(
    saved: tuple[Path, list[Piece]],
) -> None:
    text = (saved[0] / layout.CONFIG).read_text().replace("num_layers:", "num_layer:")
    rewrite(saved[0], {layout.CONFIG: text.encode()})
    with pytest.raises(CheckpointError) as error:
        open_source(saved[0])
    told = str(error.value)
    assert told.startswith(f"{saved[0] / layout.CONFIG}: 2 configuration problems:\n")
    assert "model.num_layers: found None; required" in told


def test_weights_of_another_model_are_refused_with_every_difference(tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path, "run.name=run")
    other = config.model.model_copy(update={"num_layers": 5, "kv_lora_rank": 32, "vocab_size": 99})
    checkpoint, _ = save_weights(config.model_copy(update={"model": other}))
    path = checkpoint / layout.CONFIG
    text = path.read_text().replace("num_layers: 5", "num_layers: 4")
    text = text.replace("kv_lora_rank: 32", "kv_lora_rank: 16")
    rewrite(checkpoint, {layout.CONFIG: text.encode()})
    with pytest.raises(CheckpointError) as error:
        open_source(checkpoint)
    told = str(error.value)
    assert "differences between its weights and the model of its config.yaml" in told
    assert "weight/decoder.layers.4.input_layernorm.weight: not in the model" in told
    kv = "weight/decoder.layers.0.self_attention.kv_layernorm.weight"
    assert f"{kv}: found (32,); the model has (16,)" in told
    assert "embedding" not in told


def rewrite(checkpoint: Path, contents: dict[str, bytes]) -> None:
    """Small files of a checkpoint with other contents, in order as if they were written so."""
    manifest, _ = integrity.open_verified(checkpoint)
    kept = {name: each for name, each in manifest.files.items() if name not in contents}
    temporary = checkpoint.with_name(".tmp_" + checkpoint.name)
    shutil.move(checkpoint, temporary)
    for name in (*contents, layout.MANIFEST, layout.MARKER):
        (temporary / name).unlink()
    lifecycle.finalize_folder(temporary, replace(manifest, files=kept), contents)


@pytest.mark.parametrize("there", ["a file in it", "a file"])
def test_a_target_that_is_there_is_refused_and_kept(
    saved: tuple[Path, list[Piece]], tmp_path: Path, there: str
) -> None:
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").touch()
    with pytest.raises(CheckpointError, match="out: is there already; give another folder"):
        export(open_source(saved[0]), out, SMALL, {})
    assert out.is_file() or [path.name for path in out.iterdir()] == ["mine"]


def test_a_disk_that_fills_leaves_nothing(saved: tuple[Path, list[Piece]], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "new" / "out"
    with files_up_to(SMALL // 2), pytest.raises(CheckpointError) as error:
        export(open_source(saved[0]), out, SMALL, {})
    assert str(error.value) == (
        f"{out}: not written: [Errno 27] File too large; nothing is left behind"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_exporting_never_unpickles(
    saved: tuple[Path, list[Piece]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled something")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    export(open_source(saved[0]), tmp_path / "out", SMALL, {})


def test_a_run_its_checkpoints_and_one_of_them_are_found(
    saved: tuple[Path, list[Piece]], tmp_path: Path
) -> None:
    checkpoint, _ = saved
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", checkpoint):
        assert checkpoint_at(path) == checkpoint
    with pytest.raises(CheckpointError, match="nowhere: no such folder; must be a run folder"):
        checkpoint_at(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint_at(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be read: .* File name too long"):
        checkpoint_at(tmp_path / ("x" * 300))


GROWTH = """
import resource, sys
from pathlib import Path
from dsv2_train.checkpoint.hf import export, intake, source
root = Path(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
source.open_source(root / sys.argv[2])
intake.BLOCK_BYTES = 4 << 20
before = peak()
export.export(source.open_source(root / sys.argv[2]), root / "out", 10**9, {})
exported = peak()
intake.import_folder(root / "out", root / "imported")
print(exported - before, peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """190 MiB of weights, 64 MiB in the largest tensor: blocks of 4 MiB, and 64 in flight."""
    sizes = ("model.vocab_size=65536", "model.hidden_size=256", "model.intermediate_size=20480")
    checkpoint, weights = save_weights(run_config(tmp_path, tmp_path, *sizes), torch.float32)
    assert sum(piece.data.nbytes for piece in weights) > 190 << 20
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), str(checkpoint)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    exported_mib, imported_mib = map(int, done.stdout.split())
    assert exported_mib < 32
    assert imported_mib < 128
    shutil.rmtree(tmp_path)
