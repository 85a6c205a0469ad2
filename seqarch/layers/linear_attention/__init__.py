"""Linear recurrences with a matrix state and a decay."""
