"""Channel mixers: what each token does with its own channels."""
