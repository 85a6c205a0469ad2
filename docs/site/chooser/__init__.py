"""The page on which one chooses a mixer: its formulas, measurements and models, exported for a browser."""
