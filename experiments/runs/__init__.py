"""The folder of a run, its lock, and how recorded runs are found and compared."""
