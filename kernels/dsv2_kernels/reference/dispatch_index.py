"""From a routed map to the rows of each expert and of each token, in plain torch."""

# T tokens, E experts, R rows: one for every (token, expert) assignment

from torch import Tensor


def dispatch_index(
    routing_map: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[T, E] bool -> tokens [R], assignments [R], tokens_per_expert [E], rows [R], row_starts [T].

    Raises:
        ValueError: the map has another number of assignments than `num_rows`.
    """
    num_experts = routing_map.size(1)
    experts, tokens = routing_map.t().nonzero(as_tuple=True)
    if tokens.size(0) != num_rows:
        raise ValueError(f"dispatch_index: num_rows has {num_rows}; supported: {tokens.size(0)}")
    per_token = routing_map.sum(dim=1)
    return (
        tokens,
        tokens * num_experts + experts,
        routing_map.sum(dim=0),
        tokens.argsort(stable=True),
        per_token.cumsum(0) - per_token,
    )
