"""Recurrences that overwrite what a key held before."""
