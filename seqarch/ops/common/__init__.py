"""What several operations share: argument checks, dtypes, packed sequences, the compiled library."""
