"""What mixers are made of: projections, norms, caches, positions, convolutions, initial values."""
