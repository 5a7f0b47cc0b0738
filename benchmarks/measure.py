"""Seconds, bytes, and the matrix multiplications alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MULTIPLICATIONS = {"aten::mm", "aten::addmm", "aten::bmm"}


def median_seconds(
    sides: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each side, run in turns after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            _wait(device)
            began = time.perf_counter()
            side()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mib(side: Callable[[], object], device: torch.device) -> float:
    """Most MiB of tensors that ``side`` held at a time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        side()
    held = most = 0
    for event in sorted(
        record.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


class _Multiplications(TorchDispatchMode):
    """Notes the operands' shapes of every matrix multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, list]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in MULTIPLICATIONS:
            self.calls.append(
                (
                    function,
                    [
                        (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a
                        for a in args
                    ],
                )
            )
        return function(*args, **(kwargs or {}))


def multiplications_alone(side: Callable[[], object]) -> Callable[[], None]:
    """The matrix multiplications of ``side`` on operands of the same shapes and strides, and
    nothing else of it."""
    with _Multiplications() as noted:
        side()
    stock: dict[tuple, Tensor] = {}

    def operand(spec: object) -> object:
        if not isinstance(spec, tuple):
            return spec
        if spec not in stock:
            shape, stride, dtype, device = spec
            extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
            stock[spec] = torch.randn(extent, dtype=dtype, device=device).as_strided(shape, stride)
        return stock[spec]

    calls = [(function, [operand(spec) for spec in args]) for function, args in noted.calls]

    def replay() -> None:
        for function, args in calls:
            function(*args)

    return replay


class _Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, as torch counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name in MULTIPLICATIONS:
            self.total += flop_registry[function._overloadpacket](
                *args, **(kwargs or {}), out_val=result
            )
        return result


def operations(side: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of ``side``; those inside attention are
    not among them."""
    with _Operations() as counter:
        side()
    return counter.total


def shares(side: Callable[[], object], vocabulary: int) -> dict[str, float]:
    """Of the time that torch's own operations take in ``side`` on a CPU, the share of each kind."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        side()
    kinds = dict.fromkeys(
        ("linear layers", "vocabulary projection", "attention", "optimizer", "the rest"), 0.0
    )
    for event in record.key_averages(group_by_input_shape=True):
        if event.key in MULTIPLICATIONS:
            kind = (
                "vocabulary projection"
                if any(vocabulary in shape for shape in event.input_shapes)
                else "linear layers"
            )
        elif "scaled_dot_product" in event.key:
            kind = "attention"
        else:
            kind = "optimizer" if "adam" in event.key else "the rest"
        kinds[kind] += event.self_cpu_time_total
    total = sum(kinds.values())
    return {kind: value / total for kind, value in kinds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
