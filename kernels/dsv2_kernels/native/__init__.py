"""The compiled side: how the kernels are built, found and launched."""
