"""What the sections of a configuration must agree on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dsv2_train.config.checks.batch import BATCH_CHECKS
from dsv2_train.config.checks.choices import working_overrides
from dsv2_train.config.checks.guards import GUARD_CHECKS
from dsv2_train.config.checks.kernels import KERNEL_CHECKS
from dsv2_train.config.checks.monitor import MONITOR_CHECKS
from dsv2_train.config.checks.pipeline import PIPELINE_CHECKS
from dsv2_train.config.problems import Check, Problem, passing_over_absent, value_at
from dsv2_train.config.run import RunConfig

# From the timeout until a hang is told and its ranks are ended.
REPORT_WITHIN_S = 10.0


def cross_check(config: RunConfig) -> list[Problem]:
    """Run every check; one that needs a field that is itself wrong (so absent) is passed over.

    The first problem with the pipeline's layout offers layouts without any such problem, and that
    bring no other.
    """
    pipeline, others = _run(PIPELINE_CHECKS, config), _run(_OTHERS, config)

    def works(changed: RunConfig) -> bool:
        if _run(PIPELINE_CHECKS, changed):
            return False
        return all(problem in others for problem in _run(_OTHERS, changed))

    if pipeline:
        pipeline[0] = replace(pipeline[0], choices=tuple(working_overrides(config, works)))
    return pipeline + others


def _run(checks: Sequence[Check], config: RunConfig) -> list[Problem]:
    return [problem for check in checks for problem in passing_over_absent(check, config)]


def _is_one(path: str) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        size = value_at(config, path)
        if size != 1:
            allowed = "must be 1: DeepSeek-V2 trains without it, and MoE gradients rely on that"
            yield Problem(path, size, allowed)

    return check


def _equal_device_groups(config: RunConfig) -> Iterator[Problem]:
    experts, groups = config.model.num_routed_experts, config.model.num_device_groups
    if experts % groups:
        allowed = f"must divide model.num_routed_experts = {experts}"
        yield Problem("model.num_device_groups", groups, allowed)


def _device_limit(config: RunConfig) -> Iterator[Problem]:
    limit, groups = config.model.num_limited_devices, config.model.num_device_groups
    if limit > groups:
        allowed = f"must be at most model.num_device_groups = {groups}"
        yield Problem("model.num_limited_devices", limit, allowed)


def _experts_within_reach(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    of_a_group, rest = divmod(model.num_routed_experts, model.num_device_groups)
    reachable = model.num_limited_devices * of_a_group
    if not rest and model.num_experts_per_tok > reachable:
        allowed = f"must be at most {reachable}, the experts of model.num_limited_devices groups"
        yield Problem("model.num_experts_per_tok", model.num_experts_per_tok, allowed)


def _expert_parallel(config: RunConfig) -> Iterator[Problem]:
    ep, groups = config.parallel.ep, config.model.num_device_groups
    if groups % ep:
        yield Problem("parallel.ep", ep, f"must divide D = model.num_device_groups = {groups}")


def _only_device_dedup(path: str, off: object, word: str) -> Check:
    """What only our dispatcher can do is off with another one."""

    def check(config: RunConfig) -> Iterator[Problem]:
        dispatcher, found = config.parallel.dispatcher, value_at(config, path)
        if dispatcher != "device_dedup" and found != off:
            why = f"parallel.dispatcher={dispatcher} cannot do it, device_dedup can"
            yield Problem(path, found, f"must be {word}: {why}")

    return check


def _rope(config: RunConfig) -> Iterator[Problem]:
    if config.model.qk_rope_head_dim % 2:
        yield Problem("model.qk_rope_head_dim", config.model.qk_rope_head_dim, "must be even")


def _skipped_ranges(config: RunConfig) -> Iterator[Problem]:
    empty = [list(one) for one in config.data.skip if one[0] >= one[1]]
    if empty:
        allowed = f"must be ranges [first, end) of samples, first < end; {empty} are not"
        yield Problem("data.skip", [list(one) for one in config.data.skip], allowed)


def _dense_layers(config: RunConfig) -> Iterator[Problem]:
    dense, layers = config.model.num_dense_layers, config.model.num_layers
    if dense > layers:
        allowed = f"must be at most model.num_layers = {layers}"
        yield Problem("model.num_dense_layers", dense, allowed)


def _recomputed_once(config: RunConfig) -> Iterator[Problem]:
    names = config.parallel.recompute
    if len(set(names)) != len(names):
        yield Problem("parallel.recompute", list(names), "must name nothing twice")


def _recompute_has_mixtures(config: RunConfig) -> Iterator[Problem]:
    model, names = config.model, config.parallel.recompute
    if "moe" in names and model.num_dense_layers >= model.num_layers:
        allowed = "must not have moe: all layers are dense (model.num_dense_layers)"
        yield Problem("parallel.recompute", list(names), allowed)


def _only_overlapped_gradients_have_buckets(config: RunConfig) -> Iterator[Problem]:
    size, overlaps = config.parallel.bucket_size, config.parallel.overlap_grad_reduce
    if size is not None and not overlaps:
        allowed = "must be null with parallel.overlap_grad_reduce=false: one reduction, one bucket"
        yield Problem("parallel.bucket_size", size, allowed)


def _only_a_pruned_run_has_exceptions(config: RunConfig) -> Iterator[Problem]:
    every, last = config.checkpoint.keep_every_steps, config.checkpoint.keep_last
    if every is not None and last is None:
        allowed = "must be null with checkpoint.keep_last=null: all are kept"
        yield Problem("checkpoint.keep_every_steps", every, allowed)


def _a_hang_is_told_before_groups_give_up(config: RunConfig) -> Iterator[Problem]:
    hang_s, group_s = config.cluster.hang_timeout_s, config.cluster.group_timeout_s
    if hang_s is not None and hang_s + REPORT_WITHIN_S > group_s:
        allowed = (
            f"must be at least {REPORT_WITHIN_S:g} s below cluster.group_timeout_s = {group_s:g}, "
            "so that a hang is told before a collective gives up; or null, not to watch"
        )
        yield Problem("cluster.hang_timeout_s", hang_s, allowed)


def _deepep_has_peers(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.dispatcher == "deepep" and config.parallel.ep == 1:
        allowed = "must be more than 1 with parallel.dispatcher=deepep: nothing travels"
        yield Problem("parallel.ep", 1, allowed)


def _deepep_has_bf16(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.dispatcher == "deepep" and config.recipe.precision != "bf16":
        allowed = "must be bf16 with parallel.dispatcher=deepep"
        yield Problem("recipe.precision", config.recipe.precision, allowed)


_OTHERS: tuple[Check, ...] = (
    _is_one("parallel.tp"),
    _is_one("parallel.cp"),
    _equal_device_groups,
    _device_limit,
    _experts_within_reach,
    _expert_parallel,
    _only_device_dedup("recipe.capacity_factor", None, "null"),
    _only_device_dedup("parallel.overlap_shared_experts", False, "false"),
    _only_overlapped_gradients_have_buckets,
    _deepep_has_peers,
    _deepep_has_bf16,
    *MONITOR_CHECKS,
    _a_hang_is_told_before_groups_give_up,
    _only_a_pruned_run_has_exceptions,
    *GUARD_CHECKS,
    *KERNEL_CHECKS,
    _recomputed_once,
    _recompute_has_mixtures,
    _rope,
    _skipped_ranges,
    _dense_layers,
    *BATCH_CHECKS,
)
