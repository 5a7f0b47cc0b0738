"""What it costs to recommend: the time for one user's best items, the same for every model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader
from recbole.trainer import Trainer

TOP = 10
"""Items that a user gets."""

USERS = 32
"""Users that are timed at most."""

BUDGET = 2.0
"""Seconds after which no further user is timed."""


def top_time(
    trainer: Trainer,
    loader: FullSortEvalDataLoader,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time the ten best items of the whole catalogue for one user after the other.

    The first of them warms up and does not count, unless it takes the whole budget.

    Args:
        trainer: which has evaluated such a ``loader`` before.
        loader: of the users, of whom some are taken at equal distances.
        clock: in seconds.

    Returns:
        ``ms``, the median of milliseconds for a user, and ``users``, how many were timed.
    """
    places = np.linspace(0, loader.sample_size - 1, min(loader.sample_size, USERS + 1))
    trainer.model.eval()
    seconds: list[float] = []
    for place in places.astype(int):
        batch = loader.collate_fn([place])
        began = clock()
        with torch.no_grad():
            _, scores, *_ = trainer._full_sort_batch_eval(batch)
            scores.topk(min(TOP, scores.shape[1])).indices.cpu()  # waits for a GPU
        seconds.append(clock() - began)
        if sum(seconds) >= BUDGET:
            break
    timed = seconds[1:] or seconds
    return {"ms": round(1000 * float(np.median(timed)), 3), "users": len(timed)}
