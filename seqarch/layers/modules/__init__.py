"""The parts of mixers: projections, norms, caches, positions, convolutions, initial values."""
