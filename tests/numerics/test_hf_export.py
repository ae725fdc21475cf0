"""What leaves a trained run, from any layout, is the model that transformers loads."""

import json
from pathlib import Path

import pytest
import torch

from dsv2_train.checkpoint.disk.layout import latest_complete
from dsv2_train.checkpoint.hf.intake import import_folder
from dsv2_train.checkpoint.hf.mapping.config import Facts, config_of
from dsv2_train.cli.main import main
from dsv2_train.config.run import RunConfig
from dsv2_train.data.tokenizer import EOS_TOKEN, hugging_face_files, load_tokenizer
from dsv2_train.train.loop import train
from tests.helpers.corpus import synthetic_folder, write_texts
from tests.helpers.model import logits_of
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.world import World

# As in test_hf_parity.
TOLERANCE = 1e-5

# Weights large enough that attention, routing and YaRN decide something after two steps.
SHARP = ("model.init_std=0.15", "recipe.num_steps=2", "recipe.eval_every_steps=2")
PLAIN: tuple[str, ...] = ()
YARN = (
    "model.yarn.factor=8.0",
    "model.yarn.original_max_position=16",
    "model.rope_theta=100.0",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "DP2": (2, ()),
    "EP4": (4, ("parallel.ep=4",)),
    "PP2 DP2": (4, ("parallel.pp=2",)),
    "PP2 EP2": (4, ("parallel.pp=2", "parallel.ep=2")),
    "PP4": (4, ("parallel.pp=4",)),
    "PP2 zb_v": (2, ("parallel.pp=2", "parallel.schedule=zb_v", "parallel.chunks=2")),
}


def _train(rank: int, config: RunConfig) -> None:
    run = open_run(rank, config)
    train(run)
    close_run(run)


def _differences(rank: int, config: RunConfig, folder: Path) -> tuple[float, float]:
    """What transformers makes of a folder, against a run of one rank or another layout.

    Returns:
        Largest difference of logits from those of the run's newest checkpoint, restored on one
        rank, over their scale; difference of the loss from what the run itself told of its last
        step, at its layout, on the same validation samples, over that loss.
    """
    # Seconds to import, and only the ranks of this test need it.
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    run = open_run(rank, config)
    windows = run.validation_split.windows[: config.recipe.eval_num_samples].astype("int64")
    samples = torch.from_numpy(windows)
    ours = logits_of(run.chunks[0].module.eval(), samples[:, :-1])
    close_run(run)
    with torch.no_grad():
        expected = theirs(samples[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), samples[:, 1:].flatten())
    last = (config.run.folder / "metrics.jsonl").read_text().splitlines()[-1]
    told = json.loads(last)["eval/loss"]
    difference = (ours - expected).abs().max() / expected.abs().max()
    return float(difference), abs(loss.item() - told) / told


def _exported(world: World, tmp_path: Path, layout: str, yarn: tuple[str, ...]) -> RunConfig:
    """A run at a layout, exported; its configuration on one rank."""
    data = synthetic_folder(tmp_path / "data")
    size, overrides = LAYOUTS[layout]
    world_size = (f"parallel.world_size={size}", *overrides)
    world.run(_train, size, run_config(tmp_path, data, "run.name=run", *SHARP, *yarn, *world_size))
    words = [str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--shard-size", "100KB"]
    assert main(["export", *words]) == 0
    return run_config(tmp_path, data, "run.name=run", *SHARP, *yarn)


@pytest.mark.parametrize("yarn", [PLAIN, YARN], ids=["4K", "YaRN"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_loss_of_an_exported_run_equal_ours(
    world: World, tmp_path: Path, layout: str, yarn: tuple[str, ...]
) -> None:
    single = _exported(world, tmp_path, layout, yarn)
    [differences] = world.run(_differences, 1, single, tmp_path / "hf")
    assert max(differences) < TOLERANCE


def test_a_wrong_stage_is_another_model(world: World, tmp_path: Path) -> None:
    """The comparison sees a YaRN block that is left out, and a weight that is not the run's."""
    single = _exported(world, tmp_path, "one rank", YARN)
    path = tmp_path / "hf" / "config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"rope_scaling": None}))
    [differences] = world.run(_differences, 1, single, tmp_path / "hf")
    assert min(differences) > 10 * TOLERANCE
    path.write_text(text)
    shard = min((tmp_path / "hf").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-401:] = bytes(401)
    shard.write_bytes(data)
    [differences] = world.run(_differences, 1, single, tmp_path / "hf")
    assert min(differences) > 10 * TOLERANCE


def _save_again(rank: int, folder: Path, out: Path) -> tuple[int, torch.dtype]:
    """Have transformers load a folder and save it; end of sentence and dtype as it sees them."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    assert rank == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(out)
    return model.generation_config.eos_token_id, model.dtype


def test_what_transformers_saves_again_is_imported(world: World, tmp_path: Path) -> None:
    _exported(world, tmp_path, "one rank", YARN)
    seen = world.run(_save_again, 1, tmp_path / "hf", tmp_path / "again")
    assert seen == [(1, torch.float32)]
    ours = import_folder(tmp_path / "hf", tmp_path / "a")
    theirs = import_folder(tmp_path / "again", tmp_path / "b")
    assert latest_complete(tmp_path / "b") == theirs
    assert (ours / "config.yaml").read_text() == (theirs / "config.yaml").read_text()
    found = [json.loads((path / "manifest.json").read_text())["tensors"] for path in (ours, theirs)]
    checksums = [{key: entry["checksum"] for key, entry in each.items()} for each in found]
    assert checksums[0] == checksums[1]


TEXT = f"x = 12345;  caf\u00e9 \u6f22\u5b57\n\n\tdef f(): {EOS_TOKEN}"


def _tokenize(rank: int, folder: Path) -> tuple[list[int], str, int, int]:
    from transformers import AutoTokenizer  # noqa: PLC0415

    assert rank == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT, split_special_tokens=True)
    return ids, tokenizer.decode(ids), tokenizer.bos_token_id, tokenizer.eos_token_id


def test_transformers_tokenizes_as_the_corpus_was(world: World, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    words = ["--source", str(tmp_path / "texts"), "--out", str(tmp_path / "data")]
    assert main(["prepare", *words, "--vocab-size", "400", "--workers", "1"]) == 0
    record, files = hugging_face_files(tmp_path / "data", max_length=4096)
    for name, content in files.items():
        (tmp_path / "hf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(content)
    config = config_of(run_config(tmp_path, tmp_path).model, Facts(4096), "float32")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path / "data" / "tokenizer.json")
    expected = ours.encode(TEXT, add_special_tokens=False).ids
    [seen] = world.run(_tokenize, 1, tmp_path / "hf")
    assert seen == (expected, TEXT, record.bos_id, record.eos_id)
