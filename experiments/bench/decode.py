"""The measurement of ``experiments.bench decode``: implementations in turn, their table, file and picture."""

from __future__ import annotations

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from experiments.bench.benchmark import Absent
from experiments.bench.devices import Cpu
from experiments.bench.load import MemoryRates, Others
from experiments.bench.models import load_theirs
from experiments.bench.peers import BURST, MODELS, PROMPTS, WARMED, Peer, joules, peak, peers
from experiments.bench.record import prepare_folder, provenance, text_table
from experiments.util.files import write_atomic

HEADER = ("model", "implementation", "rows", "context", "tokens/s", "of the ceiling", "prompt s", "logits apart",
          "peak MB", "mJ/token")  # fmt: skip


SLOW = 3.0
"""Seconds of a prompt beside which what its first reading has to do first does not count."""


class Case:
    """One implementation of a model with so many rows at one context.

    Attributes:
        seconds: of a token of all rows, one burst after another.
        prompt_seconds: of reading the prompt, after it has been read once, unless that took more than :data:`SLOW`.
        peak_bytes: of memory while the prompt was read and a token decoded, over that before; ``None`` where the system
            does not tell. In one process, whose freed memory is used again, it is a lower bound.
    """

    def __init__(self, name: str, peer: Peer, prompt: Tensor, context: int):
        self.name, self.peer, self.seconds, self.joules = name, peer, list[float](), list[float]()
        self.token = prompt[:, 0].clone()
        with peak() as found:
            for _ in range(2):
                start = time.perf_counter()
                self.logits = peer.read(prompt)
                self.prompt_seconds = time.perf_counter() - start
                if self.prompt_seconds > SLOW:
                    break
            if context > prompt.shape[1]:
                peer.lengthen(context)
            peer.step(self.token)
        self.peak_bytes = found[0] if found else None

    def burst(self) -> None:
        energy, start = joules(), time.perf_counter()
        for _ in range(BURST):
            logits = self.peer.step(self.token)
            self.token = logits.argmax(dim=-1)
        self.seconds.append((time.perf_counter() - start) / BURST)
        if energy is not None and (now := joules()) is not None and now >= energy:  # the counter begins anew at times
            self.joules.append((now - energy) / BURST)

    def row(self, rows: int, ceiling: float, wanted: Tensor) -> dict[str, Any]:
        """Of the bursts that count.

        Args:
            ceiling: tokens per second of one row whose bytes are read once at the memory's rate.
            wanted: seqarch's logits after the prompt.
        """
        median = statistics.median(self.seconds[WARMED:])
        return {
            "implementation": self.name,
            "tokens_per_second": rows / median,
            "share": 1 / median / ceiling,
            "prompt_seconds": self.prompt_seconds,
            "apart": float((self.logits - wanted).abs().max()),
            "peak_bytes": self.peak_bytes,
            "joules": statistics.median(self.joules) / rows if self.joules else None,
            "rounds": len(self.seconds) - WARMED,
        }


@torch.no_grad()
def measure(
    name: str, rows: Sequence[int], contexts: Sequence[int], rounds: int, chosen: Sequence[str], rate: float
) -> Iterator[dict[str, Any]]:
    """Rows of one model; of what cannot run, its reason.

    Args:
        chosen: implementations beside seqarch.
        rate: bytes per second that the memory is read at.
    """
    settings = MODELS[name]
    with TemporaryDirectory() as made:
        folder = Path(made) / "model"
        torch.manual_seed(0)
        load_theirs(settings).save_pretrained(folder)
        makers = {each: make for each, make in peers(folder, settings).items() if each == "seqarch" or each in chosen}
        found, absent = {}, {}
        for each, make in makers.items():
            try:
                found[each] = make()
            except Absent as reason:
                absent[each] = str(reason)
        yield from ({"model": name, "implementation": each, "absent": reason} for each, reason in absent.items())
        for count in rows:
            for context in contexts:
                for row in _at(found, count, context, rounds, rate, settings["vocab_size"]):
                    yield {"model": name, "rows": count, "context": context, **row}


def _at(
    found: dict[str, Peer], rows: int, context: int, rounds: int, rate: float, vocabulary: int
) -> Iterator[dict[str, Any]]:
    """Rows of all implementations at one context."""
    prompt = torch.randint(vocabulary, (rows, min(context, max(PROMPTS))))
    cases: list[Case] = []
    for name, peer in found.items():
        try:
            cases.append(Case(name, peer, prompt, context))
        except Exception as error:  # of whatever kind in a package of somebody's: the others continue
            kind = "" if isinstance(error, Absent) else f"{type(error).__name__}: "
            yield {"implementation": name, "absent": f"{kind}{' '.join(str(error).split())[:300]}"}
    ceiling = rate / found["seqarch"].bytes_per_token  # type: ignore[attr-defined]
    for _ in range(WARMED + rounds):
        for case in cases:
            case.burst()
    yield from (case.row(rows, ceiling, cases[0].logits) for case in cases)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a row that was measured."""
    peak_mb = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    energy = "?" if row["joules"] is None else f"{1e3 * row['joules']:.0f}"
    numbers = f"{row['tokens_per_second']:.1f}", f"{row['share']:.0%}", f"{row['prompt_seconds']:.2f}"
    where = row["model"], row["implementation"], str(row["rows"]), str(row["context"])
    return *where, *numbers, f"{row['apart']:.0e}", peak_mb, energy


def run(options: Namespace) -> None:
    """Measure the models, print a table, and write ``decode.json`` and its picture as each model ends."""
    folder: Path = options.folder
    prepare_folder(folder, ["decode"])
    rate, others, rows = max(MemoryRates().measure().values()), Others(), list[dict[str, Any]]()
    for name in (each for each in MODELS if options.only in each):
        for row in measure(name, options.rows, options.contexts, options.rounds, options.peers, rate):
            rows.append(row)
            print(" ".join(cells(row)) if "absent" not in row else f"{row['model']}: {row}", flush=True)
        kept = {"memory_bytes_per_second": rate, "others": others.share(), "rows": rows}
        write_atomic(folder / "decode.json", json.dumps(kept | provenance(Cpu()), indent=1) + "\n")
    measured = [row for row in rows if "absent" not in row]
    from experiments.bench.decode_plot import draw

    draw(measured, folder / "decode.png")
    print("\n".join(text_table(HEADER, [cells(row) for row in measured], left=HEADER[:2])))
