"""The verbs that look at checkpoints and remove them."""
