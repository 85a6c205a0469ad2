"""Parts that the Triton kernels of several operations share, and their launch."""
