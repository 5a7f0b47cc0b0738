"""What trains one policy in several processes: torch's ``DistributedDataParallel``, or FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recbole_sdpo.lm.parts import is_parted
from recbole_sdpo.model import SDPOLLM


def joined(model: SDPOLLM, accelerator: Accelerator) -> nn.Module:
    """``model``, whose gradients become the mean over all processes as a backward pass goes on; in
    a single process as it is.

    Each process must make as many passes through it as any other.
    """
    if accelerator.num_processes == 1 or is_parted(model):
        return model
    return DistributedDataParallel(
        model,
        find_unused_parameters=model.lm.may_leave_weights_out,
        gradient_as_bucket_view=True,  # gradients once, and not twice
    )


def adding_up(policy: nn.Module, last: bool) -> AbstractContextManager[None]:
    """To be entered around each batch's passes through ``policy`` (:func:`joined`), forward and
    backward: gradients add up in each process, and the ``last`` batch of a step makes of them the
    mean over all. In a parted model each batch does, for its processes have no room for all."""
    if isinstance(policy, DistributedDataParallel) and not last:
        return policy.no_sync()
    return nullcontext()
