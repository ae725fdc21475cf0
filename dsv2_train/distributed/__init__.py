"""Processes, their groups, and what a rank holds of the whole model."""
