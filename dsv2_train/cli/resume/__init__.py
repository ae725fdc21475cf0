"""What a run may take over from checkpoints, and what it may change."""
