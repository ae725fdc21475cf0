"""Benchmarks: ours beside other people's, on a CPU; one layer on a GPU as well."""
