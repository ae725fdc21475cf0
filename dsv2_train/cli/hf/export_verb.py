"""`dsv2 export`: a checkpoint -> a Hugging Face folder."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from dsv2_train.checkpoint.disk.errors import CheckpointError, TargetError
from dsv2_train.checkpoint.disk.layout import checkpoint_at
from dsv2_train.checkpoint.hf.export import as_json, export
from dsv2_train.checkpoint.hf.mapping.config import Facts
from dsv2_train.checkpoint.hf.source import Source, open_source
from dsv2_train.data.manifest import DataError, read_manifest
from dsv2_train.data.tokenizer import hugging_face_files

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "Write safetensors, index, config.json and tokenizer that transformers loads. Needs no GPU "
        "and 300 MiB of memory, whatever the model's size; every tensor is verified on the way."
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest) or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--shard-size", type=_num_bytes, default="5GB", help="of a file (default %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, help="data folder whose tokenizer goes along (the run's by default)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and tell what is in it.

    Raises:
        CheckpointError: for a checkpoint that is damaged or whose configuration cannot be used, a
            target that is there or cannot hold it.
        DataError: for a --data that cannot be used.
    """
    source = open_source(checkpoint_at(arguments.checkpoint))
    source, companions, told = _with_companions(source, arguments.data)
    try:
        done = export(source, arguments.out, arguments.shard_size, companions)
    except TargetError as error:
        raise CheckpointError(f"--out {error}") from error
    files = "one file" if done.num_files == 1 else f"{done.num_files:,} files"
    print(
        f"{arguments.out}: {source.path} as Hugging Face has it\n"
        f"  {done.num_tensors:,} tensors of {source.dtype}, {done.num_bytes:,} bytes in "
        f"{files}, each equal to its checksum\n"
        f"  {told}"
    )
    return 0


def _with_companions(
    source: Source, data_folder: Path | None
) -> tuple[Source, dict[str, bytes], str]:
    """The source with what the tokenizer tells, the files to go along, and what to say of them."""
    if data_folder is None and source.data_folder is None:
        told = ", ".join(source.companions) or "no tokenizer"
        return source, source.companions, f"as imported: {told}"
    folder = data_folder or source.data_folder
    assert folder is not None
    try:
        if data_folder is None:
            _require_same_corpus(source, folder)
        facts, files = _tokenizer(source, folder)
    except DataError as error:
        if data_folder is not None:
            raise
        return source, {}, f"no tokenizer, bos and eos null: {error}\n  or give --data FOLDER"
    ids = {"bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id}
    files["generation_config.json"] = as_json(ids)
    return replace(source, facts=facts), files, f"tokenizer of {folder}"


def _require_same_corpus(source: Source, folder: Path) -> None:
    """See that a data folder was not prepared anew, with another tokenizer, since the training."""
    now = read_manifest(folder).splits["train"].bin.sha256
    if source.corpus not in (None, now):
        raise DataError(
            f"{folder}: the model was trained on a train.bin with SHA-256 {source.corpus:.16}..., "
            f"and this one has {now[:16]}...: its tokenizer may be another"
        )


def _tokenizer(source: Source, folder: Path) -> tuple[Facts, dict[str, bytes]]:
    record, files = hugging_face_files(folder, source.facts.max_position)
    if record.vocab_size > source.model.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer has {record.vocab_size} tokens, the model "
            f"{source.model.vocab_size}: it is not what the model was trained with"
        )
    return replace(source.facts, bos_id=record.bos_id, eos_id=record.eos_id), files


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be a size, for instance 5GB")
    return value
