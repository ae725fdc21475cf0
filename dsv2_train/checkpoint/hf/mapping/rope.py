"""How config.json says RoPE and YaRN: pure.

Written is the older form, `rope_theta` and `rope_scaling` with both `type` and `rope_type`, which
transformers 4 and 5 and the released code read. What transformers 5 writes (`rope_parameters`, with
`rope_theta` inside) is understood too.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dsv2_train.config.load import check_model
from dsv2_train.config.problems import Problem
from dsv2_train.config.sections.model import ModelConfig, YarnConfig
from dsv2_train.recipe.yarn import rotary_scale, temperature

KEY_OF_YARN_FIELD = {
    "factor": "factor",
    "original_max_position": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# What transformers takes for a key that is not there.
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
_ROPE_THETA = 10000.0
_OTHER_KEYS = {"type", "rope_type", "rope_theta", "truncate", "attention_factor"}


def rope_values(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say how a model rotates; no YaRN, no block."""
    scaling = None if model.yarn is None else _scaling(model.yarn)
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling}


def rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our model section that a config.json says, unchecked."""
    block = _block(values)
    ours = {"rope_theta": block.get("rope_theta", values.get("rope_theta", _ROPE_THETA))}
    if _kind(block) == "yarn":
        said = {field: block[key] for field, key in KEY_OF_YARN_FIELD.items() if key in block}
        ours["yarn"] = _YARN_DEFAULTS | said
    return ours


def rope_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What a config.json says about RoPE that this model does not compute."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key), Mapping | None):
            yield Problem(key, values[key], "must be an object or null")
    block = _block(values)
    kind = _kind(block)
    if kind == "default":
        return
    if kind is None:
        said = f"must be yarn or default: its block says {', '.join(sorted(block))}"
        yield Problem("rope_scaling.type", kind, said)
        return
    if kind != "yarn":
        yield Problem("rope_scaling.type", kind, "must be yarn, or rope_scaling null")
        return
    for key in sorted(block.keys() - {*KEY_OF_YARN_FIELD.values(), *_OTHER_KEYS}):
        yield Problem(f"rope_scaling.{key}", block[key], "unknown key")
    if block.get("truncate", True) is not True:
        yield Problem("rope_scaling.truncate", block["truncate"], "must be true")
    yield from _factor_problems(block, rope_fields(values))


def _scaling(yarn: YarnConfig) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "yarn", "rope_type": "yarn"}
    block |= {key: getattr(yarn, field) for field, key in KEY_OF_YARN_FIELD.items()}
    if not math.isclose(_rotary_scale_understood(block), rotary_scale(yarn)):
        block["attention_factor"] = rotary_scale(yarn)
    return block


def _factor_problems(block: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Problem]:
    """An mscale of 0 means one thing to transformers, another to the released code."""
    model, wrong = check_model(ours)
    if model.yarn is None or any(problem.path.startswith("model.yarn") for problem in wrong):
        return
    told = block.get("attention_factor")
    if not isinstance(told, int | float | None):
        yield Problem("rope_scaling.attention_factor", told, "must be a number or null")
        return
    found, ours_factor = _rotary_scale_understood(block), rotary_scale(model.yarn)
    if not math.isclose(found, ours_factor, rel_tol=1e-6):
        allowed = (
            f"must be {ours_factor:.9g}, what factor, mscale and mscale_all_dim make of it in the "
            f"released code; transformers takes {found:.9g}"
        )
        yield Problem("rope_scaling.attention_factor", told, allowed)


def _rotary_scale_understood(block: Mapping[str, Any]) -> float:
    """The factor on cos and sin that transformers makes of a YaRN block."""
    if block.get("attention_factor") is not None:
        return float(block["attention_factor"])
    mscale, all_dim = block.get("mscale"), block.get("mscale_all_dim")
    if mscale and all_dim:
        return temperature(block["factor"], mscale) / temperature(block["factor"], all_dim)
    return temperature(block["factor"], 1.0)


def _block(values: Mapping[str, Any]) -> Mapping[str, Any]:
    block = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return block if isinstance(block, Mapping) else {}


def _kind(block: Mapping[str, Any]) -> object:
    """What a block says of its kind; None where it says something else and not that."""
    unsaid = None if block.keys() - {"rope_theta"} else "default"
    return block.get("rope_type", block.get("type", unsaid))
