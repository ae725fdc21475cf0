"""Which of torch's SDPA back ends serves attention on this GPU: asked and timed at the start."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch

from dsv2_train.config.run import RunConfig
from dsv2_train.model.implementation import Choice
from dsv2_train.model.transformer_config import DTYPES
from dsv2_train.ops.attention import BACKENDS, causal_attention

# Positions of a sample -> milliseconds forward and backward; raises where heads are not taken.
Attempt = Callable[[int], float]

_FEW_POSITIONS = 128
_REPEATS = 5
# A back end earlier in the table serves where it is this near to the fastest, so that restarts of a
# run choose alike.
_AS_FAST = 1.05


def measure_sdpa(choice: Choice, config: RunConfig, device: torch.device) -> Choice:
    """Settle which back end `sdpa` means; every other choice is returned as it is.

    Args:
        choice: of attention.
        config: whose heads, sequence length and microbatch are tried.
        device: a GPU, where the choice is `sdpa`.

    Returns:
        A choice whose implementation is a key of `BACKENDS`.

    Note:
        Needs the memory of one layer's heads and their gradients. No communication.
    """
    if choice.implementation != "sdpa":
        return choice
    fused = {
        name: partial(_time_ms, name, config, device) for name in BACKENDS if name != "sdpa_math"
    }
    return fastest(choice.op, fused, config.recipe.sequence_length)


def fastest(op: str, fused: Mapping[str, Attempt], num_positions: int) -> Choice:
    """The fastest of those that take the heads; `sdpa_math`, which takes all, where none does.

    Args:
        op: what is chosen for.
        fused: attempts by their back end's name.
        num_positions: of a sample of the run.
    """
    times: dict[str, float] = {}
    for name, attempt in fused.items():
        try:
            attempt(_FEW_POSITIONS)
            times[name] = attempt(num_positions)
        except RuntimeError:  # what torch raises where no kernel serves, and where memory is short
            continue
    others = ", ".join(name for name in fused if name not in times)
    refused = f"{others} cannot serve these heads" if others else "all of torch's can serve"
    if not times:
        return Choice(op, "sdpa_math", refused)
    served = next(name for name in times if times[name] <= _AS_FAST * min(times.values()))
    measured = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
    return Choice(op, served, f"forward and backward here: {measured}; {refused}")


def _time_ms(backend: str, config: RunConfig, device: torch.device, num_positions: int) -> float:
    model = config.model
    num_heads = model.num_attention_heads // config.parallel.tp
    sizes = (config.recipe.micro_batch_size, num_heads, num_positions)
    dtype = DTYPES[config.recipe.precision]
    q, k, v = (
        torch.zeros(*sizes, width, device=device, dtype=dtype).permute(2, 0, 1, 3).requires_grad_()
        for width in (model.qk_head_dim, model.qk_head_dim, model.v_head_dim)
    )

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = causal_attention(q, k, v, 1.0, backend)
        torch.autograd.grad(out, (q, k, v), out)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason why a back end does not serve
        once()
        return median(once() for _ in range(_REPEATS))
