"""Folders that look like what `dsv2 prepare` and a run leave, without their content."""

from collections.abc import Mapping
from pathlib import Path

from dsv2_train.checkpoint.disk import layout, lifecycle
from dsv2_train.checkpoint.disk import manifest as manifests
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.config.load import to_yaml
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import (
    Manifest,
    SplitRecord,
    TokenizerRecord,
    describe_file,
    write_manifest,
)
from dsv2_train.recipe.clock import Schedule


def write_data_folder(folder: Path, vocab_size: int) -> None:
    """A data folder with the right names, sizes and checksums."""
    folder.mkdir(parents=True)
    num_tokens = 1_000_000

    def split(name: str) -> SplitRecord:
        (folder / f"{name}.bin").write_bytes(bytes(2 * num_tokens))
        (folder / f"{name}.idx").write_bytes(b"no index")
        return SplitRecord(
            bin=describe_file(folder / f"{name}.bin"),
            idx=describe_file(folder / f"{name}.idx"),
            dtype="uint16",
            num_documents=10,
            num_tokens=num_tokens,
            text_bytes=3_000_000,
        )

    (folder / "tokenizer.json").write_text("{}")
    tokenizer = TokenizerRecord(describe_file(folder / "tokenizer.json"), vocab_size, 0, 1)
    splits = {name: split(name) for name in ("train", "validation")}
    write_manifest(folder, Manifest("test", {}, tokenizer, splits, {}))


def write_checkpoint(config: RunConfig, step: int, data: Mapping[str, bytes] | None = None) -> Path:
    """A run folder's complete checkpoint of a run from its beginning, without tensors."""
    schedule = Schedule(config.recipe, config.optim)
    clock = schedule.clock_at_step(step)
    state = TrainState(step, clock.consumed_samples, schedule.consumed_tokens(clock), step)
    contents = {layout.CONFIG: to_yaml(config).encode(), layout.STATE: state.to_json().encode()}
    contents |= data or {}
    temporary = lifecycle.start_folder(config.run.checkpoint_folder, step)
    return lifecycle.finalize_folder(temporary, manifests.Manifest(step, {}, {}), contents)
