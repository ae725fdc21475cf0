"""Every preset composes, every experiment is one a user can run, every group is a field."""

import pytest

from dsv2_train.cli.compose import CONFIG_DIR, compose_values
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig
from tests.house.source import PACKAGE

GROUPS = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
PRESETS = [
    (group, path.stem) for group in GROUPS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))
]
EXPERIMENTS = [preset for group, preset in PRESETS if group == "experiment"]


@pytest.mark.parametrize(("group", "preset"), PRESETS)
def test_preset_has_only_known_keys_of_the_right_type(group: str, preset: str) -> None:
    values, problems = compose_values([f"{group}={preset}"])
    assert problems == []
    wrong = ("unknown key", "input should be", "extra inputs", "field required", "string should")
    told = [str(problem) for problem in check(values)[1]]
    assert [line for line in told if any(word in line for word in wrong)] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_is_valid(experiment: str) -> None:
    config = resolve([f"experiment={experiment}", "data.path=somewhere"], need_data=False)
    assert config.run.name == experiment


def test_a_group_is_a_field_a_folder_and_a_file_of_one_name() -> None:
    fields = set(RunConfig.model_fields) - {"run"}
    assert set(GROUPS) - {"experiment"} == fields
    sections = {path.stem for path in (PACKAGE / "config" / "sections").glob("[!_]*.py")}
    assert sections - {"base"} == fields


def test_the_236b_experiment_is_the_papers() -> None:
    config = resolve(["experiment=dsv2_236b_pretrain"], need_data=False)
    parallel, recipe = config.parallel, config.recipe
    assert (parallel.pp, parallel.ep, parallel.layers_per_stage) == (16, 8, (2, *[4] * 14, 2))
    assert (config.model.init_std, config.model.yarn) == (0.006, None)
    assert (config.optim.lr, recipe.warmup_steps, recipe.decay_factor) == (2.4e-4, 2000, 0.316)
    assert (recipe.decay_at, recipe.num_tokens) == ((0.6, 0.9), 8.1e12)
    assert recipe.batch_ramp is not None
    assert (recipe.batch_ramp.start_batch_size, recipe.global_batch_size) == (2304, 9216)
    assert recipe.batch_ramp.ramp_tokens == 225e9
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert config.optim.clip_grad_norm == 1.0


@pytest.mark.parametrize(
    ("experiment", "alphas"),
    [("dsv2_236b_pretrain", (0.003, 0.05, 0.02)), ("dsv2_lite_pretrain", (0.001, 0.0, 0.0))],
)
def test_the_balance_factors_are_the_papers(
    experiment: str, alphas: tuple[float, float, float]
) -> None:
    recipe = resolve([f"experiment={experiment}"], need_data=False).recipe
    found = (recipe.expert_balance_alpha, recipe.device_balance_alpha)
    assert (*found, recipe.communication_balance_alpha) == alphas
