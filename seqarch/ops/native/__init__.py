"""The compiled libraries and what is called in them."""
