"""The typed, frozen configuration of a run; no torch, nothing of the other rooms."""
