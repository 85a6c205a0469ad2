"""What ``generate`` of ``transformers`` asks of a model with a state of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.interop.hf.cache import SeqarchCache


class StatefulGeneration:
    """To stand before ``GenerationMixin``: generation whose cache is a :class:`SeqarchCache`."""

    _is_stateful = True
    """No assisted decoding, which takes tokens back; ``generate`` says so."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put an empty cache with room for all that may be generated into the arguments of the calls."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"generate: cache_implementation is {generation_config.cache_implementation!r}, expected None: the"
                " cache is the model's state"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SeqarchCache(room=max_cache_length)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of the next call: without positions, which mixers count, and once reading is done, a mask.

        Raises:
            ValueError: there is no token, or a row ends with padding, after which nothing can be generated.
        """
        if not input_ids.shape[1]:
            raise ValueError(f"generate: input_ids are {list(input_ids.shape)}, expected at least one token a row")
        kwargs.pop("position_ids", None)
        if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"generate: row {row} of attention_mask ends with padding, expected padding on the left")
        past = kwargs.get("past_key_values")
        if past is not None and past.seen and not kwargs.get("is_first_iteration", False):
            attention_mask = None
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
