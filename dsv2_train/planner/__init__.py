"""What a run will be, computed from its configuration alone: no GPU, no torch, no process group."""
