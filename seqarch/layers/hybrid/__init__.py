"""Mixers that are made of mixers of other families."""
