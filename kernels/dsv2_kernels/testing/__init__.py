"""How kernels are compared with their references, and timed."""
