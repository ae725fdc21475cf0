"""From a run's configuration to its plan: every setting that a plan depends on is heard."""

import pytest

from dsv2_train.config.run import RunConfig
from dsv2_train.pipeline.schedules.model_costs import model_costs
from dsv2_train.pipeline.schedules.run_plan import CPU, H800, run_costs, run_plan
from dsv2_train.pipeline.simulate import peak_activations
from tests.helpers.tiny import tiny_config


def config(*overrides: str) -> RunConfig:
    return tiny_config("parallel.world_size=4", "parallel.pp=4", *overrides)


SEARCHED = ("parallel.schedule=search", "recipe.global_batch_size=32")


@pytest.mark.parametrize("room", [1, 2, 3, 6])
def test_a_run_holds_what_it_has_room_for(room: int) -> None:
    """With room for all the first stage would hold four or more."""
    plan = run_plan(config(*SEARCHED, f"parallel.max_activations={room}"), 8)
    assert max(peak_activations(plan)) <= room
    assert plan.schedule == "search"


def test_room_that_is_there_is_used() -> None:
    plan = run_plan(config(*SEARCHED, "parallel.max_activations=6"), 8)
    assert max(peak_activations(plan)) > 3


@pytest.mark.parametrize(("device", "speeds"), [("cpu", CPU), ("h800", H800)])
def test_durations_are_those_of_the_device(device: str, speeds: object) -> None:
    run = config(f"cluster.device={device}", "recipe.micro_batch_size=1", "recipe.precision=fp32")
    layers = run.parallel.split(run.model.num_layers)
    assert run_costs(run) == model_costs(
        run.model,
        layers,
        run.recipe.sequence_length,
        speeds,  # type: ignore[arg-type]
        run.parallel.recompute,
        num_sequences=1,
        element_bytes=4,
    )


def test_a_part_that_is_recomputed_makes_b_longer_and_nothing_else() -> None:
    plain, again = (config(f"parallel.recompute=[{part}]") for part in ("", "moe"))
    one, other = run_costs(plain), run_costs(again)
    assert other.input_grad_s[1] > 1.01 * one.input_grad_s[1]
    assert (other.forward_s, other.weight_grad_s) == (one.forward_s, one.weight_grad_s)


def test_twice_the_samples_take_twice_as_long() -> None:
    one, two = (run_costs(config(f"recipe.micro_batch_size={size}")) for size in (1, 2))
    for each in ("forward_s", "input_grad_s", "weight_grad_s"):
        assert getattr(two, each) == pytest.approx([2 * took for took in getattr(one, each)])
    assert two.communication_s == pytest.approx(2 * one.communication_s)


@pytest.mark.parametrize(("precision", "times"), [("bf16", 1), ("fp32", 2), ("fp64", 4)])
def test_a_message_is_as_long_as_its_elements(precision: str, times: int) -> None:
    run, bf16 = (run_costs(config(f"recipe.precision={each}")) for each in (precision, "bf16"))
    assert run.communication_s == pytest.approx(times * bf16.communication_s)
    assert run.forward_s == bf16.forward_s
