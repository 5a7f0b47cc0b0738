"""What trains one policy in several processes: torch's ``DistributedDataParallel``."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recbole_sdpo.model import SDPOLLM


def joined(model: SDPOLLM, accelerator: Accelerator) -> nn.Module:
    """``model``, whose gradients become the mean over all processes as a backward pass goes on; in
    a single process as it is.

    Each process must make as many passes through it as any other.
    """
    if accelerator.num_processes == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=model.lm.reads_more_than_text)
