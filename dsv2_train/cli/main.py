"""The console script `dsv2`: one verb, one module, imported only when it is asked for."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dsv2_train.checkpoint.disk.layout import CheckpointError
from dsv2_train.config.problems import ConfigError
from dsv2_train.data.manifest import DataError

VERBS = {
    "prepare": "turn text into a data folder: tokenizer, .bin/.idx, manifest",
    "validate": "check a configuration and its data, start nothing",
    "plan": "what a run costs and where everything is, without a GPU",
    "train": "one rank of a run; launch/local.sh starts them all",
    "export": "a checkpoint becomes a Hugging Face folder",
    "import": "a Hugging Face folder becomes a checkpoint of weights",
}
# A verb's module has its name, unless it is told here.
_MODULES = {"export": "hf.export_verb", "import": "hf.import_verb"}

EXIT_FAILED = 1
EXIT_CONFIG_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: the verb and what is for it; the command line's if None.

    Returns:
        Exit status: 0 done, 2 for a configuration, data or a checkpoint that cannot be used, 1
        otherwise.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    verb, rest = words[:1], words[1:]
    if not verb or verb[0] not in VERBS:
        _top_level_parser().parse_args(verb or ["--help"])
    return report_errors(lambda: _run_verb(verb[0], rest))


def report_errors(run: Callable[[], int]) -> int:
    """Call `run` and turn what ends it early into an exit status and a line for people.

    A ConfigError, DataError or CheckpointError is printed without a traceback; any other error
    keeps its traceback.
    """
    try:
        return run()
    except (ConfigError, DataError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _run_verb(verb: str, rest: list[str]) -> int:
    module = importlib.import_module(f"dsv2_train.cli.{_MODULES.get(verb, verb)}")
    parser = argparse.ArgumentParser(prog=f"dsv2 {verb}", description=VERBS[verb])
    module.add_arguments(parser)
    status: int = module.run(parser.parse_intermixed_args(rest))
    return status


def _top_level_parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="dsv2",
        description="Pretrain DeepSeek-V2-style models on megatron-core.",
        epilog=f"verbs (dsv2 VERB --help tells more):\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=sorted(VERBS), metavar="VERB", help="what to do")
    return parser


if __name__ == "__main__":
    sys.exit(main())
