"""One model of which each process of a launch has a part (torch's FSDP2).

The weights of a layer come together for its pass, and part again after it::

    process 0   |#####.....|  all of layer 3  |#####.....|      ##### has, ..... has not
    process 1   |.....#####|  all of layer 3  |.....#####|
                              while it runs

So every process must make every pass, and ask for a whole weight when the others do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor


def part(
    model: nn.Module,
    layers: Iterable[nn.Module],
    methods: Sequence[str],
    device: torch.device,
    offload: bool = False,
) -> None:
    """Leave each process with its part of ``model``.

    Args:
        layers: of the model, each of which comes together by itself; the rest is one, too.
        methods: of ``model`` that make passes, beside ``forward``.
        device: where a layer comes together, and where the parts are.
        offload: keep the parts and their gradients on the CPU.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    on_the_host = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    policy = on_the_host if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_parted(model: nn.Module) -> bool:
    """Has each process a part of ``model``?"""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def own(weight: Tensor) -> Tensor:
    """This process's part of ``weight``, in the same memory; all, where it is not parted."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def all_of(weight: Tensor) -> Tensor:
    """All of ``weight``."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def parted_as(like: Tensor, weight: Tensor) -> Tensor:
    """``weight``, which each process has all of, parted as ``like`` is, and where that is."""
    weight = weight.to(like.device)
    if not isinstance(like, DTensor):
        return weight
    # which goes to the device that computes
    parted = distribute_tensor(weight, like.device_mesh, like.placements, src_data_rank=None)
    return parted.to(like.device)


def gathered(weights: Iterable[tuple[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
    """Named weights, whole and on the CPU, for a process that is to ``keep`` them; one by one, so
    that no other process holds more than one. What is tied stays one tensor."""
    full: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, weight in weights:
        value, place = all_of(weight), own(weight).data_ptr()
        if keep:
            full[name] = full[first[place]] if place in first else value.cpu()
            first.setdefault(place, name)
    return full
