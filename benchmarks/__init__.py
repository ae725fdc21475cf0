"""Our training step beside other people's, on one CPU thread: `python -m benchmarks`."""
