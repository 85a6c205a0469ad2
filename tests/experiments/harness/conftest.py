"""Tasks, a tokenizer and models for the harness, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from experiments.tasks.text_tokens import train_tokenizer

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
SENTENCES = [f"after {word} comes {WORDS[(i + 1) % 6]}." for i, word in enumerate(WORDS)]

KINDS = {
    "next_word": """
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "finish": """
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: " {{next}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks: a choice among words, whole texts, and texts to be finished."""
    folder = tmp_path_factory.mktemp("lm_eval") / "tasks"
    folder.mkdir()
    entries = [
        {"text": text, "start": text.rpartition(" ")[0], "next": WORDS[(i + 1) % 6]}
        | {"choices": WORDS, "label": (i + 1) % 6}
        for i, text in enumerate(SENTENCES)
    ]
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for name, kind in KINDS.items():
        source = f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n{source}{kind}metadata: {{version: 2}}\n"
        )
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(SENTENCES * 20, 290, "<|endoftext|>"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def theirs(tokenizer_file, tmp_path_factory) -> Path:
    """A folder of the ``transformers`` library, of random weights, with a tokenizer."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    settings = transformers.MambaConfig(
        vocab_size=290,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.MambaForCausalLM(settings)
    torch.nn.init.normal_(model.backbone.embeddings.weight, std=1.0)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(tokenizer_file)))
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder
