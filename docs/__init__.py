"""The documentation; ``docs.tables`` generates the parts of it that the code itself states."""
