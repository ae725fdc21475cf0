"""What the project's own kernels can compute, said before a GPU is touched."""

from collections.abc import Iterator, Sequence

from dsv2_train.config.problems import Check, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS

# Kernels read 16 bytes at a time.
_VECTOR_BYTES = 16
_BYTES = {"bf16": 2, "fp32": 4}
# Widths of rows that kernels read, with the settings that ask for these kernels. The rope key is
# read where it lies, behind the latents.
_WIDTHS = {
    "hidden_size": ("permute", "experts"),
    "intermediate_size": ("activation",),
    "moe_intermediate_size": ("activation", "experts"),
    "kv_lora_rank": ("rope",),
    "qk_nope_head_dim": ("rope",),
    "qk_rope_head_dim": ("rope",),
    "v_head_dim": ("rope",),
}
# The same of sizes that have a largest one.
LIMITS = {
    "num_routed_experts": (512, ("routing", "permute")),
    "num_device_groups": (64, ("routing",)),
    "num_experts_per_tok": (16, ("routing",)),
}


def _asked(config: RunConfig, settings: Sequence[str]) -> str:
    """Those of the settings that are `kernel`, as an error names them."""
    asked = [name for name in settings if getattr(config.parallel, name) == "kernel"]
    return " and ".join(f"parallel.{name}=kernel" for name in asked)


def _not_in_fp64(setting: str) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        asked = getattr(config.parallel, setting)
        if asked == "kernel" and config.recipe.precision == "fp64":
            allowed = "must not be kernel with recipe.precision=fp64: kernels compute in fp32"
            yield Problem(f"parallel.{setting}", asked, allowed)

    return check


def _whole_vectors(width: str, settings: Sequence[str]) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        found, precision = getattr(config.model, width), config.recipe.precision
        asked = _asked(config, settings)
        if not asked or precision not in _BYTES:
            return
        size = _VECTOR_BYTES // _BYTES[precision]
        if found % size:
            allowed = f"must be a multiple of {size} in {precision} with {asked}"
            yield Problem(f"model.{width}", found, allowed)

    return check


def _at_most(field: str, most: int, settings: Sequence[str]) -> Check:
    def check(config: RunConfig) -> Iterator[Problem]:
        found, asked = getattr(config.model, field), _asked(config, settings)
        if asked and found > most:
            yield Problem(f"model.{field}", found, f"must be at most {most} with {asked}")

    return check


KERNEL_CHECKS: tuple[Check, ...] = (
    *map(_not_in_fp64, KERNEL_SETTINGS),
    *(_whole_vectors(width, settings) for width, settings in _WIDTHS.items()),
    *(_at_most(field, most, settings) for field, (most, settings) in LIMITS.items()),
)
