"""Documents streamed: each row's state goes on from step to step, and begins anew where a document does."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.config.carrying import grows
from experiments.config.schema import RunConfig
from experiments.runs.folder import RunFolder
from experiments.tasks import Batch
from experiments.training.loop import Run
from experiments.util.errors import ConfigError
from seqarch.layers import MIXERS, build_mixer
from tests.support.runs import last, same, tensors, tiny_config, train_here
from tests.support.variants import VARIANTS

LENGTH, ROWS = 24, 4
BOUNDED = ["gated_delta_net", "mamba2", "sliding_window", "longformer", "based", "mlstm", "retention", "rwkv7", "rg_lru"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        words = random.Random(number).choices("abcdefgh \n", k=30 + 5 * number)
        (folder / f"{number}.txt").write_text("".join(words))
    return folder


def streamed(texts: Path, runs: Path, **changes) -> RunConfig:
    task = {"name": "text", "path": str(texts), "documents": "streamed", "length": LENGTH, "data_cache": str(runs / "c")}
    task |= {"validation_tokens": 256, "test_tokens": 256}
    train = {"steps": 6, "batch_size": ROWS, "lr": 1e-3, "eval_every": 6, "threads": 1, "device": "cpu", "save_every": 2}
    return tiny_config(runs, **{"task": task, "train": train, "model__pattern": "mamba2", **changes})


def prepared(texts: Path, runs: Path, **changes) -> Run:
    config = streamed(texts, runs, **changes)
    return Run(config, RunFolder(config.folder()))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def losses_of_texts(run: Run, batches: list[Batch]) -> np.ndarray:
    """The loss of each batch, by the model on each text of each row alone, from where the row or the text begins."""
    tokens, targets, begins = (
        np.concatenate([getattr(b, name) for b in batches], 1) for name in ("tokens", "targets", "begins")
    )
    losses = []
    for row in range(len(tokens)):
        parts = [part for part in np.split(np.arange(tokens.shape[1]), np.flatnonzero(begins[row])) if len(part)]
        own = [run.model(torch.tensor(tokens[row, part])[None])[0][0] for part in parts]
        losses.append(F.cross_entropy(torch.cat(own), torch.tensor(targets[row]), reduction="none").numpy())
    return np.stack(losses).reshape(len(tokens), len(batches), -1).mean(axis=(0, 2))


class TestStates:
    @pytest.mark.parametrize("name", BOUNDED)
    def test_losses_are_those_of_each_document_read_at_once(self, texts, tmp_path, double, name):
        """In whatever micro-batches and segments, over steps in which documents begin within windows and do not."""
        options = {"model__pattern": name, "model__depth": 2, "model__mixers": {name: VARIANTS.get(name, [{}])[-1]}}
        for changes in ({}, {"train__micro_batch": 3, "train__bptt": 10}):
            run = prepared(texts, tmp_path, **options, **changes)
            batches = [run.data.source(0, 0).batch(0, number) for number in range(8)]
            assert any(batch.begins[:, 1:].any() for batch in batches)
            found = [run.engine.gradients(run.model, batch, None, run.carried).item() for batch in batches]
            np.testing.assert_allclose(found, losses_of_texts(run, batches), rtol=1e-9)

    def test_what_the_grows_and_what_not(self):
        def grown(name: str) -> bool:
            return grows(build_mixer(name, d_model=32, **VARIANTS.get(name, [{}])[-1]))

        assert {name for name in MIXERS if grown(name)} == {
            *("attention", "mla", "big_bird", "moba", "dsa", "nsa", "hyena")
        }
