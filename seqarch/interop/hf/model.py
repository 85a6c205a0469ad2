"""A language model of seqarch as a causal language model of ``transformers``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from seqarch.interop.hf import folders
from seqarch.interop.hf.cache import SeqarchCache
from seqarch.interop.hf.checkpointing import Recomputed
from seqarch.interop.hf.config import SeqarchConfig
from seqarch.interop.hf.generation import StatefulGeneration
from seqarch.interop.hf.lora import adapted
from seqarch.interop.hf.padding import Packed, packing, predicted, real_tokens
from seqarch.models import LanguageModel
from seqarch.models.sharing import tie
from seqarch.models.stack import in_turn
from seqarch.ops.dispatch.checks import show


def wrap(model: LanguageModel) -> SeqarchForCausalLM:
    """The model as one of ``transformers``. It is not copied: parameters, mode and device stay those of the given one.

    Raises:
        ValueError: it is no :class:`seqarch.LanguageModel`, or its ``config`` cannot be written as JSON.
    """
    return SeqarchForCausalLM(model)


class SeqarchForCausalLM(StatefulGeneration, PreTrainedModel, GenerationMixin):
    """A :class:`seqarch.LanguageModel`, as ``model``, with the ways of a model of ``transformers``.

    Made of a model, whose tensors it shares, or of a :class:`SeqarchConfig`, which initialises one. ``from_pretrained``
    reads folders of seqarch's own form, and ``save_pretrained`` writes them, so that ``LanguageModel.from_pretrained``
    reads both.

    **Padding** may stand before or after the tokens of a row, not between them. It is left out: the rows are packed, or
    stay as they are where padding only follows and nobody wants the state. Logits of padding are 0.

    **The state** is ``past_key_values``, a :class:`SeqarchCache`. In evaluation a call returns it unless ``use_cache``
    is false, in training only if that is true.

    **The loss** is that of ``transformers`` for causal language models; a token right after padding, which nothing
    predicts, does not count. In training, the layers' own terms (a router's,
    an indexer's) are added, in the share of the targets that this call has of ``num_items_in_batch``.
    """

    config: SeqarchConfig
    config_class = SeqarchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["StackLayer"]  # noqa: RUF012 (these names and forms are theirs)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SeqarchConfig | LanguageModel):
        model = config if isinstance(config, LanguageModel) else None
        described = SeqarchConfig.of(config) if isinstance(config, LanguageModel) else config
        if not isinstance(described, SeqarchConfig):
            raise ValueError(f"SeqarchForCausalLM: got {show(config)}, expected a LanguageModel or a SeqarchConfig")
        super().__init__(described)
        self.gradient_checkpointing = False
        self.model = folders.language_model(self.config) if model is None else model
        if (settings := folders.generation_settings(self.model)) is not None:
            self.generation_config = GenerationConfig.from_dict(settings)
        self.train(self.model.training)
        self.register_load_state_dict_pre_hook(folders.add_prefix)
        self.post_init()

    @property
    def base_model(self) -> Backbone:  # type: ignore[override]
        return Backbone(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SeqarchCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits ``[B, T, vocab_size]``, the loss of ``labels`` and the state after the tokens.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: 1 for each token and 0 for padding, ``[B, T]``, or with a state ``[B, earlier + T]``.
            position_ids: checked alone, but in one row without padding and state, where each 0 starts a sequence:
                packed sequences know nothing of one another.
            past_key_values: the state after earlier tokens, which the call goes on from and changes.
            labels: ``[B, T]``, the tokens themselves. Those of -100 do not count, nor does a first one after padding.
            use_cache: whether the state is returned.
            logits_to_keep: of the last so many columns, or of the columns of these indices, alone; 0 for all.
            num_items_in_batch: what the sum of the losses is divided by, in place of the labels that count here.
            cu_seq_lens_q, seq_idx: the boundaries of packed sequences, or the number of each token's sequence, in place
                of ``position_ids``.
            cu_seq_lens_k, max_length_q, max_length_k: what collators give beside them; not looked at.
            inputs_embeds, output_attentions, output_hidden_states: refused, but for ``None`` and ``False``.

        Raises:
            ValueError: an argument is of another kind or shape, or asks for what there is not.
        """
        _refuse(
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        _check_labels(labels, input_ids, logits_to_keep)
        packed = Packed(position_ids, cu_seq_lens_q, seq_idx)
        features, cache = self.features(input_ids, attention_mask, past_key_values, use_cache, packed)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(features[:, kept])
        loss = None
        if labels is not None:
            labels = predicted(labels, attention_mask)
            options = {"vocab_size": logits.shape[-1], "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **options)
            if self.training:
                loss = loss + self._own_terms(labels, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def features(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: SeqarchCache | None = None,
        use_cache: bool | None = None,
        sequences: Packed | None = None,
    ) -> tuple[Tensor, SeqarchCache | None]:
        """What the head reads, ``[B, T, D]`` with zeros for padding, and the state if it is wanted; as :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`.
        """
        tokens, cache = _check_tokens(input_ids), _check_cache(past_key_values)
        seen = 0 if cache is None else cache.seen
        real = real_tokens(attention_mask, tokens, seen)
        ends = None if sequences is None else sequences.boundaries(tokens, real, seen)
        keep = self._keeps_state(use_cache, cache, packed=ends is not None)
        state = None
        if keep and cache is None:
            cache = SeqarchCache()
        if keep and cache is not None:
            state = cache.state
            if state is None and cache.room is not None:
                state = self.model.init_state(len(tokens), max_length=cache.room)
        packed = None if real is None else packing(real, state_wanted=keep)
        if packed is not None:
            features, after = self.model.features(packed.pack(tokens), state, packed.cu_seqlens)
            features = packed.unpack(features)
        else:
            features, after = self.model.features(tokens, state, ends, real)
        if keep and cache is not None:
            cache.keep(after, *tokens.shape)
        return features, cache if keep else None

    def _keeps_state(self, use_cache: bool | None, cache: SeqarchCache | None, packed: bool) -> bool:
        """Whether a call carries a state on and returns it.

        Raises:
            ValueError: it is asked for where there is none to be had.
        """
        if packed and (use_cache or cache is not None):
            raise ValueError(
                "sequences packed into one row leave a state each: expected use_cache=False, no past state"
            )
        if cache is not None and use_cache is False:
            raise ValueError("past_key_values were given with use_cache=False: expected either of them")
        if use_cache is None:
            use_cache = cache is not None or (not self.training and self.config.use_cache)
        return use_cache and not packed

    def _own_terms(self, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The layers' terms of the loss of this call, in its share of all targets of an optimizer step."""
        terms = self.model.auxiliary_loss()
        if num_items is None:
            return terms
        counted = labels[:, 1:] != -100
        items = num_items.to(terms.device) if isinstance(num_items, Tensor) else num_items
        return terms * counted.sum().to(terms.device) / items

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        """As in ``transformers``; ``model.config`` has the new ``vocab_size`` too."""
        embeddings = super().resize_token_embeddings(*arguments, **options)
        self.config.vocab_size = embeddings.num_embeddings
        self.model.config = dataclasses.replace(self.model.config, vocab_size=embeddings.num_embeddings)
        return embeddings

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As ``is_activation_checkpointing``; ``peft`` asks by this name, of which ``transformers`` would warn."""
        return self.gradient_checkpointing

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        stack = self.model.stack
        if stack.schedule is not in_turn and not isinstance(stack.schedule, Recomputed):
            raise ValueError(f"gradient checkpointing: the stack has a schedule of its own, {show(stack.schedule)}")
        stack.schedule = Recomputed(gradient_checkpointing_func, every_n_layers) if enable else in_turn
        self.gradient_checkpointing = enable

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every layer has initialised itself."""

    def _move_missing_keys_from_meta_to_device(self, *arguments: Any, **options: Any) -> None:
        """As in ``transformers``, but buffers that are in no file keep their numbers, or are 0 as in a new model."""
        before = dict(self.named_non_persistent_buffers())
        super()._move_missing_keys_from_meta_to_device(*arguments, **options)
        tie(self.model.stack.shared)  # a buffer of layers that share one has become one for each
        for name, buffer in self.named_non_persistent_buffers():
            buffer.zero_() if before[name].is_meta else buffer.copy_(before[name])

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        folders.check_loaded(loading_info, self.all_tied_weights_keys, str(self.config.name_or_path))

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> None:
        """Write a folder of seqarch's own form, by ``transformers``; its options are ``max_shard_size`` and others.

        As there, what lies in the folder stays, but for the files of an earlier model. To write the form of a family,
        use ``model.save_pretrained(path, family="mamba2")`` of the model inside.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, **options)
            return
        if adapted(self.model):
            raise ValueError(
                "the model has adapters inside: expected peft's save_pretrained, which writes these alone, or"
                " seqarch.interop.hf.merge before"
            )
        state = self.state_dict() if state_dict is None else state_dict
        named = folders.file_names(state, self.config.tie_word_embeddings)
        super().save_pretrained(save_directory, is_main_process, named, **options)
        if is_main_process:
            folders.carry(Path(save_directory), self.model)
            folders.record(Path(save_directory), self.model)


class Backbone:
    """The model without its head, as ``trl`` calls it; all else is the model's."""

    def __init__(self, model: SeqarchForCausalLM):
        self._model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SeqarchCache | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        packed = Packed(position_ids, cu_seq_lens_q, seq_idx)
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict"):
            others.pop(name, None)
        _refuse(**others)
        features, cache = self._model.features(input_ids, attention_mask, past_key_values, use_cache, packed)
        return BaseModelOutputWithPast(last_hidden_state=features, past_key_values=cache)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _refuse(**given: Any) -> None:
    """Raise where something is asked for that there is not.

    Raises:
        ValueError: an argument is neither ``None`` nor false; it is named.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} was given, and a model of seqarch neither takes nor returns such")


def _check_tokens(input_ids: Any) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        given = f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else show(input_ids)
        raise ValueError(f"input_ids are {given}, expected integers [B, T]")
    return input_ids


def _check_cache(past: Any) -> SeqarchCache | None:
    if past is not None and not isinstance(past, SeqarchCache):
        raise ValueError(f"past_key_values is {type(past).__name__}, expected a SeqarchCache that a call returned")
    return past


def _check_labels(labels: Any, tokens: Any, logits_to_keep: Any) -> None:
    """Raise unless there are none, or one for each token, and logits for each."""
    if labels is None or not isinstance(tokens, Tensor):
        return
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.dtype != torch.int64:
        given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else show(labels)
        raise ValueError(f"labels are {given}, expected torch.int64 {list(tokens.shape)}, as input_ids")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError(f"logits_to_keep is {show(logits_to_keep)} beside labels, which need all logits: expected 0")
