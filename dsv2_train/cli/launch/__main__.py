"""`python -m dsv2_train.cli.launch`: overrides -> one run, or a sweep of runs, on this node."""

import argparse
import sys
from collections.abc import Iterator, Sequence

from dsv2_train.cli.launch.place import Place, on_nodes
from dsv2_train.cli.launch.start import start
from dsv2_train.cli.launch.sweep import named_runs
from dsv2_train.cli.launch.torchrun import Outcome
from dsv2_train.cli.main import report_errors
from dsv2_train.cli.resolve import examine, resolve
from dsv2_train.cli.run_folder.inspect import inspect
from dsv2_train.cli.run_folder.launch import Launch
from dsv2_train.config.load import to_yaml
from dsv2_train.config.problems import ConfigError, Problem

EXAMPLES = """\
examples:
  launch/local.sh experiment=quickstart
  launch/local.sh experiment=quickstart parallel.pp=4 parallel.ep=1 run.name=pp4
  launch/local.sh experiment=quickstart --cfg job
  launch/local.sh -m experiment=quickstart optim.lr=1e-3,3e-3 recipe.num_steps=100

A run that was stopped goes on from its newest checkpoint when the same line is given again.
Exit status: 0 done or stopped cleanly, 2 for a configuration, data or checkpoints that cannot be
used, 1 otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch what the command line asks for; returns the exit status."""
    parsed = _parser().parse_intermixed_args(arguments)
    return report_errors(lambda: _launch(parsed))


def _launch(arguments: argparse.Namespace) -> int:
    combinations = [list(arguments.overrides)]
    if arguments.multirun:
        combinations = named_runs(arguments.overrides)
    if arguments.cfg:
        configs = [to_yaml(resolve(overrides, need_data=False)) for overrides in combinations]
        print("---\n".join(configs), end="")
        return 0
    if problems := list(_misplaced(arguments)):
        raise ConfigError(problems)
    launches = _check_all(combinations, arguments.nodes)
    for number, launch in enumerate(launches, start=1):
        if launch.is_finished:
            print(launch.describe(), flush=True)
            continue
        outcome = _run(launch, arguments)
        if outcome.status != 0 or outcome.was_stopped:
            not_started = [later.config.run.name for later in launches[number:]]
            if not_started:
                print(f"not started: {', '.join(not_started)}", file=sys.stderr)
            return outcome.status
    return 0


def _run(launch: Launch, arguments: argparse.Namespace) -> Outcome:
    if arguments.nodes == 1:
        return start(launch, Place(), launch.next_log_dir())
    node, name = arguments.node_rank, launch.config.run.name
    place = Place(arguments.nodes, node, arguments.endpoint, name)
    return start(launch, place, launch.next_log_dir(f"node_{node}"))


def _misplaced(arguments: argparse.Namespace) -> Iterator[Problem]:
    nodes, rank, endpoint = arguments.nodes, arguments.node_rank, arguments.endpoint
    if nodes < 1:
        yield Problem("--nodes", nodes, "must be at least 1")
    elif not 0 <= rank < nodes:
        yield Problem("--node-rank", rank, f"must be 0 to {nodes - 1}, another one on each node")
    host, _, port = endpoint.rpartition(":")
    if nodes > 1 and not (host and port.isdecimal()):
        allowed = "must be HOST:PORT, a host that all nodes know node 0 by and a free port of it"
        yield Problem("--endpoint", endpoint, allowed)


def _check_all(combinations: Sequence[Sequence[str]], num_nodes: int) -> list[Launch]:
    """Check every combination before the first one starts."""
    launches: list[Launch] = []
    problems: dict[str, Problem] = {}
    for overrides in combinations:
        try:
            found = examine(overrides, need_data=True)
            command = ["launch/local.sh", *overrides]
            launches.append(inspect(*found, command, on_nodes(num_nodes)))
        except ConfigError as error:
            problems.update({str(problem): problem for problem in error.problems})
    folders = [str(launch.config.run.folder) for launch in launches]
    for folder in sorted({folder for folder in folders if folders.count(folder) > 1}):
        problem = Problem("run.name", folder, "two runs of this sweep would write to this folder")
        problems[str(problem)] = problem
    if problems:
        raise ConfigError(list(problems.values()))
    return launches


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/local.sh",
        description="Check a configuration, then train on this node, one process a rank.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--cfg", choices=["job"], help="print the resolved configuration and end")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="run every combination of key=a,b in turn"
    )
    several = parser.add_argument_group("several nodes (launch/multinode.sh gives these)")
    several.add_argument("--nodes", type=int, default=1, help="how many, alike")
    several.add_argument("--node-rank", type=int, default=0, help="which one this is, from 0")
    several.add_argument("--endpoint", default="", metavar="HOST:PORT", help="where node 0 listens")
    return parser


if __name__ == "__main__":
    sys.exit(main())
