"""The report on recorded runs: a page with tables and plots, and an explorer of them."""
