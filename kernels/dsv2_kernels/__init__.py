"""CUDA kernels of dsv2_train, each beside the plain torch that defines it.

Before either an op checks its arguments; an error names op, argument, what was found and what is
supported. What is said to be so for kernels (strides, addresses, multiples of 16 bytes, largest
sizes) is not asked of a CPU's tensors: plain torch takes any, and float64 too. There the host also
looks at every index, which kernels do where they are built with --debug, or emulated.
"""
