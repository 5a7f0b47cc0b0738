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
    """Around a pass through ``policy`` (:func:`joined`) and its backward pass: gradients add up in
    each process, and become the mean over all with the ``last`` batch of a step. Those of a parted
    model become so with each batch: until then a process would have all of them."""
    if isinstance(policy, DistributedDataParallel) and not last:
        return policy.no_sync()
    return nullcontext()
