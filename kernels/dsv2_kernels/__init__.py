"""CUDA kernels of dsv2_train, each beside the plain torch that defines it.

Every op checks its arguments before it runs the kernel or plain torch; an error names op, argument,
what was found and what is supported. What a docstring demands "for kernels" (strides, alignment,
multiples of 16 bytes, largest sizes) holds there alone: plain torch on a CPU takes any, and float64
too. On a CPU every index is checked as well; kernels check theirs only where they are built with
--debug, or emulated.
"""
