"""Central training, each client alone, and federated training, on equally many bytes: ``python compare.py``."""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable

import torch
from federation import federated, steps_of
from texts import CLIENTS, Reader, text
from training import bits_per_byte, new_model, shared, train


def central(rounds: int, rounds_per_pass: int) -> dict[str, float]:
    """All texts in one place, their pieces in a random order; tested on each."""
    model, readers, order = new_model(), {name: Reader(name) for name in CLIENTS}, random.Random(0)
    for _ in range(rounds):
        pieces = [name for name in CLIENTS for _ in range(steps_of(name, rounds_per_pass))]
        train(model, [readers[name] for name in order.sample(pieces, len(pieces))])
    return {name: bits_per_byte(model, name) for name in CLIENTS}


def alone(rounds: int, rounds_per_pass: int) -> dict[str, float]:
    """Each client by itself, tested on its own text."""
    found = {}
    for name in CLIENTS:
        model, reader = new_model(), Reader(name)
        for _ in range(rounds):
            train(model, [reader] * steps_of(name, rounds_per_pass))
        found[name] = bits_per_byte(model, name)
    return found


def line(title: str, cells: list[str]) -> str:
    return f"{title:24}" + "".join(f"{cell:>12}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--rounds", type=int, default=8, help="of federated training (default 8)")
    parser.add_argument("--rounds-per-pass", type=int, default=4, help="that read each text once (default 4)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.rounds_per_pass) < 1:
        parser.error("expected at least one round, and one for a pass")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the model is so small that a second thread takes longer to call than it saves
    given = arguments.rounds, arguments.rounds_per_pass

    print(line("bits per byte of", list(CLIENTS)), flush=True)
    print(line("(bytes of training text)", [f"{len(text(name)) - len(text(name)[-8192:]):,}" for name in CLIENTS]))
    seconds: dict[str, float] = {}

    def show(title: str, found: Callable[[], dict[str, float]]) -> None:
        began = time.perf_counter()
        bits = found()
        seconds[title] = time.perf_counter() - began
        print(line(title, [f"{bits[name]:.2f}" for name in CLIENTS]), flush=True)

    sent: dict[str, int] = {}

    def by_flower(title: str, own_norms: bool) -> dict[str, float]:
        bits, sent[title] = federated(*given, own_norms)
        return bits

    show("untrained", lambda: {name: bits_per_byte(new_model(), name) for name in CLIENTS})
    show("central", lambda: central(*given))
    show("each alone", lambda: alone(*given))
    for title, own_norms in (("federated", False), ("federated, own norms", True)):
        show(title, lambda title=title, own_norms=own_norms: by_flower(title, own_norms))

    print(f"\nall texts together: {sum(len(text(name)) for name in CLIENTS):,} bytes; the model:", end=" ")
    print(f"{sum(tensor.nbytes for tensor in shared(new_model(), False).values()):,} bytes")
    for title, count in sent.items():
        print(f"{title}: {count:,} bytes sent in {arguments.rounds} rounds")
    print("seconds: " + ", ".join(f"{title} {spent:.0f}" for title, spent in seconds.items() if title != "untrained"))


if __name__ == "__main__":
    main()
