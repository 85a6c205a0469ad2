"""Attention over some of the keys: listed blocks, chosen blocks, chosen tokens."""
