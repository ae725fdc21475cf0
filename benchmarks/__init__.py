"""Benchmarks: ours beside other people's, on a CPU."""
