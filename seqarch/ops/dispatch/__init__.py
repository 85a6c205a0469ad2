"""How a public operation checks its arguments and picks the code that computes it."""
