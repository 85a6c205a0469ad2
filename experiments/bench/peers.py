"""Decoding beside what one would pick instead, at equal weights: ``experiments.bench decode``.

Mamba and Mamba-2 of 130 million parameters, a Llama of that size, and hybrids in the manner of Qwen3-Next and
Falcon-H1, with random weights that are made by ``transformers`` and read here. Prompts are read, and tokens decoded
after contexts, by seqarch, by ``transformers`` as it is and compiled, by its path through ``mambapy``, and by llama.cpp
where ``llama-cpp-python`` is installed, in turn, round after round. Logits after the prompt are compared.

Beyond the longest prompt a cache of keys and values repeats what was read until it is as long as the context; states of
fixed size stay. A token's time depends on their sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.bench import models
from experiments.bench.baselines import without_gpu_kernels
from experiments.bench.benchmark import Absent
from experiments.bench.decoding import at_length, fill, used_bytes
from experiments.bench.peak_memory import RESET, resident
from seqarch import LanguageModel

BASE = {"vocab_size": models.VOCABULARY, "num_hidden_layers": 12}
MODELS: dict[str, dict[str, Any]] = {
    "llama 130M": models.MODELS["attention"].theirs | BASE,
    "qwen3_next hybrid": models.MODELS["gated_delta_net"].theirs
    | BASE
    | {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 3, "mlp_only_layers": list(range(12))},
    "falcon_h1 hybrid": models.FALCON_H1 | BASE,
    "mamba 130M": models.MAMBA_130M.theirs,
    "mamba2 130M": models.MODELS["mamba2"].theirs | BASE | {"num_hidden_layers": 24},
}
"""Settings of ``transformers``: 12 layers of width 768, 24 where there are no MLPs between."""

PROMPTS = (512, 4096)
CONTEXTS = (512, 4096, 32768)
ROWS = (1, 4)
BURST = 8
"""Tokens whose time is one measurement."""

ROUNDS = 5
WARMED = 2
"""Bursts before the first that counts: the first captures the step, or compiles it."""

COUNTER = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
"""Microjoules that the processor's package took so far; most systems let only root read it."""


PEERS = ("transformers", "transformers, compiled", "transformers, mambapy", "llama.cpp")
"""The implementations beside seqarch."""


class Peer(Protocol):
    """An implementation of one model."""

    def read(self, prompt: Tensor) -> Tensor:
        """Begin anew with a prompt ``[B, T]``: the logits ``[B, vocab]`` after it."""
        ...

    def lengthen(self, context: int) -> None:
        """Have caches hold as many tokens."""
        ...

    def step(self, token: Tensor) -> Tensor:
        """The logits ``[B, vocab]`` after one more token ``[B]``."""
        ...


class Ours:
    def __init__(self, folder: Path):
        self.model = LanguageModel.from_pretrained(folder)
        self.state: Any = None

    def read(self, prompt: Tensor) -> Tensor:
        longest = prompt.shape[1] if prompt.shape[1] < max(PROMPTS) else max(CONTEXTS)
        state = self.model.init_state(len(prompt), max_length=longest + ROOM)
        features, self.state = self.model.features(prompt, state)
        return self.model.logits(features[:, -1])

    def lengthen(self, context: int) -> None:
        fill(self.state)
        self.state = at_length(self.state, context)

    def step(self, token: Tensor) -> Tensor:
        features, self.state = self.model.features(token[:, None], self.state)
        return self.model.logits(features[:, -1])

    @property
    def bytes_per_token(self) -> int:
        """That a token has to read: weights but the embedding, of which it reads rows, and the state."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        tied = self.model.config.tie_embeddings
        return weights - (0 if tied else self.model.embedding.weight.nbytes) + used_bytes(self.state)


ROOM = (WARMED + ROUNDS) * BURST + 8
"""Tokens that are decoded after a context, at most."""


class Theirs:
    """A model of ``transformers``."""

    def __init__(self, folder: Path, settings: dict[str, Any], compiled: bool = False, **variant: Any):
        self.model = without_gpu_kernels(models.load_theirs)(settings | variant, folder).eval()
        self.call: Callable[..., Any] = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.cache: dict[str, Any] = {}

    def read(self, prompt: Tensor) -> Tensor:
        self.cache = {}
        found = self.model(prompt, use_cache=True, logits_to_keep=1)
        name = next(name for name in ("cache_params", "past_key_values") if getattr(found, name, None) is not None)
        self.cache = {name: getattr(found, name)}
        return found.logits[:, -1]

    def lengthen(self, context: int) -> None:
        (cache,) = self.cache.values()
        for layer in cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name, None)
                if isinstance(held, Tensor) and held.numel():
                    times = -(-context // held.shape[-2])
                    setattr(layer, name, held.repeat(1, 1, times, 1)[:, :, :context].contiguous())

    def step(self, token: Tensor) -> Tensor:
        return self.call(token[:, None], use_cache=True, **self.cache).logits[:, -1]


class LlamaCpp:
    """llama.cpp on the file that seqarch writes of the same model."""

    def __init__(self, folder: Path, family: str):
        if find_spec("llama_cpp") is None:
            raise Absent("llama-cpp-python is not installed")
        # A machine with a GPU may have no safetensors.
        from seqarch.pretrained.gguf_architectures import ARCHITECTURES
        from seqarch.pretrained.gguf_file import save_gguf

        if family not in ARCHITECTURES:
            raise Absent(f"llama.cpp's files of {family} are not written")
        self.file = folder / "model.gguf"
        if not self.file.exists():
            save_gguf(LanguageModel.from_pretrained(folder), self.file)
        options = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads(), "verbose": False}
        self.model = import_module("llama_cpp").Llama(str(self.file), n_ctx=max(PROMPTS) + ROOM, n_batch=512, **options)

    def read(self, prompt: Tensor) -> Tensor:
        if len(prompt) > 1:
            raise Absent("its Python interface decodes one row")
        self.model.reset()
        self.model.eval(prompt[0].tolist())
        return self._logits()

    def lengthen(self, context: int) -> None:
        if self.model.n_tokens < context:
            raise Absent(f"its cache is not lengthened beyond {self.model.n_tokens} tokens")

    def step(self, token: Tensor) -> Tensor:
        self.model.eval(token.tolist())
        return self._logits()

    def _logits(self) -> Tensor:
        row = self.model.n_tokens - 1 if self.model.context_params.logits_all else -1
        return torch.tensor(self.model.scores[row], dtype=torch.float32)[None]


def peers(folder: Path, settings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What makes each implementation of a model."""
    found: dict[str, Callable[[], Any]] = {
        "seqarch": lambda: Ours(folder),
        "transformers": lambda: Theirs(folder, settings),
        "transformers, compiled": lambda: Theirs(folder, settings, compiled=True),
        "llama.cpp": lambda: LlamaCpp(folder, settings["model_type"]),
    }
    if settings["model_type"] == "mamba":
        found["transformers, mambapy"] = lambda: Theirs(folder, settings, use_mambapy=True)
    return found


def joules() -> float | None:
    """That the processor took so far; ``None`` where its counter cannot be read."""
    try:
        return 1e-6 * int(COUNTER.read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def peak() -> Iterator[list[int]]:
    """Bytes of resident memory at the peak within, over those before; none where they cannot be measured."""
    found: list[int] = []
    try:
        Path(RESET).write_text("5")
        before = resident("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.append(resident("VmHWM") - before)
