"""Data-parallel processes wait for every parameter's gradient: each must come, whatever a process's own tokens are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from seqarch.layers import MIXERS
from seqarch.models import LanguageModel, LMConfig


def step(pattern: str, length: int) -> None:
    """Two steps, the first of one token in one process and of many in the other: DDP looks for gaps in the next one."""
    torch.manual_seed(0)
    channels = {"moe": {"num_experts": 16, "expert_bias": True}}
    model = LanguageModel(LMConfig(vocab_size=11, d_model=32, pattern=pattern, depth=1, channels=channels))
    parallel = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        tokens = torch.randint(11, (1, length))
        optimiser.zero_grad()
        logits, _ = parallel(tokens)
        (logits.square().mean() + model.auxiliary_loss()).backward()
        optimiser.step()
    total = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()]).sum()
    both = [torch.zeros_like(total) for _ in range(2)]
    dist.all_gather(both, total)
    assert torch.equal(*both), pattern


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in MIXERS:
        step(f"{name}/moe", (1, 40)[rank])
    step("attention+nsa/swiglu", (1, 40)[rank])
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_of_few_tokens_and_of_many_train_together(tmp_path: Path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
