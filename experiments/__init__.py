"""The experiment runner: tasks, training, records and reports, built on seqarch and run from a checkout."""
