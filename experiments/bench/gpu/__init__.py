"""The bench of a GPU: ``python -m experiments.bench.gpu`` checks the kernels on the device, and then times them."""
