"""What the runner keeps of a run, read back: its checkpoints, and the trained model, by ``seqarch.load(folder)``."""
