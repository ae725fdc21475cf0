"""Watches the ranks of a launch from outside: who is missing when a run hangs, and where."""
