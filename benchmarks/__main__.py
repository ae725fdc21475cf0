"""Measure everything: full steps, growth with the number of experts, single ops."""

import argparse
import logging
import warnings

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers.utils import logging as transformers_logging

from benchmarks import report
from benchmarks.limits import limits
from benchmarks.ops import compare_ops
from benchmarks.step import compare
from benchmarks.timing import Ratio
from benchmarks.workload import workload
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed import groups as process_groups

NUM_EXPERTS = 160
SEQUENCE_LENGTH = 256
SLOW_REPEATS = 2


def main() -> None:
    """Run the parts that are asked for, all by default; prints tables and writes results/*.json."""
    parts = {"step": _step, "scaling": _scaling, "ops": _ops}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], help="default: all")
    parser.add_argument("--repeats", type=int, default=8, help="alternating runs of each")
    arguments = parser.parse_args()
    groups = _one_rank()
    for name in arguments.parts or parts:
        parts[name](groups, arguments.repeats)


def _one_rank() -> ProcessGroupCollection:
    """This process as the only rank, on one thread."""
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    cpu_ranks.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = workload(NUM_EXPERTS, SEQUENCE_LENGTH)
    return process_groups.build(config.parallel, timeout_s=60)


def _step(groups: ProcessGroupCollection, repeats: int) -> None:
    peers = ("transformers", "transformers, foreach AdamW", "megatron-core")
    results = {}
    for length, names, count in (
        (SEQUENCE_LENGTH, peers, repeats),
        (128, ("transformers", "megatron-core"), repeats),
        (1024, ("transformers", "megatron-core"), repeats),
        (SEQUENCE_LENGTH, ("transformers, eager experts",), SLOW_REPEATS),
    ):
        title = f"{NUM_EXPERTS} experts, {1024 // length} samples of {length} tokens, {count} runs"
        rows = report.step_rows(compare(NUM_EXPERTS, length, names, groups, count))
        report.print_step(title, rows)
        results[title] = rows
    headline = next(iter(results.values()))
    found = limits(NUM_EXPERTS, SEQUENCE_LENGTH, groups, headline[0].step_s.best)
    report.print_limits(found)
    print(f"\nwritten: {report.write('step', {'steps': results, 'limits': found})}")


def _scaling(groups: ProcessGroupCollection, repeats: int) -> None:
    """Cost of forward and backward as experts are added that each token uses no more of."""
    peers = ("transformers", "megatron-core")
    best: dict[str, dict[int, float]] = {}
    for num_experts in (32, 64, NUM_EXPERTS):
        times = compare(num_experts, SEQUENCE_LENGTH, peers, groups, repeats)
        for name, one in times.items():
            best.setdefault(name, {})[num_experts] = one.forward_backward.best
    print("\nforward and backward as experts are added, s (best run)")
    for name, by_experts in best.items():
        cells = "".join(f"  E={count}: {seconds:.3f}" for count, seconds in by_experts.items())
        print(f"{name:20}{cells}  growth {by_experts[NUM_EXPERTS] / by_experts[32]:.2f}x")
    print(f"\nwritten: {report.write('scaling', {'forward_backward_s': best})}")


def _ops(groups: ProcessGroupCollection, repeats: int) -> None:
    del groups
    ratios: dict[str, Ratio] = compare_ops(2 * repeats)
    print("\nforward and backward of one op: torch's way, of ours")
    for name, one in ratios.items():
        print(f"  {name:44}{report.show(one):>24}")
    print(f"\nwritten: {report.write('ops', {'of_ours': ratios})}")


if __name__ == "__main__":
    main()
