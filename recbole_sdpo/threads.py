"""How many threads there may be, and how long they spin while they wait for each other."""

from __future__ import annotations

import os

WAITS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Of GNU's OpenMP, which PyTorch's Linux builds bring: rounds of its loop; of LLVM's and Intel's
(macOS, conda): milliseconds."""


def cores() -> int:
    """Those that this process may use, which a scheduler may have made fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spin_briefly() -> None:
    """Have threads sleep soon in place of spinning on, unless the user has said how they wait.

    A thread that spins takes the core from the one that it waits for, wherever another process has
    the other core. OpenMP reads these variables once, as PyTorch is imported; processes that are
    started from here inherit them.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", *WAITS}:
        os.environ.update(WAITS)
