"""Modules of our own for the slots of a megatron-core layer."""
