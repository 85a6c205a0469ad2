"""Experts that are not all in memory: hit rates, tokens per second and bytes read, ``experiments.bench offload``.

Of a trained model with experts it records where held-out text is routed, a routing for each source of the run's text
and one for needles hidden in code, and replays them with each policy and number of experts in memory, beside the fewest
reads that are possible (Belady 1966: what is used again last makes room). Then it decodes the tokens of such text one
at a time with few experts in memory, each burst right after one with all in memory, round after round: once with the
files in the system's own memory, once with their pages forgotten after each read (``posix_fadvise``), so that each read
is from the disk.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.devices import Cpu
from experiments.bench.load import Others
from experiments.bench.record import prepare_folder, provenance, text_table
from experiments.tasks.needle_text import NeedleText, NeedleTextConfig
from experiments.tasks.text import Text
from experiments.tasks.text_config import TextConfig
from experiments.util.errors import RunnerError
from experiments.util.files import read_json, write_atomic
from seqarch import LanguageModel
from seqarch.checkpoints.errors import CheckpointError
from seqarch.layers.channel.expert_cache import LRU, POLICIES, ExpertCache, ExpertUse
from seqarch.layers.channel.moe import MixtureOfExperts
from seqarch.serving import RoutingTrace, record_routing, replay

TOKENS = 4096
"""Of each routing."""

WINDOW = 512
"""Tokens of it that are read together, at most."""

DECODED = 32
"""Tokens of a burst, whose time is one measurement."""

ROUNDS = 5
BEST = "least possible"
HEADER = ("policy", "in memory", "files", "hit rate", "tokens/s", "MB read a token", "of all in memory")


def shares(experts: int) -> list[int]:
    """Numbers of experts in memory, up to all of them."""
    return sorted({max(1, experts * eighths // 8) for eighths in (0, 1, 2, 3, 4, 6, 8)})


def texts(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Held-out tokens by what they are: of each source of a run's text, and of needles in code.

    Raises:
        RunnerError: the run is not of the task ``text``, on bytes.
    """
    task = config.get("task", {})
    if task.get("name") != "text" or task.get("tokenizer", "bytes") != "bytes":
        raise RunnerError(f"bench offload: the run is of the task {task.get('name')!r}, expected text, on bytes")
    sources = task["sources"] or [{"path": task["path"]}]
    options = {name: value for name, value in task.items() if name not in ("name", "path", "sources")}
    options |= {"validation_tokens": TOKENS, "length": WINDOW, "test_lengths": []}
    found = {each["path"]: _tokens(Text(TextConfig(path=each["path"], **options))) for each in sources}
    needles = NeedleTextConfig(length=WINDOW, validation_examples=-(-TOKENS // WINDOW))
    return found | {"needles in code": _tokens(NeedleText(needles))}


def _tokens(task: Text | NeedleText) -> np.ndarray:
    rows = np.concatenate([batch.tokens for batch in task.evaluation("validation")])
    return rows.reshape(-1, WINDOW)[: TOKENS // WINDOW].astype(np.int64)


def routing_of(model: LanguageModel, tokens: np.ndarray) -> RoutingTrace:
    """Of rows that are read each by itself, one after another."""
    parts = [record_routing(model, torch.from_numpy(row[None])) for row in tokens]
    return RoutingTrace(torch.cat([part.index for part in parts]), parts[0].experts)


def least_possible(routing: RoutingTrace, places: int) -> ExpertUse:
    """The use of caches that know what will be asked for (Belady 1966)."""
    total = ExpertUse()
    for layer in routing.index.unbind(dim=1):
        calls = [sorted(set(token)) for token in layer.tolist()]
        cache = ExpertCache(places, _Foreseeing(calls))
        for call in calls:
            deque(cache.call(call), maxlen=0)
        total += cache.use
    return total


class _Foreseeing(LRU):
    """Gives up what is asked for again last."""

    def __init__(self, calls: Sequence[Sequence[int]]):
        super().__init__()
        self._uses: defaultdict[int, deque[int]] = defaultdict(deque)
        for number, call in enumerate(calls, start=1):
            for expert in call:
                self._uses[expert].append(number)

    def give_up(self, held: Collection[int]) -> int:
        for expert in held:
            while self._uses[expert] and self._uses[expert][0] <= self._calls:
                self._uses[expert].popleft()
        return max(held, key=lambda expert: self._uses[expert][0] if self._uses[expert] else float("inf"))


def replayed(routings: dict[str, RoutingTrace]) -> list[dict[str, Any]]:
    """Rows of hit rates, and reads a token, by text, policy and experts in memory."""
    rows = []
    for text, routing in routings.items():
        for places in shares(routing.experts):
            uses = {name: replay(routing, places, name) for name in POLICIES}
            for name, use in (uses | {BEST: least_possible(routing, places)}).items():
                reads = (use.read + use.ahead) / len(routing.index)
                rows.append({"text": text, "policy": name, "places": places, "hit_rate": use.hit_rate, "reads": reads})
    return rows


class Decoder:
    """A model that decodes the tokens of a text, whatever it would have said itself.

    Attributes:
        seconds: of a token, one burst after another.
    """

    def __init__(self, folder: Path, tokens: Tensor, places: int | None, policy: str, is_cold: bool):
        self.places, self.policy, self.is_cold = places, policy, is_cold
        self.model = LanguageModel.from_pretrained(folder, experts_in_memory=places, expert_policy=policy)
        self.tokens, self.at, self.seconds = tokens, 0, list[float]()
        if self.model.expert_store is not None:
            self.model.expert_store.keep_pages = not is_cold

    @torch.no_grad()
    def burst(self, is_kept: bool = True) -> None:
        """Decode some tokens, the next ones, from a new state."""
        state = self.model.init_state(1, max_length=DECODED)
        start = time.perf_counter()
        for token in self.tokens[self.at : self.at + DECODED]:
            features, state = self.model.features(token.view(1, 1), state)
            self.model.logits(features[:, -1])
        self.at += DECODED
        if is_kept:
            self.seconds.append((time.perf_counter() - start) / DECODED)
        elif self.model.expert_store is not None:
            self.model.expert_store.reset_use()

    def row(self, beside: Sequence[float]) -> dict[str, Any]:
        """Medians.

        Args:
            beside: seconds of a token with all experts in memory, of the burst before each.
        """
        store = self.model.expert_store
        use = ExpertUse() if store is None else store.use
        ratios = [theirs / own for own, theirs in zip(self.seconds, beside, strict=True)]
        return {
            "policy": "all in memory" if store is None else self.policy,
            "places": self.places,
            "files": "" if store is None else "disk" if self.is_cold else "system's memory",
            "hit_rate": 1.0 if store is None else use.hit_rate,
            "tokens_per_second": 1 / statistics.median(self.seconds),
            "bytes_per_token": use.bytes / (DECODED * len(self.seconds)),
            "speed": statistics.median(ratios),
            "memory_bytes": None if store is None else store.memory_bytes,
            "rounds": len(self.seconds),
        }


def decoded(folder: Path, tokens: Tensor, experts: int, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Rows of decoding: the whole model, and each policy with each number of experts in memory, in turn."""
    numbers = sorted({max(1, experts // part) for part in (8, 4, 2, 1)})
    cases = [(places, policy, cold) for cold in (False, True) for places in numbers for policy in POLICIES]
    tokens = tokens.repeat(-(-DECODED * (rounds + 1) // len(tokens)))[: DECODED * (rounds + 1)]
    whole, decoders = Decoder(folder, tokens, None, "lru", False), [Decoder(folder, tokens, *case) for case in cases]
    beside: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for decoder, times in zip(decoders, beside, strict=True):
            whole.at = decoder.at
            whole.burst(is_kept=number > 0)
            times += whole.seconds[-1:]
            decoder.burst(is_kept=number > 0)  # the first captures the step, and fills the caches
    return [whole.row(whole.seconds), *(decoder.row(times) for decoder, times in zip(decoders, beside, strict=True))]


def disk_rate(folder: Path) -> float:
    """Bytes per second of reading a folder's files from the disk, one after another, a megabyte at a time."""
    from seqarch.pretrained.offloading import drop_pages

    read, spent = 0, 0.0
    for file in sorted(folder.glob("*.safetensors")):
        drop_pages(file)
        start = time.perf_counter()
        with file.open("rb", buffering=0) as handle:
            while count := len(handle.read(1 << 20)):
                read += count
        spent += time.perf_counter() - start
    return read / spent


def measure(model_folder: Path, rounds: int = ROUNDS) -> tuple[dict[str, Any], dict[str, RoutingTrace]]:
    """Everything of one model, and the routings by text.

    Raises:
        RunnerError: it is no run's folder of text on bytes, or its model has no experts.
    """
    try:
        model = LanguageModel.from_pretrained(model_folder)
        tokens = texts(read_json(model_folder / "config.json") or {})
        routings = {text: routing_of(model, rows) for text, rows in tokens.items()}
    except (CheckpointError, ValueError) as error:
        raise RunnerError(f"bench offload: {error}") from error
    (mixture, *others) = [each for each in model.modules() if isinstance(each, MixtureOfExperts)]
    others_busy, text = Others(), next(iter(tokens))
    with TemporaryDirectory() as made:
        folder = Path(made) / "model"
        model.save_pretrained(folder)
        rate = disk_rate(folder)
        rows = decoded(folder, torch.from_numpy(tokens[text]).flatten(), mixture.config.num_experts, rounds)
    store = {"layers": 1 + len(others), "experts": mixture.config.num_experts, "top_k": mixture.config.top_k}
    return {
        "model": {**store, "parameters": model.num_parameters(), "d_model": model.config.d_model},
        "text": {"decoded": text, "tokens": {name: int(rows.size) for name, rows in tokens.items()}},
        "disk_bytes_per_second": rate,
        "others": others_busy.share(),
        "replayed": replayed(routings),
        "decoded": rows,
    }, routings


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    places = "all" if row["places"] is None else str(row["places"])
    rates = f"{row['hit_rate']:.1%}", f"{row['tokens_per_second']:.0f}", f"{row['bytes_per_token'] / 1e6:.2f}"
    return row["policy"], places, row["files"], *rates, f"{row['speed']:.2f}"


def run(model: Path, folder: Path) -> None:
    """Measure a run's model; print a table, and write ``offload.json``, its picture and the routings."""
    prepare_folder(folder, ["offload"])
    found, routings = measure(model)
    for number, routing in enumerate(routings.values()):
        routing.save(folder / f"routing_{number}.json")
    write_atomic(folder / "offload.json", json.dumps(found | provenance(Cpu()), indent=1) + "\n")
    from experiments.bench.offload_plot import draw

    draw(found, folder / "offload.png")
    print("\n".join(text_table(HEADER, [cells(row) for row in found["decoded"]], left=HEADER[:3])))
    print(f"written to {folder / 'offload'}.*")
