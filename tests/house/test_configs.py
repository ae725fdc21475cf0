"""Every preset composes, says each thing once and is the paper's; every experiment can be run."""

from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args

import pytest
import yaml

from dsv2_train.cli.compose import CONFIG_DIR, compose_values
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig
from dsv2_train.config.section import Section
from tests.house.source import PACKAGE

GROUPS = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
PRESETS = [
    (group, path.stem) for group in GROUPS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))
]
FIELDS = sorted(set(GROUPS) - {"experiment"})
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
    assert set(FIELDS) == fields
    sections = {path.stem for path in (PACKAGE / "config" / "sections").glob("[!_]*.py")}
    assert sections == fields


def section(cls: type[Section], name: str) -> type[Section] | None:
    """The section in a field `Section` or `Section | None`; None for a field that holds a value."""
    annotation = cls.model_fields[name].annotation
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def repeated_defaults(cls: type[Section], values: dict[str, Any], path: str) -> Iterator[str]:
    """Keys of a preset that say what the class says as well."""
    for name, value in values.items():
        inner = section(cls, name)
        if inner is not None and isinstance(value, dict):
            yield from repeated_defaults(inner, value, f"{path}{name}.")
        elif (tuple(value) if isinstance(value, list) else value) == cls.model_fields[name].default:
            yield f"{path}{name}"


def read_preset(group: str, preset: str) -> tuple[type[Section], dict[str, Any]]:
    """What a preset fills in, and its values."""
    values = yaml.safe_load((CONFIG_DIR / group / f"{preset}.yaml").read_text())
    values.pop("defaults", None)
    cls = RunConfig if group == "experiment" else section(RunConfig, group)
    assert cls is not None
    return cls, values


@pytest.mark.parametrize(("group", "preset"), PRESETS)
def test_a_preset_repeats_no_default(group: str, preset: str) -> None:
    assert list(repeated_defaults(*read_preset(group, preset), "")) == []


def test_a_repeated_default_is_found() -> None:
    values = {
        "optim": {"beta1": 0.9, "lr": 1.0},
        "parallel": {"recompute": [], "pp": 2},
        "model": {"yarn": {"factor": 2.0, "beta_slow": 1.0}},
    }
    repeated = ["optim.beta1", "parallel.recompute", "model.yarn.beta_slow"]
    assert list(repeated_defaults(RunConfig, values, "")) == repeated


@pytest.mark.parametrize(("group", "preset"), [each for each in PRESETS if each[0] in FIELDS])
def test_a_preset_says_whatever_has_no_default(group: str, preset: str) -> None:
    cls, values = read_preset(group, preset)
    required = {name for name, field in cls.model_fields.items() if field.is_required()}
    assert sorted(required - set(values)) == []


# What the paper says, written down once more: a preset or a default that changes breaks a test.
PAPERS = ("dsv2_236b_pretrain", "dsv2_lite_pretrain")
MODELS = {
    "dsv2_236b_pretrain": {
        "num_layers": 60,
        "num_dense_layers": 1,
        "hidden_size": 5120,
        "vocab_size": 102_400,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "num_shared_experts": 2,
        "num_routed_experts": 160,
        "num_experts_per_tok": 6,
        "num_device_groups": 8,
        "num_limited_devices": 3,
        "routed_scaling_factor": 16.0,
    },
    "dsv2_lite_pretrain": {
        "num_layers": 27,
        "num_dense_layers": 1,
        "hidden_size": 2048,
        "vocab_size": 102_400,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "num_shared_experts": 2,
        "num_routed_experts": 64,
        "num_experts_per_tok": 6,
        "num_device_groups": 1,
        "num_limited_devices": 1,
        "routed_scaling_factor": 1.0,
    },
}
# Defaults of the class.
OF_EVERY_MODEL = {
    "q_latent_scale": 1.0,
    "kv_latent_scale": 1.0,
    "rms_norm_eps": 1e-6,
    "init_std": 0.006,
    "rope_theta": 10_000.0,
    "yarn": None,
}
RECIPES = {
    "dsv2_236b_pretrain": {
        "global_batch_size": 9216,
        "batch_ramp": {
            "start_batch_size": 2304,
            "ramp_tokens": 225_000_000_000,
            "multiple_of": 256,
        },
        "num_tokens": 8_100_000_000_000,
        "decay_at": (0.6, 0.9),
        "expert_balance_alpha": 0.003,
        "device_balance_alpha": 0.05,
        "communication_balance_alpha": 0.02,
        "capacity_factor": 1.0,
        "exempt_share": 0.1,
    },
    "dsv2_lite_pretrain": {
        "global_batch_size": 4608,
        "batch_ramp": None,
        "num_tokens": 5_700_000_000_000,
        "decay_at": (0.8, 0.9),
        "expert_balance_alpha": 0.001,
        "device_balance_alpha": 0.0,
        "communication_balance_alpha": 0.0,
        "capacity_factor": None,
        "exempt_share": 0.0,
    },
}
OF_EVERY_RECIPE = {
    "sequence_length": 4096,
    "num_steps": None,
    "warmup_steps": 2000,
    "decay_factor": 0.316,
    "precision": "bf16",
}
PEAK_LR = {"dsv2_236b_pretrain": 2.4e-4, "dsv2_lite_pretrain": 4.2e-4}
OPTIM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0}


@pytest.mark.parametrize("experiment", PAPERS)
def test_the_architecture_is_the_papers(experiment: str) -> None:
    """Every field, so that a new one is written down here as well."""
    model = resolve([f"experiment={experiment}"], need_data=False).model
    assert model.model_dump() == MODELS[experiment] | OF_EVERY_MODEL


@pytest.mark.parametrize("experiment", PAPERS)
def test_the_recipe_is_the_papers(experiment: str) -> None:
    recipe = resolve([f"experiment={experiment}"], need_data=False).recipe
    ours = {"micro_batch_size", "capacity_scope", "eval_every_steps", "eval_num_samples"}
    assert recipe.model_dump(exclude=ours) == RECIPES[experiment] | OF_EVERY_RECIPE


@pytest.mark.parametrize("experiment", PAPERS)
def test_the_optimizer_is_the_papers(experiment: str) -> None:
    optim = resolve([f"experiment={experiment}"], need_data=False).optim
    assert optim.model_dump(exclude={"adam"}) == {"lr": PEAK_LR[experiment]} | OPTIM


def test_the_layout_is_the_papers() -> None:
    parallel = resolve(["experiment=dsv2_236b_pretrain"], need_data=False).parallel
    assert (parallel.pp, parallel.ep, parallel.schedule) == (16, 8, "zb_v")
    assert parallel.layers_per_chunk == (1, *[2] * 13, 1, 1, *[2] * 15, 1)
