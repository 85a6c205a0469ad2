"""Elementwise gated recurrences."""
