"""Printed: the metrics as lines of the run's ``train.log``."""

from collections.abc import Mapping

from experiments.trackers import Tracker


class Printed(Tracker):
    """Prints the metrics of each evaluation, which the runner keeps in ``train.log``."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        print(f"step {step}:", ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
