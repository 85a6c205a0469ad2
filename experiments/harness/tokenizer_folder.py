"""A model's tokenizer as a folder that ``transformers.AutoTokenizer`` reads: tasks that make their own texts, such as
those of RULER, measure lengths by it.
"""

from __future__ import annotations

import json
from pathlib import Path

from seqarch.checkpoints.tokenizers import FILE, ByteTokenizer
from seqarch.models import LanguageModel


def write_tokenizer(model: LanguageModel, folder: Path) -> None:
    """Write the tokenizer into an empty folder; one of bytes becomes one that counts a token for each byte."""
    tokenizer = model.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        _of_bytes(folder / FILE)
    else:
        tokenizer.tokenizer.save(str(folder / FILE))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _of_bytes(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.save(str(path))
