"""Selective state-space models."""
