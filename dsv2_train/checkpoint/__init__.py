"""The state of a run on disk: there entirely or not at all, verified when it is restored."""
