"""The mixer in a model, without the runner."""

import own_mixer
import torch

from seqarch.models import LanguageModel, LMConfig

config = LMConfig(vocab_size=32, d_model=64, pattern="learnt_retention attention", depth=2)
model = LanguageModel(config)
logits, state = model(torch.randint(32, (2, 50)))
print(own_mixer.__name__, logits.shape, model.state_bytes(50), model.flops(50))
