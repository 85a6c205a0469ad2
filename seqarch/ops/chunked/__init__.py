"""Packed sequences, decay inside a chunk, and recurrences with a matrix state."""
