"""Training by ``transformers.Trainer``, ``trl`` and ``accelerate``: slow, for what these packages import alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seqarch.interop.hf as hf
from seqarch import LanguageModel
from seqarch.testing import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

TEXTS = ["the cat sat on the mat.", "a dog ran.", "she sells sea shells by the sea shore.", "to be or not to be."]
LETTERS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ."]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model_of(pattern: str = "mamba2 attention", **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**{"vocab_size": 32, "d_model": 32, "pattern": pattern, "depth": 2, **options})


def trainer(model: nn.Module, folder: Path, count: int = 32, callbacks: Any = None, **options: Any) -> Any:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    words = tokenizer()
    data: Any = [{"input_ids": words(text)["input_ids"]} for text in TEXTS * (count // len(TEXTS))]
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2}
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    return Trainer(model, arguments, collator, data, data[:8], callbacks=callbacks)


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_parts_of_a_batch_are_the_batch_and_training_learns(tmp_path: Path):
    """Rows differ in their lengths, so that parts differ in how many targets they have."""
    found = []
    for size, parts in ((8, 1), (2, 4)):
        model = model_of("mamba2 attention/moe", channels={"moe": {"load_balance_weight": 0.0, "router_z_weight": 0.0}})
        sgd = {"optim": "sgd", "max_grad_norm": 0.0}
        run = trainer(
            hf.wrap(model),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=3,
            **sgd,
        )
        assert run.model_accepts_loss_kwargs
        run.train()
        found.append(parameters(model))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-5, "in parts")
    run = trainer(hf.wrap(model_of()), tmp_path, per_device_train_batch_size=8, num_train_epochs=10)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before / 2


def test_a_training_that_resumes_is_one_that_was_not_stopped(tmp_path: Path):
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 6, "gradient_checkpointing": True}
    whole = model_of(tie_embeddings=True)
    trainer(hf.wrap(whole), tmp_path / "a", save_strategy="steps", save_steps=3, **options).train()
    for size in ({}, {"max_shard_size": "20KB"}):
        checkpoint = tmp_path / "a" / "checkpoint-3"
        hf.wrap(LanguageModel.from_pretrained(checkpoint, verify=True)).save_pretrained(checkpoint, **size)
        resumed = model_of(tie_embeddings=True)
        trainer(hf.wrap(resumed), tmp_path / "b", **options).train(resume_from_checkpoint=str(checkpoint))
        assert all(map(torch.equal, parameters(resumed), parameters(whole)))
    last = LanguageModel.from_pretrained(tmp_path / "a" / "checkpoint-6")
    assert all(map(torch.equal, parameters(last), parameters(whole)))


def test_routers_move_their_biases_once_per_step(tmp_path: Path):
    model = model_of("mamba2 attention/moe", channels={"moe": {"expert_bias": True, "bias_rate": 0.125}})
    run = trainer(hf.wrap(model), tmp_path, callbacks=[hf.RouterUpdates()], max_steps=3, gradient_accumulation_steps=2)
    run.train()
    bias = model.stack.layers[1].channel.router.expert_bias  # type: ignore[union-attr]
    steps = bias / 0.125
    assert torch.equal(steps, steps.round())
    assert 0 < steps.abs().max() <= 3


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_supervised_finetuning_by_trl(lora: bool, packed: bool, tmp_path: Path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model = model_of("mamba2/moe attention", logit_scale=0.5, logit_cap=20.0, embedding_std=1.0)
    wrapped, before = hf.wrap(model), parameters(model)
    targets: Any = hf.lora_targets(wrapped)
    settings: dict[str, Any] = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_length": 64,
    }
    arguments = SFTConfig(
        str(tmp_path),
        learning_rate=2e-2,
        per_device_train_batch_size=4,
        num_train_epochs=4,
        logging_steps=1,
        packing=packed,
        **settings,
    )
    run = SFTTrainer(
        wrapped,
        arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS * 8}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, **targets) if lora else None,
    )
    rows = run.data_collator([run.train_dataset[i] for i in range(2)])
    loss = run.compute_loss(run.model, dict(rows), num_items_in_batch=None)
    own = {name: each for name, each in rows.items() if name != "labels"}
    expected = wrapped.loss_function(wrapped(**own).logits, rows["labels"], vocab_size=32)
    assert_close(loss, expected, 1e-5, "the loss by trl's own head")
    run.train()
    history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert history[-1] < 0.8 * history[0]
    changed = [not torch.equal(a, b) for a, b in zip(parameters(model), before, strict=False)]
    assert lora or sum(changed) > len(changed) // 2
    if lora:
        run.save_model(str(tmp_path / "adapter"))
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
        after = hf.merge(run.model)
        after.save_pretrained(tmp_path / "merged")
        assert LanguageModel.from_pretrained(tmp_path / "merged").config == model.config


def test_accelerate_trains_in_bfloat16(tmp_path: Path):
    from accelerate import Accelerator

    model = model_of("mamba2 attention")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped, optimizer = accelerator.prepare(hf.wrap(model), torch.optim.AdamW(model.parameters(), lr=1e-2))
    tokens, losses = torch.randint(32, (4, 12)), []
    mask = torch.ones_like(tokens).tril(8).flip(1)
    for _ in range(8):
        loss = wrapped(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    accelerator.save_model(copy.deepcopy(accelerator.unwrap_model(wrapped)), str(tmp_path / "accelerate"))
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path / "model", save_function=accelerator.save)
    assert all(map(torch.equal, parameters(LanguageModel.from_pretrained(tmp_path / "model")), parameters(model)))
