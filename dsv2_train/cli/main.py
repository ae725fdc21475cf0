"""The console script `dsv2`: one verb, one module, imported only when it is asked for."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.config.problems import ConfigError
from dsv2_train.data.manifest import DataError
from dsv2_train.runs.attempts import CrashLoopError

VERBS = {
    "prepare": "turn text into a data folder: tokenizer, .bin/.idx, manifest",
    "validate": "check a configuration and its data, start nothing",
    "plan": "what a run costs and where everything is, without a GPU",
    "preflight": "is this node fit for a run? versions, devices, links, disk, clocks",
    "train": "one rank of a run; launch/local.sh starts them all",
    "export": "a checkpoint becomes a Hugging Face folder",
    "import": "a Hugging Face folder becomes a checkpoint of weights",
    "checkpoint ls": "the checkpoints of a run",
    "checkpoint verify": "is every byte as it was written?",
    "checkpoint prune": "remove those that are not to be kept",
    "checkpoint diff": "what differs between two: config, clock, tensors",
}
# A verb's module has its words for a name, unless it is told here.
_MODULES = {"preflight": "preflight.verb", "export": "hf.export_verb", "import": "hf.import_verb"}

EXIT_FAILED = 1
EXIT_CONFIG_ERROR = 2
EXIT_STOPPED = 3  # under Slurm: cleanly, before the end of the run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: the verb and what is for it; the command line's if None.

    Returns:
        Exit status: 0 done, 2 for a configuration, data or a checkpoint that cannot be used, 1
        otherwise.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    verb = _verb_of(words)
    return report_errors(lambda: _run_verb(verb, words[len(verb.split()) :]))


def report_errors(run: Callable[[], int]) -> int:
    """Call `run` and turn what ends it early into an exit status and a line for people.

    A ConfigError, DataError, CheckpointError or CrashLoopError is printed without a traceback; any
    other error keeps its traceback. Characters that the terminal does not have are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return run()
    except (ConfigError, DataError, CheckpointError, CrashLoopError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _verb_of(words: list[str]) -> str:
    """The verb that words begin with; without one, help or a refusal ends the program."""
    for verb in VERBS:
        if words[: len(verb.split())] == verb.split():
            return verb
    parser = _top_level_parser()
    if not words or {"-h", "--help"} & set(words):
        parser.print_help()
        parser.exit()
    parser.error(f"found {' '.join(words[:2])!r}; must begin with one of {', '.join(VERBS)}")


def _run_verb(verb: str, rest: list[str]) -> int:
    name = _MODULES.get(verb, verb.replace(" ", "."))
    module = importlib.import_module(f"dsv2_train.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"dsv2 {verb}", description=VERBS[verb])
    module.add_arguments(parser)
    status: int = module.run(parser.parse_intermixed_args(rest))
    return status


def _top_level_parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<18} {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="dsv2",
        description="Pretrain DeepSeek-V2-style models on megatron-core.",
        epilog=f"verbs (dsv2 VERB --help tells more):\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", help="what to do")
    return parser


if __name__ == "__main__":
    sys.exit(main())
