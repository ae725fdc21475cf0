"""Small configurations for tests: the quickstart, made smaller, with any override."""

from functools import cache

from dsv2_train.cli.compose import compose_values
from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig

TINY = (
    "experiment=quickstart",
    "parallel=single",
    "model.hidden_size=48",
    "model.vocab_size=128",
    "model.num_attention_heads=4",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=12",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=20",
    "model.num_routed_experts=16",
    "recipe.sequence_length=24",
    "recipe.micro_batch_size=2",
    "recipe.capacity_factor=null",
)


@cache
def tiny_config(*overrides: str) -> RunConfig:
    """The tiny model with Hydra overrides; raises on any configuration problem."""
    values, problems = compose_values([*TINY, *overrides])
    config, more = check(values)
    assert not problems + more, [str(problem) for problem in problems + more]
    return config
