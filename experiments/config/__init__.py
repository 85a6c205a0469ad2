"""The configuration of a run: typed, and from it a task and a model."""
