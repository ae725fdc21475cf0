"""A checkpoint of ours, seen as the Hugging Face model it is."""

import json
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import listing
from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.hf.mapping.config import CONFIG, Facts, longest_sequence, model_of
from dsv2_train.checkpoint.hf.mapping.tensors import WEIGHT, Cut, cuts
from dsv2_train.checkpoint.hf.safetensors import DTYPES
from dsv2_train.config.load import check, check_model, read_values
from dsv2_train.config.problems import ConfigError
from dsv2_train.config.sections.model import ModelConfig

# What a Hugging Face folder holds beside weights and config.json, and goes along both ways.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint whose weights are exactly those of its model.

    Attributes:
        path: its folder.
        manifest: its contents.
        model: the architecture.
        dtype: element type of all weights, as torch names it.
        facts: what config.json tells besides.
        data_folder: what the run was trained on; None for weights that were imported.
        corpus: SHA-256 of the token stream in it at that time; None where it is not known.
        companions: the files that came with imported weights, by name.
    """

    path: Path
    manifest: Manifest
    model: ModelConfig
    dtype: str
    facts: Facts
    data_folder: Path | None
    corpus: str | None
    companions: dict[str, bytes]

    def cuts(self) -> list[Cut]:
        """Every Hugging Face tensor, in the order of the model."""
        return list(cuts(self.model))


def open_source(path: Path) -> Source:
    """Open a checkpoint for export; no tensor is read.

    Args:
        path: a complete checkpoint, of a run or imported.

    Raises:
        CheckpointError: for damage, for what cannot be read, for a config.yaml that cannot be used,
            and for weights that are not those of its model.
    """
    try:
        return _open(path)
    except ConfigError as error:
        raise CheckpointError(f"{path / layout.CONFIG}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> Source:
    manifest, state = open_verified(path)
    values = read_values(path / layout.CONFIG)
    model, problems = check_model(values.get("model"))
    if problems:
        raise ConfigError(problems)
    dtype = _dtype_of_weights(path, manifest, model)
    if CONFIG in manifest.files:
        _, facts = model_of(json.loads((path / CONFIG).read_bytes()), path / CONFIG)
        found = [name for name in COMPANIONS if name in manifest.files]
        companions = {name: (path / name).read_bytes() for name in found}
        return Source(path, manifest, model, dtype, facts, None, None, companions)
    config, problems = check(values)
    if problems:
        raise ConfigError(problems)
    recipe = config.recipe
    facts = Facts(
        longest_sequence(model, recipe.sequence_length),
        expert_balance_alpha=recipe.expert_balance_alpha,
        device_balance_alpha=recipe.device_balance_alpha,
        communication_balance_alpha=recipe.communication_balance_alpha,
    )
    data_folder = Path(config.data.path)
    return Source(path, manifest, model, dtype, facts, data_folder, state.corpus, {})


def _dtype_of_weights(path: Path, manifest: Manifest, model: ModelConfig) -> str:
    """Hold the weights of a checkpoint against the architecture; they have one element type."""
    wanted = {cut.key: cut.whole.shape for cut in cuts(model)}
    found = {key: one for key, one in manifest.tensors.items() if key.startswith(WEIGHT)}
    problems = [f"{key}: not in the model" for key in found.keys() - wanted.keys()]
    problems += [f"{key}: missing" for key in wanted.keys() - found.keys()]
    problems += [
        f"{key}: found {found[key].shape}; the model has {shape}"
        for key, shape in wanted.items()
        if key in found and found[key].shape != shape
    ]
    dtypes = sorted({entry.dtype for entry in found.values()})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        allowed = " or ".join(DTYPES)
        problems.append(f"element types: found {', '.join(dtypes)}; allowed: {allowed}, for all")
    if problems:
        what = f"differences between its weights and the model of its {layout.CONFIG}"
        raise CheckpointError(f"{path}: {listing(what, sorted(problems))}")
    return dtypes[0]
