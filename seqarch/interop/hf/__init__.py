"""Language models as models of ``transformers``: its loading, generation and training, and ``peft``'s adapters.

To import this registers :class:`SeqarchConfig` and :class:`SeqarchForCausalLM` with ``AutoConfig`` and
``AutoModelForCausalLM``, which then load the folders that ``LanguageModel.save_pretrained`` writes. Nothing else in
seqarch imports ``transformers``.

    import seqarch.interop.hf as hf

    model = hf.wrap(LanguageModel(vocab_size=256, d_model=64, pattern="mamba2", depth=2))
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from seqarch.interop.hf.cache import SeqarchCache
from seqarch.interop.hf.config import SeqarchConfig
from seqarch.interop.hf.lora import lora_targets, merge
from seqarch.interop.hf.model import SeqarchForCausalLM, wrap
from seqarch.interop.hf.routers import RouterUpdates

__all__ = ["RouterUpdates", "SeqarchCache", "SeqarchConfig", "SeqarchForCausalLM", "lora_targets", "merge", "wrap"]

AutoConfig.register(SeqarchConfig.model_type, SeqarchConfig, exist_ok=True)
AutoModelForCausalLM.register(SeqarchConfig, SeqarchForCausalLM, exist_ok=True)
