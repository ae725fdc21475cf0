"""megatron-core's call of a schedule has arguments that a plan has no use for: which, and why."""

from collections.abc import Mapping, Sequence

from torch import nn

# Of megatron-core 0.16.1; what each would have to be told that the executor does otherwise.
_UNSERVED = {
    "decoder_seq_length": "there is no encoder",
    "collect_non_loss_data": "what a loss function reports is what is collected",
    "first_val_step": "no CUDA graphs are captured",
    "adjust_tensor_shapes_fn": "what crosses between stages has one shape",
    "p2p_communicator": "the executor has lanes of its own",
    "pg_collection": "the executor has the groups that it was built with",
    "force_all_reduce": "gradients are reduced as the data-parallel wrapper of the chunks is set",
}


def require_nothing_else(others: Mapping[str, object], chunks: Sequence[nn.Module]) -> None:
    """See that megatron-core's other arguments ask for nothing that is not done.

    Args:
        others: by name.
        chunks: of the stage.

    Raises:
        TypeError: for a name that megatron-core's schedules do not have.
        ValueError: for another model, or for a value that is not served.
    """
    for name, value in others.items():
        if name == "model":
            given = [value] if isinstance(value, nn.Module) else value
            if not isinstance(given, Sequence) or list(map(id, given)) != list(map(id, chunks)):
                raise ValueError("model: must be the chunks that the executor was built with")
        elif name not in _UNSERVED:
            raise TypeError(f"a schedule takes no argument {name!r}")
        elif value is not None and value is not False:
            raise ValueError(f"{name}: found {value!r}; must be left out: {_UNSERVED[name]}")
