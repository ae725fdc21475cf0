"""Pieces of tensors in files that torch.distributed.checkpoint can read."""
