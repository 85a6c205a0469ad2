"""The bench: ``seqarch bench`` times this machine's backends against what one would use without them."""
