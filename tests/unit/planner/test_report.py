"""The plan of the shipped experiments against figures by hand and a replayed run."""

import pytest

from dsv2_train.config.run import RunConfig
from dsv2_train.planner.report import make_report
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain")
ON_2048 = preset("dsv2_236b_pretrain", "parallel.world_size=2048")


def replayed_step(num_tokens: int) -> tuple[int, int, int, float]:
    """First step of the paper's run at `num_tokens`: step, samples, batch size, rate."""
    step, samples = 0, 0
    while samples * 4096 < num_tokens:
        samples += min(2304 + 256 * (samples * 27 // 54_931_640), 9216)
        step += 1
    size = min(2304 + 256 * (samples * 27 // 54_931_640), 9216)
    reached = (samples * 4096 >= 4_860_000_000_000) + (samples * 4096 >= 7_290_000_000_000)
    return step, samples, size, 2.4e-4 * min(1.0, (step + 1) / 2000) * 0.316**reached


@pytest.mark.parametrize(
    "num_tokens", [0, 10**10, 10**11, 225 * 10**9, 2 * 10**12, 486 * 10**10, 8 * 10**12]
)
def test_the_recipe_at_any_token_count(num_tokens: int) -> None:
    report = make_report(V2, [num_tokens])
    (asked,) = [moment for moment in report.timetable if moment.event.startswith("asked")]
    step, samples, size, lr = replayed_step(num_tokens)
    assert asked.event == f"asked: {num_tokens:,}"
    assert (asked.step, asked.consumed_samples, asked.global_batch_size) == (step, samples, size)
    assert asked.consumed_tokens == samples * 4096
    # The same three factors in another order.
    assert asked.lr == pytest.approx(lr, rel=1e-14)
    assert asked.num_microbatches == size // 8


def test_turning_points_of_the_paper() -> None:
    report = make_report(V2)
    assert [(moment.event, moment.recipe_stage) for moment in report.timetable] == [
        ("first step", "warm-up"),
        ("warm-up over", "batch ramp"),
        ("batch ramp over", "peak"),
        ("decay at 60%", "decay 1"),
        ("decay at 90%", "decay 2"),
        ("last step", "decay 2"),
    ]
    assert report.timetable[-1].step == report.cost.num_steps - 1
    batch_tokens = report.timetable[-1].global_batch_size * 4096
    assert report.timetable[-1].consumed_tokens + batch_tokens == report.cost.num_tokens


def test_turning_points_after_the_end_are_left_out() -> None:
    report = make_report(preset("dsv2_236b_pretrain", "recipe.num_steps=100"), [10**12])
    assert [moment.event for moment in report.timetable] == [
        "first step",
        "last step",
        "asked: 1,000,000,000,000",
    ]
    assert report.timetable[-1].recipe_stage == "done"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ON_2048, [(2304, 18, 0.2924), (9216, 72, 0.0917)]),
        (
            preset("dsv2_lite_pretrain", "parallel=single", "parallel.world_size=8"),
            [(4608, 576, 0.0)],
        ),
    ],
)
def test_bubbles(config: RunConfig, expected: list[tuple[int, int, float]]) -> None:
    """On 2048 ranks 128 pipelines share a batch; and every message takes 0.84 ms."""
    found = make_report(config).bubbles
    assert [(bubble.global_batch_size, bubble.num_microbatches) for bubble in found] == [
        (batch_size, microbatches) for batch_size, microbatches, _ in expected
    ]
    shares = [share for _, _, share in expected]
    assert [bubble.share for bubble in found] == pytest.approx(shares, abs=5e-4)


def test_cost_of_the_published_run() -> None:
    """Facts 5.4: 1.26e24 operations, causal; the last step goes past 8.1T by less than a batch."""
    cost = make_report(V2).cost
    assert cost.training_flops == pytest.approx(1.26e24, rel=5e-3)
    assert 0 <= cost.num_tokens - 8_100_000_000_000 < 9216 * 4096
    assert cost.least_device_hours is not None
    # 1.400M hours were used at 25.2% of 989.
    assert cost.least_device_hours == pytest.approx(1_400_000 * 0.252, rel=5e-3)


def test_an_unknown_device_has_no_hours() -> None:
    cost = make_report(preset("quickstart")).cost
    assert cost.peak_tflops is cost.least_device_hours is None


def test_stages_and_ranks_of_the_paper_layout() -> None:
    report = make_report(ON_2048)
    assert (report.num_nodes, report.dp, report.edp) == (256, 128, 16)
    middle = report.stages[3]
    assert middle.layers == ((5, 6), (53, 54))
    assert (middle.first_rank, middle.last_rank) == (384, 511)
    assert (middle.first_node, middle.last_node) == (48, 63)
    assert [stage.pp_rank for stage in report.stages if stage.has_embedding] == [0]
    assert [stage.pp_rank for stage in report.stages if stage.has_head] == [0]
    assert len(report.expert_groups) == 256
    assert all(len(group.nodes) == 1 for group in report.expert_groups)
    group = report.expert_groups[49]
    assert (group.pp_rank, group.edp_rank, group.first_rank, group.last_rank) == (3, 1, 392, 399)


def test_the_fullest_rank_is_on_a_middle_stage() -> None:
    report = make_report(V2)
    sizes = [stage.bytes_per_rank for stage in report.stages]
    assert report.stages[report.fullest_stage].bytes_per_rank == max(sizes)
    assert report.stages[report.emptiest_stage].bytes_per_rank == min(sizes)
    assert 1 <= report.fullest_stage <= 14


def test_parameters_of_the_published_models() -> None:
    for config, total, activated in (
        (V2, 235_741_434_880, 20_851_512_320),
        (preset("dsv2_lite_pretrain"), 15_706_484_224, 2_451_435_008),
    ):
        report = make_report(config)
        assert report.num_parameters == total
        assert report.activated.with_head == activated
        assert sum(stage.parameters for stage in report.stages) == total
