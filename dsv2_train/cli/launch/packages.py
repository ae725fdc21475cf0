"""Optional packages that a configuration asks for by name, looked for before any rank starts."""

from collections.abc import Iterator
from importlib.util import find_spec

from dsv2_train.config.problems import Problem
from dsv2_train.config.run import RunConfig

_PACKAGES = {
    "te": ("transformer_engine", "transformer-engine, in the GPU image or by the extra gpu"),
    "apex": ("apex", "apex, in the GPU image"),
    "deepspeed_cpu": ("deepspeed", "deepspeed, by the extra offload"),
}


def missing_packages(config: RunConfig) -> Iterator[Problem]:
    """What was asked for by name and is not installed; whether it can run is the ranks' to say."""
    asked = {
        "parallel.linear": config.parallel.linear,
        "parallel.norm": config.parallel.norm,
        "parallel.attention": config.parallel.attention,
        "optim.adam": config.optim.adam,
    }
    for path, choice in asked.items():
        module, where = _PACKAGES.get(choice, (None, ""))
        if module is not None and find_spec(module) is None:
            yield Problem(
                path, choice, f"needs {where}: it is not installed here; auto always runs"
            )
