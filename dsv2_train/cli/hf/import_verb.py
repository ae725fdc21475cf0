"""`dsv2 import`: a Hugging Face folder -> a checkpoint that holds weights and nothing else."""

import argparse
from pathlib import Path

from dsv2_train.checkpoint.disk.errors import CheckpointError, TargetError
from dsv2_train.checkpoint.hf.intake import import_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "Write the weights of a DeepSeek-V2 in safetensors as a checkpoint that runs of any layout "
        "start from. Needs no GPU and 200 MiB of memory. Pickles are never opened."
    )
    parser.add_argument("folder", type=Path, help="config.json and *.safetensors")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, the checkpoint is in it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint and tell where it is.

    Raises:
        CheckpointError: for a folder that cannot be used, a target that is there or cannot hold
            the weights.
    """
    try:
        path = import_folder(arguments.folder, arguments.out)
    except TargetError as error:
        raise CheckpointError(f"--out {error}") from error
    print(
        f"{path}: the weights of {arguments.folder}; no optimizer state, the clock is at zero\n"
        f"  a run of the same model begins with them: checkpoint.init_from={arguments.out}"
    )
    return 0
