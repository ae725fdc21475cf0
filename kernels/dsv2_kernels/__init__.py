"""CUDA kernels of dsv2_train, each beside the plain torch that defines it."""
