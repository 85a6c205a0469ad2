"""Rounds of decoding: every model at every context in turn, in another order each time, beside the memory's rates.

A drift of the machine meets all models alike, and ratios are of times from one round. A round in which other processes
took more of the machine than is allowed is on record, does not count and is measured again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from experiments.bench.decoding import Condition, Decoder, longest_contexts, points, used_bytes
from experiments.bench.load import MemoryRates, Others
from experiments.bench.measure import rounded
from experiments.util.environment import code_version, hardware, software
from experiments.util.errors import RunnerError
from seqarch.models import LMConfig

MODELS, PREFILL, ROUND = "models", "prefill", "round"
"""The kinds of lines: a condition's models, a pass in which all read their prompts, a round in which all decode."""

ATTEMPTS = 3
"""How often a round is begun before the command gives up on a machine that is busy."""

MEMORY_SHARE = 0.85
"""Of the machine's memory, what models and states together may take."""

Line = Mapping[str, Any]


def counts(line: Line, alone: float) -> bool:
    """Whether others took no more than the share ``alone`` of the machine; where nobody counts that, it is believed."""
    return line["others"] is None or line["others"] <= alone


def missing(condition: Condition, lines: Iterable[Line], alone: float) -> dict[str, list[int]]:
    """The numbers of the passes and of the rounds that have no line that counts."""
    there = {(line["kind"], line["number"]) for line in lines if line["kind"] != MODELS and counts(line, alone)}
    wanted = {PREFILL: condition.passes, ROUND: condition.rounds}
    return {kind: [n for n in range(total) if (kind, n) not in there] for kind, total in wanted.items()}


class Measurement:
    """Measures what is missing of one condition.

    Args:
        configs: the models by name.
        lines: what is on record of this condition.
        add: puts a line on record.
        alone: the share of the machine that others may take.
    """

    def __init__(
        self,
        condition: Condition,
        configs: Mapping[str, LMConfig],
        lines: Sequence[Line],
        add: Callable[[Line], None],
        alone: float,
    ):
        self.condition, self.configs, self._add, self._alone = condition, configs, add, alone
        self._lines = list(lines)

    def run(self) -> bool:
        """Whether nothing is missing any more.

        Raises:
            RunnerError: the lines on record are of another machine, or its memory does not hold the models.
        """
        if not any(missing(self.condition, self._lines, self._alone).values()):
            return True
        with threads(self.condition.threads):
            decoders = self._decoders()
            self._settle(decoders)
            self._each(PREFILL, lambda order: self._prefill(order, decoders))
            for decoder in decoders:
                decoder.warm_up()
            rates = MemoryRates()
            self._each(ROUND, lambda order: self._round(order, decoders, rates))
        return not any(missing(self.condition, self._lines, self._alone).values())

    def _decoders(self) -> list[Decoder]:
        memory = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        longest = longest_contexts(self.configs, self.condition, memory)
        made = []
        for name, config in self.configs.items():
            made.append(Decoder(name, config, self.condition, longest[name]))
            print(f"{self.condition.name}: {name} has read {self.condition.prefilled:,} tokens", flush=True)
        return made

    def _settle(self, decoders: Sequence[Decoder]) -> None:
        """Put the models on record, or check that they are those of the record, on the same machine."""
        line = models_line(self.condition, decoders)
        there = next((each for each in self._lines if each["kind"] == MODELS), None)
        if there is None:
            self._record(line)
            return
        for part in ("models", "hardware", "software"):
            if there[part] != line[part]:
                raise RunnerError(
                    f"{self.condition.name}: the record's {part} are {there[part]} and here {line[part]}; continue on"
                    " that machine, or measure anew in another folder: --results FOLDER"
                )

    def _each(self, kind: str, measure: Callable[[random.Random], dict[str, Any]]) -> None:
        """Measure the passes or the rounds that are missing; give up where the machine is busy again and again."""
        wanted = missing(self.condition, self._lines, self._alone)[kind]
        for number in wanted:
            for _ in range(ATTEMPTS):
                others = Others()
                found = measure(random.Random(number))
                share = others.share()
                line = {"kind": kind, "condition": self.condition.name, "number": number, **found,
                        "others": None if share is None else rounded(share)}  # fmt: skip
                self._record(line)
                text = "" if share is None else f"; others took {share:.0%} of the machine"
                print(f"{self.condition.name}: {kind} {number + 1}, {len(wanted)} were missing{text}", flush=True)
                if counts(line, self._alone):
                    break
            else:
                return

    def _record(self, line: Line) -> None:
        self._lines.append(line)
        self._add(line)

    @staticmethod
    def _prefill(order: random.Random, decoders: Sequence[Decoder]) -> dict[str, Any]:
        seconds = {}
        for decoder in order.sample(decoders, len(decoders)):
            _, found = decoder.prefill()
            seconds[decoder.name] = {str(context): rounded(value) for context, value in found.items()}
        return {"seconds": {decoder.name: seconds[decoder.name] for decoder in decoders}}

    @staticmethod
    def _round(order: random.Random, decoders: Sequence[Decoder], rates: MemoryRates) -> dict[str, Any]:
        bandwidth = {name: rounded(rate) for name, rate in rates.measure().items()}
        seconds: dict[str, dict[str, float]] = {decoder.name: {} for decoder in decoders}
        there = points(decoders)
        for decoder, key in order.sample(there, len(there)):
            seconds[decoder.name][str(key)] = rounded(decoder.seconds_per_token(key))
        ordered = {each.name: {str(key): seconds[each.name][str(key)] for key in each.states} for each in decoders}
        return {"seconds": ordered, "bandwidth": bandwidth}


def models_line(condition: Condition, decoders: Sequence[Decoder]) -> dict[str, Any]:
    """The line of a condition's models: their sizes by formula and as measured, and the machine."""
    found = hardware(torch.device("cpu"))
    found.pop("host")
    return {
        "kind": MODELS,
        "condition": condition.name,
        "models": {decoder.name: _sizes(condition, decoder) for decoder in decoders},
        "hardware": found,
        "software": software(),
        "code": code_version()[0],
    }


def _sizes(condition: Condition, decoder: Decoder) -> dict[str, Any]:
    model, channel = decoder.model, decoder.model.stack.channels()["layer_0"]
    formula = {str(context): model.state_bytes(context, condition.batch) for context in condition.contexts}
    return {
        "parameters": model.num_parameters(),
        "hidden": channel.config.hidden_width,
        "weight_bytes": decoder.weight_bytes,
        "read_weight_bytes": decoder.read_weight_bytes,
        "compiled_layers": sum(said.startswith("compiled") for said in model.stack.explain_one_token()),
        "state_bytes": formula,
        "measured_state_bytes": {str(key): used_bytes(state) for key, state in decoder.states.items()},
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and the compiled kernels work with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
