"""What is timed of each op; `python -m bench` in this folder's parent runs it."""
