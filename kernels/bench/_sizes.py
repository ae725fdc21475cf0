"""DeepSeek-V2's sizes, and a random routing of tokens to its experts."""

import torch
from torch import Tensor

HIDDEN = 5120
EXPERTS, TOP_K = 160, 6
# Experts of one of 8 ranks.
LOCAL_EXPERTS = 20
EXPERT_WIDTH = 1536
SHARED_EXPERTS = 2
GROUPS, LIMIT, SCALE = 8, 3, 16.0
HEADS, NOPE, ROPE, VALUE, LATENT = 128, 128, 64, 128, 512


def random_routing_map(tokens: int, device: torch.device) -> Tensor:
    """[T, E] bool: six experts a token, each as likely."""
    experts = torch.rand(tokens, EXPERTS, device=device).topk(TOP_K).indices
    routing_map = torch.zeros(tokens, EXPERTS, dtype=torch.bool, device=device)
    return routing_map.scatter_(1, experts, True)
