"""What a person types: verbs, the launcher, Hydra. Each composes, checks and calls one room."""
