"""A model as a folder: ``config.json``, safetensors and a tokenizer, read and written.

``LanguageModel.from_pretrained(path)`` reads folders of seqarch's own, those of ``transformers`` whose family
:mod:`seqarch.interop` knows, and a run's; ``model.save_pretrained(path)`` writes the first two.
"""

from seqarch.pretrained.loading import from_pretrained
from seqarch.pretrained.offloading import ExpertStore
from seqarch.pretrained.saving import save_pretrained

__all__ = ["ExpertStore", "from_pretrained", "save_pretrained"]
