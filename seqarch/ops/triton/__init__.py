"""What the Triton kernels of several operations share, and how they are launched."""
