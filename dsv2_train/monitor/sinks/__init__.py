"""Where rows go: the console, JSON lines, wandb.

A row here is complete: the metrics, and `step`, `consumed_samples` and `consumed_tokens`.
"""
