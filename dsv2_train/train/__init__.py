"""The run: setup in journey order, the step, the loop."""
