"""DeepSeekMoE: routing, balance losses, experts, the layer."""
