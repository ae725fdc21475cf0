"""Fast computations: pure functions and their hand-written gradients, no megatron-core."""
