"""The experiment runner on seqarch: tasks, training, records and reports, and the command ``seqarch``."""
