"""Slurm: what launch/submit.py runs, and what its job runs on each node."""
