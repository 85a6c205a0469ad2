"""What a run is: typed configuration, and from it a task and a model."""
