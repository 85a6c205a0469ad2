"""The processes that train one run together: one, or those that torchrun started.

With one process every function here is the identity, so that their callers have no second path.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, known before :func:`join`."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes the record."""
    return rank() == 0


def is_first_of_machine() -> bool:
    """Whether this is the process that reports for its machine, among those that torchrun started there."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def join(device: torch.device) -> None:
    """Meet the other processes, unless there are none or it is done. Numbers on the CPU travel by gloo."""
    if count() > 1 and not dist.is_initialized():
        gloo = gloo_in_order()
        dist.init_process_group(f"cpu:{gloo},cuda:nccl" if device.type == "cuda" else gloo)


def gloo_in_order() -> str:
    """The name, for ``init_process_group``, of gloo with one worker thread instead of two.

    Each thread notes the name of what it did last in a string that they share, without a lock (torch 2.13,
    ``ProcessGroupGloo::runLoop``). Two that end at once free the same memory, and some later allocation ends the
    process: with eight small exchanges in flight, mostly within half a minute (docs/log.md). Under a name of its own
    the group lacks ``monitored_barrier``, and groups that ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` adds still have two.
    """
    name = "gloo_in_order"
    if name not in dist.Backend.backend_list:
        dist.Backend.register_backend(name, _one_thread, extended_api=True, devices=["cpu"])
    return name


def _one_thread(group: Any, _: Any) -> Any:
    """gloo for a group, as ``init_process_group`` makes it but for the threads."""
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs leave out its options
    names = filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
    interfaces = [gloo.create_device(interface=name) for name in names]
    options = gloo._Options()
    options._devices = interfaces or [gloo.create_default_device()]
    options._threads, options._timeout = 1, group.timeout
    options.group_name, options.global_ranks_in_group = group.group_id, group.global_ranks_in_group
    return gloo(group.store, group.group_rank, group.group_size, options)


def end(code: int) -> NoReturn:
    """End this process: what it registered is done, what it wrote is flushed, and one among several ends right there.

    A worker thread of gloo may still hold the tensors of the last exchange, and needs the interpreter to let go of
    them. Where that is going down already, the thread aborts the process, and torchrun calls a finished run a failure
    (torch 2.13, https://github.com/pytorch/pytorch/issues/190489). ``destroy_process_group`` ends these threads only if
    nobody holds the group, as FSDP2's meshes do; so the interpreter is not taken down at all.
    """
    if count() == 1:
        sys.exit(code)
    if dist.is_initialized() and code == 0:  # With a process that failed, nobody waits for the others.
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Until all are here; by a number on the CPU, which waits for no GPU."""
    total(1)


def add(values: Tensor) -> Tensor:
    """The sum over processes, in place and on the tensor's device."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def total(number: int) -> int:
    """The sum over processes of a number that the host knows."""
    return int(add(torch.tensor(number))) if count() > 1 else number


def gather(value: Any) -> list[Any]:
    """The values that the processes gave, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values
