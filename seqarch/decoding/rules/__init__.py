"""Which instructions torch's operators and this library's are, by kind."""

from seqarch.decoding.rules import elementwise, operations, reductions, views

__all__ = ["elementwise", "operations", "reductions", "views"]
