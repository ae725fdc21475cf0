"""What the project's own kernels can compute, said before a GPU is touched."""

from collections.abc import Iterator

from dsv2_train.config.problems import Check, Problem, value_at
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS

# Kernels read 16 bytes at a time.
_VECTOR_BYTES = 16
_BYTES = {"bf16": 2, "fp32": 4}
# Of the rows that a setting's kernel reads.
_WIDTHS = {
    "permute": ("hidden_size",),
    "activation": ("intermediate_size", "moe_intermediate_size"),
    "rope": ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "experts": ("hidden_size", "moe_intermediate_size"),
}
_LIMITS = {
    "routing": {"num_routed_experts": 512, "num_device_groups": 64, "num_experts_per_tok": 16},
    "permute": {"num_routed_experts": 512},
}


def _not_in_fp64(setting: str) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        asked = getattr(config.parallel, setting)
        if asked == "kernel" and config.recipe.precision == "fp64":
            allowed = "must not be kernel with recipe.precision=fp64: kernels compute in fp32"
            yield Problem(f"parallel.{setting}", asked, allowed)

    return check


def _whole_vectors(setting: str, width: str) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        found, precision = value_at(config, f"model.{width}"), config.recipe.precision
        if getattr(config.parallel, setting) != "kernel" or precision not in _BYTES:
            return
        size = _VECTOR_BYTES // _BYTES[precision]
        if found % size:
            allowed = f"must be a multiple of {size} in {precision} with parallel.{setting}=kernel"
            yield Problem(f"model.{width}", found, allowed)

    return check


def _at_most(setting: str, field: str, most: int) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        found = value_at(config, f"model.{field}")
        if getattr(config.parallel, setting) == "kernel" and found > most:
            allowed = f"must be at most {most} with parallel.{setting}=kernel"
            yield Problem(f"model.{field}", found, allowed)

    return check


KERNEL_CHECKS: tuple[Check, ...] = (
    *(_not_in_fp64(setting) for setting in KERNEL_SETTINGS),
    *(_whole_vectors(setting, width) for setting, names in _WIDTHS.items() for width in names),
    *(
        _at_most(setting, field, most)
        for setting, limits in _LIMITS.items()
        for field, most in limits.items()
    ),
)
