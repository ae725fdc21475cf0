"""What a mixture of experts computes between routing and output."""
