"""The ``config.json`` of seqarch's own folders as a configuration of ``transformers``."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

import seqarch
from seqarch.checkpoints.building import main_dtype
from seqarch.models import LanguageModel
from seqarch.pretrained.form import FORMAT, OWN, own_config


class SeqarchConfig(PreTrainedConfig):
    """What ``config.json`` of :meth:`seqarch.LanguageModel.save_pretrained` holds, and nothing of its own beside it.

    Attributes:
        model: the options of :class:`seqarch.models.LMConfig`, as a dictionary.
        format: version of the form of the folder.
        seqarch_version: what wrote it.
        plugins: modules to import, which register layers of one's own.
        tokens: ``"bytes"`` where tokens are bytes.
        use_cache: whether evaluation returns the state after the tokens. Training returns it on request alone.
    """

    model_type = OWN
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the name and the form are theirs)

    model: dict = field(default_factory=dict)
    format: int = FORMAT
    seqarch_version: str = seqarch.__version__
    plugins: list = field(default_factory=list)
    tokens: str | None = None
    use_cache: bool = True

    def __post_init__(self, **others: Any):
        super().__post_init__(**others)
        if not isinstance(self.model, dict):
            raise ValueError(f"SeqarchConfig: model is {self.model!r}, expected a dict of the options of an LMConfig")
        if self.format != FORMAT:
            raise ValueError(f"SeqarchConfig: format is {self.format!r}, and this version of seqarch reads {FORMAT}")

    @classmethod
    def of(cls, model: LanguageModel) -> SeqarchConfig:
        """The configuration of a model that is there."""
        dtype = main_dtype((parameter.dtype, parameter.numel()) for parameter in model.parameters())
        described = own_config(model, dtype, seqarch.__version__)
        del described["model_type"]
        return cls(**described)

    @property
    def vocab_size(self) -> int:
        return self.model["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.model["vocab_size"] = value

    @property
    def tie_word_embeddings(self) -> bool:
        return self.model.get("tie_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.model["tie_embeddings"] = value

    @property
    def hidden_size(self) -> int:
        return self.model["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        return self.model["depth"]

    @property
    def logit_scale(self) -> float:
        """Under the name by which ``trl`` finds it, as the next one: it multiplies features by the head itself."""
        return self.model.get("logit_scale", 1.0)

    @property
    def final_logit_softcapping(self) -> float | None:
        return self.model.get("logit_cap")
