import pytest

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.checks import all as checks
from dsv2_train.config.checks.pipeline import PIPELINE_CHECKS
from dsv2_train.config.load import check
from dsv2_train.config.problems import Problem, passing_over_absent
from dsv2_train.config.section import Absent


def problems_of(*overrides: str) -> list[Problem]:
    values, problems = compose_values(["experiment=quickstart", *overrides])
    assert not problems
    return check(values)[1]


def paths_of(*overrides: str) -> list[str]:
    return [problem.path for problem in problems_of(*overrides)]


DISAGREEING = [
    (["parallel.tp=2"], "parallel.tp"),
    (["parallel.cp=2"], "parallel.cp"),
    (["parallel.world_size=6"], "parallel.world_size"),
    (["parallel.ep=4", "parallel.pp=1", "model.num_device_groups=66"], "parallel.ep"),
    (["model.num_device_groups=5"], "model.num_device_groups"),
    (["parallel.routing=kernel", "model.num_device_groups=65"], "model.num_device_groups"),
    (["model.num_limited_devices=9"], "model.num_limited_devices"),
    (["model.num_experts_per_tok=17"], "model.num_experts_per_tok"),
    (["model.qk_rope_head_dim=15"], "model.qk_rope_head_dim"),
    (["model.num_dense_layers=5"], "model.num_dense_layers"),
    (["data.skip=[[8,16],[20,20]]"], "data.skip"),
    (["data.skip=[[16,8]]"], "data.skip"),
    ([f"data.skip=[[8,{2**62}]]"], "data.skip.0.1"),
    (
        ["checkpoint.keep_last=null", "checkpoint.keep_every_steps=100"],
        "checkpoint.keep_every_steps",
    ),
    (["guards.spike.window=64"], "guards.spike.window"),
    (["guards.spike.factor=4"], "guards.spike.factor"),
    (
        ["guards.spike.action=skip", "guards.spike.offending_steps=2"],
        "guards.spike.offending_steps",
    ),
    (["parallel.pp=8", "parallel.world_size=16"], "parallel.pp"),
    (["parallel.layers_per_chunk=[2,1]"], "parallel.layers_per_chunk"),
    (["parallel.layers_per_chunk=[2,1,1]"], "parallel.layers_per_chunk"),
    (["cluster.group_timeout_s=609"], "cluster.hang_timeout_s"),
    (["recipe.num_steps=null"], "recipe.num_steps"),
    (["recipe.decay_at=[0.9,0.6]"], "recipe.decay_at"),
    (["recipe.decay_at=[0.6,0.6]"], "recipe.decay_at"),
    (["recipe.global_batch_size=18"], "recipe.global_batch_size"),
    (["recipe.eval_num_samples=66"], "recipe.eval_num_samples"),
    (
        ["recipe.batch_ramp={start_batch_size:6,ramp_tokens:9,multiple_of:4}"],
        "recipe.batch_ramp.start_batch_size",
    ),
    (
        ["recipe.batch_ramp={start_batch_size:32,ramp_tokens:9,multiple_of:4}"],
        "recipe.batch_ramp.start_batch_size",
    ),
    (
        ["recipe.batch_ramp={start_batch_size:4,ramp_tokens:9,multiple_of:6}"],
        "recipe.batch_ramp.multiple_of",
    ),
    (
        ["model.yarn={factor:2,original_max_position:64}"],
        "recipe.sequence_length",
    ),
    (
        ["parallel.dispatcher=megatron_alltoall", "parallel.overlap_shared_experts=true"],
        "parallel.overlap_shared_experts",
    ),
    (
        ["parallel.dispatcher=deepep", "recipe.capacity_factor=1.0"],
        "recipe.capacity_factor",
    ),
    (["parallel.schedule=zb_v"], "parallel.chunks"),
    (["parallel.chunks=2"], "parallel.chunks"),
    (["parallel.schedule=interleaved", "parallel.chunks=4"], "parallel.chunks"),
    (
        ["parallel.schedule=zb_v", "parallel.chunks=2", "parallel.pp=1", "parallel.ep=4"],
        "parallel.chunks",
    ),
    (
        ["parallel.bucket_size=1000", "parallel.overlap_grad_reduce=false"],
        "parallel.bucket_size",
    ),
    (["monitor.profile.torch_ranks=[1]"], "monitor.profile.torch_ranks"),
    (["monitor.profile.timeline_steps=[3,9999]"], "monitor.profile.timeline_steps"),
    (
        ["monitor.profile.torch_first_step=9999", "monitor.profile.torch_last_step=9999"],
        "monitor.profile.torch_first_step",
    ),
    (["parallel.permute=kernel", "recipe.precision=fp64"], "parallel.permute"),
    (["parallel.permute=kernel", "model.hidden_size=130"], "model.hidden_size"),
    (
        ["parallel.activation=kernel", "model.moe_intermediate_size=90"],
        "model.moe_intermediate_size",
    ),
    (["parallel.rope=kernel", "model.v_head_dim=30"], "model.v_head_dim"),
    (["parallel.experts=kernel", "model.hidden_size=130"], "model.hidden_size"),
    (["parallel.routing=kernel", "model.num_experts_per_tok=17"], "model.num_experts_per_tok"),
    (["parallel.rope=kernel", "model.kv_lora_rank=30"], "model.kv_lora_rank"),
    (
        ["parallel.routing=kernel", "model.num_routed_experts=520"],
        "model.num_routed_experts",
    ),
    (["parallel.max_activations=4"], "parallel.max_activations"),
    (
        ["parallel.schedule=search", "parallel.chunks=2", "parallel.max_activations=1"],
        "parallel.max_activations",
    ),
    (["model.num_layers=5"], "parallel.layers_per_chunk"),
    (["parallel.dispatcher=deepep", "parallel.pp=4", "parallel.ep=1"], "parallel.ep"),
    (["parallel.dispatcher=deepep", "recipe.precision=fp32"], "recipe.precision"),
    (["parallel.recompute=[moe,moe]"], "parallel.recompute"),
    (["parallel.recompute=[moe]", "model.num_dense_layers=4"], "parallel.recompute"),
]


@pytest.mark.parametrize(("overrides", "path"), DISAGREEING)
def test_sections_that_disagree(overrides: list[str], path: str) -> None:
    assert path in paths_of(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pp=4", "parallel.ep=1"],
        ["parallel.pp=1", "parallel.ep=4"],
        ["parallel.pp=1", "parallel.ep=1"],
        ["parallel=single"],
        ["parallel.layers_per_chunk=[1,3]"],
        ["model.num_layers=5", "parallel.layers_per_chunk=[3,2]"],
        ["parallel.schedule=zb_v", "parallel.chunks=2"],
        ["parallel.schedule=search", "parallel.max_activations=2"],
        ["parallel.schedule=zb_h1", "parallel.linear=te"],
        ["model.num_experts_per_tok=12"],
        ["recipe.batch_ramp={start_batch_size:4,ramp_tokens:9,multiple_of:4}"],
        ["model.yarn={factor:4,original_max_position:64}"],
    ],
)
def test_what_is_right_passes(overrides: list[str]) -> None:
    assert paths_of(*overrides) == []


def test_unequal_device_groups_are_not_blamed_on_the_experts_of_a_token() -> None:
    assert paths_of("model.num_device_groups=64") == ["model.num_device_groups"]


def test_a_wrong_rank_is_told_and_not_a_lack_of_ranks() -> None:
    assert paths_of("monitor.profile.torch_ranks=[-1]") == ["monitor.profile.torch_ranks.0"]
    assert paths_of("monitor.profile.torch_ranks=[]")[0] == "monitor.profile.torch_ranks"


def test_a_wrong_world_is_not_blamed_on_the_batch() -> None:
    assert paths_of("parallel.world_size=1") == ["parallel.world_size"]


@pytest.mark.parametrize("world_size", ["3", "x"])
def test_a_wrong_world_does_not_hide_a_batch_of_broken_micro_batches(world_size: str) -> None:
    overrides = (f"parallel.world_size={world_size}", "recipe.global_batch_size=7")
    assert paths_of(*overrides) == ["parallel.world_size", "recipe.global_batch_size"]


SPLIT = "parallel.layers_per_chunk"


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        (
            ["recipe.global_batch_size=7", "+recipe.batch_ramp.start=3"],
            ["recipe.global_batch_size"],
        ),
        (
            ["model.num_dense_layers=x", "parallel.pp=8", f"{SPLIT}=[1,1]"],
            ["parallel.pp", SPLIT, SPLIT],
        ),
        (["parallel.pp=x", f"{SPLIT}=[1,1]"], [SPLIT]),
        (["model.num_layers=x", f"{SPLIT}=[1,1,1]"], [SPLIT]),
        (["recipe.num_steps=1.5", "recipe.decay_at=[0.9,0.6]"], ["recipe.decay_at"]),
        (["recipe.decay_at=x", "recipe.num_steps=null"], ["recipe.num_steps"]),
        (["parallel.tp=x", "parallel.cp=2"], ["parallel.cp"]),
        (["parallel.cp=x", "parallel.tp=2"], ["parallel.tp"]),
        (["recipe.global_batch_size=x", "recipe.eval_num_samples=7"], ["recipe.eval_num_samples"]),
        (
            ["model.num_routed_experts=x", "model.num_limited_devices=9"],
            ["model.num_limited_devices"],
        ),
        (
            ["model.num_device_groups=x", "model.num_dense_layers=9"],
            ["model.num_dense_layers"],
        ),
        (
            ["recipe.capacity_factor=x", "parallel.dispatcher=megatron_alltoall"],
            ["parallel.overlap_shared_experts"],
        ),
        (
            ["recipe.batch_ramp={start_batch_size:x,ramp_tokens:9,multiple_of:12}"],
            ["recipe.global_batch_size"],
        ),
        (
            ["recipe.batch_ramp={start_batch_size:12,ramp_tokens:9,multiple_of:x}"],
            ["recipe.batch_ramp.start_batch_size"],
        ),
    ],
)
def test_a_wrong_field_hides_no_fact_that_does_not_need_it(
    overrides: list[str], paths: list[str]
) -> None:
    values, _ = compose_values(["experiment=quickstart", *overrides])
    told = [problem.path for problem in checks.cross_check(check(values)[0])]
    assert [path for path in told if path != "parallel.world_size"] == paths


@pytest.mark.parametrize("order", [1, -1])
def test_a_check_tells_one_fact(order: int) -> None:
    overrides = [override for mistakes, _ in DISAGREEING for override in mistakes]
    values, _ = compose_values(["experiment=quickstart", *overrides[::order]])
    config, _ = check(values)
    all_checks = (*PIPELINE_CHECKS, *checks._OTHERS)
    told = [len(list(passing_over_absent(each, config))) for each in all_checks]
    assert max(told) == 1
    assert sum(told) >= len(told) / 2


def test_a_wrong_field_is_not_taken_for_its_default() -> None:
    overrides = ("recipe.micro_batch_size=x", "recipe.global_batch_size=7")
    assert paths_of(*overrides) == ["recipe.micro_batch_size"]


def test_a_check_is_passed_over_for_a_wrong_field_and_not_for_a_misspelt_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, _ = compose_values(["experiment=quickstart", "parallel.world_size=x"])
    partial, _ = check(values)
    with pytest.raises(Absent, match=r"ParallelConfig\.world_size"):
        _ = partial.parallel.dp  # a property that needs the field
    assert checks.cross_check(partial) == []
    monkeypatch.setattr(checks, "_OTHERS", (lambda config: config.parallel.pipeline,))
    with pytest.raises(AttributeError, match="pipeline"):
        checks.cross_check(partial)
