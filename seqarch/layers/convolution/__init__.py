"""Convolutions as long as the sequence."""
