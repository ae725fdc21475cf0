"""A Hugging Face folder as it is found: safetensors only, a pickle is never opened."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsv2_train.checkpoint.dcp.coverage import listing
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.hf.mapping.config import CONFIG
from dsv2_train.checkpoint.hf.mapping.tensors import cuts
from dsv2_train.checkpoint.hf.safetensors import DTYPES, INDEX, StoredTensor, read_header
from dsv2_train.config.sections.model import ModelConfig

_SINGLE = "model.safetensors"
_ALLOWED = f"must be a Hugging Face folder: {CONFIG}, *.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        CheckpointError: if it is missing, or something else.
        OSError: if it cannot be read.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; {_ALLOWED}")
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: holds no {path.name}; {_ALLOWED}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: found {type(values).__name__}; must be an object")
    return values


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors files, by name; only their headers are read.

    Raises:
        CheckpointError: for a folder without such files, and for files that are not as the index
            says; all problems of a kind are listed.
        OSError: for what cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())):
        for tensor in read_header(folder / name):
            if tensor.name in found:
                problems.append(f"{tensor.name}: in {found[tensor.name].file.name} and in {name}")
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name and (name not in found or found[name].file.name != file):
            problems.append(f"{name}: not in {file}, where {INDEX} has it")
    if problems:
        raise CheckpointError(f"{folder}: {listing('contradictions', sorted(problems))}")
    return found


def check_tensors(folder: Path, found: dict[str, StoredTensor], model: ModelConfig) -> str:
    """Hold the tensors of a folder against those of its model.

    Returns:
        The element type of all tensors, as torch names it.

    Raises:
        CheckpointError: with every tensor that is missing, unexpected, of another shape, or of an
            element type that is not the one of all.
    """
    experts = model.num_routed_experts * (model.num_layers - model.num_dense_layers)
    if len(found) < model.num_layers + experts:  # said without making a list that knows no end
        raise CheckpointError(
            f"{folder}: holds {len(found)} tensors; the model of its {CONFIG} has more than "
            f"{model.num_layers + experts}"
        )
    shapes = {cut.part.name: cut.part.shape for cut in cuts(model)}
    problems = [f"{name}: missing" for name in shapes.keys() - found.keys()]
    problems += [f"{name}: not in the model" for name in found.keys() - shapes.keys()]
    problems += [
        f"{name}: found {tensor.shape}; the model of {CONFIG} has {shapes[name]}"
        for name, tensor in found.items()
        if tensor.shape != shapes.get(name, tensor.shape)
    ]
    names = {stored: name for name, stored in DTYPES.items()}
    dtypes = sorted({tensor.dtype for tensor in found.values()})
    if len(dtypes) != 1 or dtypes[0] not in names:
        allowed = " or ".join(names)
        problems.append(f"element types: found {', '.join(dtypes)}; must be {allowed}, for all")
    if problems:
        what = f"differences between its tensors and the model of its {CONFIG}"
        raise CheckpointError(f"{folder}: {listing(what, sorted(problems))}")
    return names[dtypes[0]]


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor, as the index says; without one, the single file under an empty name."""
    if not (folder / INDEX).exists():
        if (folder / _SINGLE).is_file():
            return {"": _SINGLE}
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: weight_map: must name the file of every tensor")
    problems = sorted(set(_file_problems(folder, weight_map.values())))
    if problems:
        raise CheckpointError(f"{folder / INDEX}: {listing('files that cannot be used', problems)}")
    return weight_map


def _file_problems(folder: Path, names: Iterable[object]) -> Iterator[str]:
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            yield f"{name!r}: must be a file of this folder"
        elif not name.endswith(".safetensors"):
            yield f"{name}: must be safetensors; a pickle is never opened, it can run any code"
        elif not (folder / name).is_file():
            yield f"{name}: missing"


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return f"{folder}: holds neither {INDEX} nor {_SINGLE}"
    return (
        f"{folder}: holds no safetensors but {', '.join(pickles[:5])}: a pickle is never opened, "
        "it can run any code; have its author save it as safetensors"
    )
