"""Measure: steps, layers, ops; exchange, dropping, balance; pipelines; checkpoints; activity."""

import argparse
import functools

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers.utils import logging as transformers_logging

from benchmarks import activity, bubble, checkpoint, layers, report
from benchmarks.balance import draw, outcome, train_all
from benchmarks.dropping import BIAS_STDS, SEEDS, dropped_shares
from benchmarks.exchange import (
    COUNTED_EP,
    COUNTED_TOKENS,
    TIMED_EP,
    TIMED_TOKENS,
    count_bytes,
    time_passes,
)
from benchmarks.limits import limits
from benchmarks.op_count import count_layers
from benchmarks.ops import compare_ops
from benchmarks.pipeline import PipelineStep, compare_runtimes
from benchmarks.ranks import quiet
from benchmarks.step import compare, compare_experts
from benchmarks.workload import NUM_TOKENS, workload
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed import groups as process_groups

NUM_EXPERTS = 160
SEQUENCE_LENGTH = 256
SLOW_REPEATS = 4
CHECKPOINT_MB = 512


def main() -> None:
    """Run the parts that are asked for; prints tables and writes results/*.json."""
    parts = {
        "step": _step,
        "scaling": _scaling,
        "ops": _ops,
        "op_count": _op_count,
        "exchange": _exchange,
        "dropping": _dropping,
        "balance": _balance,
        "bubble": _bubble,
        "pipeline": _pipeline,
        "checkpoint": _checkpoint,
        "activity": _activity,
        "layers": _layers,
    }
    slow = ("balance", "bubble", "pipeline", "checkpoint", "layers")
    default = [name for name in parts if name not in slow]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[[], *parts],
        help=f"default: all but {', '.join(slow)}, which take minutes each or need a GPU",
    )
    parser.add_argument("--repeats", type=int, default=8, help="alternating runs of each")
    arguments = parser.parse_args()
    quiet()
    for name in arguments.parts or default:
        parts[name](arguments.repeats)


@functools.cache
def _one_rank() -> ProcessGroupCollection:
    """This process as the only rank, on one thread."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    cpu_ranks.install()
    # gloo for tensors of the CPU, and NCCL for those of a GPU where one is.
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    config = workload(NUM_EXPERTS, SEQUENCE_LENGTH)
    return process_groups.build(config.parallel, timeout_s=60)


def _step(repeats: int) -> None:
    groups = _one_rank()
    peers = ("transformers", "transformers, foreach AdamW", "megatron-core")
    results = {}
    for length, precision, names, count in (
        (SEQUENCE_LENGTH, "fp32", peers, repeats),
        (128, "fp32", ("transformers", "megatron-core"), repeats),
        (1024, "fp32", ("transformers", "megatron-core"), repeats),
        (SEQUENCE_LENGTH, "bf16", ("transformers",), repeats),
        (SEQUENCE_LENGTH, "fp32", ("transformers, eager experts",), SLOW_REPEATS),
    ):
        samples = f"{NUM_TOKENS // length} samples of {length} tokens"
        title = f"{NUM_EXPERTS} experts, {precision}, {samples}, {count} runs"
        config = workload(NUM_EXPERTS, length, f"recipe.precision={precision}")
        rows = report.step_rows(compare(config, names, groups, count))
        report.print_step(title, rows)
        results[title] = rows
    headline = next(iter(results.values()))
    found = limits(NUM_EXPERTS, SEQUENCE_LENGTH, groups, headline[0].step_s.best)
    report.print_limits(found)
    print(f"\nwritten: {report.write('step', {'steps': results, 'limits': found})}")


def _scaling(repeats: int) -> None:
    """Cost of forward and backward as experts are added that each token uses no more of."""
    peers = ("transformers", "megatron-core")
    sizes = (32, 64, NUM_EXPERTS)
    times = compare_experts(sizes, SEQUENCE_LENGTH, peers, _one_rank(), repeats)
    growth = report.growths(times)
    report.print_scaling(times, growth)
    result = {"forward_backward_s": times, "growth": growth}
    print(f"\nwritten: {report.write('scaling', result)}")


def _ops(repeats: int) -> None:
    _one_rank()
    ratios = compare_ops(2 * repeats)
    report.print_ops(ratios)
    print(f"\nwritten: {report.write('ops', {'of_ours': ratios})}")


def _op_count(repeats: int) -> None:
    """Ops and waits of one layer of experts; the same on every machine."""
    del repeats
    found = count_layers(NUM_EXPERTS, SEQUENCE_LENGTH, _one_rank())
    report.print_counts(found, NUM_EXPERTS)
    print(f"\nwritten: {report.write('op_count', {'layers': found})}")


def _exchange(repeats: int) -> None:
    """Bytes and time of moving tokens to their experts and back, at DeepSeek-V2's sizes."""
    counted = count_bytes()
    share = report.print_bytes(counted, f"EP {COUNTED_EP}, {COUNTED_TOKENS} tokens a rank")
    times, of_ours = time_passes(2 * repeats)
    report.print_passes(times, of_ours, f"EP {TIMED_EP} over gloo, {TIMED_TOKENS} tokens a rank")
    result = {"received": counted, "share": share, "seconds": times, "of_ours": of_ours}
    print(f"\nwritten: {report.write('exchange', result)}")


def _dropping(repeats: int) -> None:
    """Shares of assignments dropped at capacity 1.0; nothing is timed."""
    del repeats
    shares = {str(std): [dropped_shares(std, seed) for seed in SEEDS] for std in BIAS_STDS}
    report.print_dropped(shares)
    print(f"\nwritten: {report.write('dropping', {'dropped': shares})}")


def _balance(repeats: int) -> None:
    """Three trainings of the quickstart, of about two minutes each."""
    del repeats
    runs = train_all(report.RESULTS / "balance_runs")
    outcomes = {name: outcome(rows) for name, rows in runs.items()}
    report.print_outcomes(outcomes)
    picture = report.RESULTS / "balance.png"
    draw(runs, picture)
    print(f"\nwritten: {report.write('balance', {'outcomes': outcomes})}, {picture}")


def _checkpoint(repeats: int) -> None:
    """Saving and loading half a gigabyte of state, on one rank and on two."""
    found = {}
    for num_ranks in (1, 2):
        one = checkpoint.compare(num_ranks, CHECKPOINT_MB, repeats)
        checkpoint.show(one, num_ranks)
        found[f"{num_ranks} ranks"] = one
    print(f"\nwritten: {report.write('checkpoint', found)}")


def _activity(repeats: int) -> None:
    """What it costs to be watched; a second."""
    costs = activity.cost_us(repeats)
    activity.show(costs)
    print(f"\nwritten: {report.write('activity', {'us': costs})}")


def _layers(repeats: int) -> None:
    """One layer shaped as DeepSeek-V2's on a GPU, seconds each; without one, tries this program."""
    del repeats
    for found in layers.compare_all(_one_rank()):
        written = report.write("layers", found)
    print(f"\nwritten: {written}")


def _bubble(repeats: int) -> None:
    """Schedules of the pipeline, simulated: the same figures on every machine, in minutes."""
    del repeats
    tables = bubble.compare()
    bubble.show(tables)
    written = report.write("bubble", {"bubbles": tables})
    picture = written.with_name("pipeline.png")
    bubble.draw(picture)
    print(f"\nwritten: {written}, {picture}")


def _pipeline(repeats: int) -> None:
    """Runtimes of pipelines on sleeping stages; steps of 3 to 10 seconds."""
    results = {}
    for num_stages in (8, 16):
        step = PipelineStep(num_stages, 2 * num_stages)
        rows = compare_runtimes(step, max(3, repeats // 2))
        report.print_pipeline(step, rows)
        results[f"p={step.num_stages} m={step.num_microbatches}"] = {"step": step, "rows": rows}
    print(f"\nwritten: {report.write('pipeline', {'steps': results})}")


if __name__ == "__main__":
    main()
