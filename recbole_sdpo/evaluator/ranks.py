"""The rank of every target, kept user by user, so that two models can be compared without running them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector
from torch import Tensor

METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "hit": lambda rank, k: (rank <= k).astype(float),
    "ndcg": lambda rank, k: np.where(rank <= k, 1 / np.log2(rank + 1), 0.0),
    "mrr": lambda rank, k: np.where(rank <= k, 1 / rank, 0.0),
}
"""RecBole's metrics where each user has one target, as functions of its rank (1 is first) and of k."""


def metric_of_ranks(metric: str, rank: np.ndarray) -> np.ndarray:
    """A metric of each target, float64 of ``rank``'s shape.

    Args:
        metric: such as ``HR@1``, ``Hit@1``, ``NDCG@5`` or ``MRR@10``; case does not matter.
        rank: of each target, from 1.

    Raises:
        ValueError: the metric is none of one target's rank.
    """
    name, _, k = metric.lower().replace("hr@", "hit@").partition("@")
    if name not in METRICS or not k.isdecimal() or int(k) < 1:
        raise ValueError(f"metric {metric!r} is not one of a target's rank; valid are HR@k, NDCG@k and MRR@k, such as NDCG@5.")
    return METRICS[name](np.asarray(rank, float), int(k))


class RankCollector(Collector):
    """RecBole's collector, which also keeps the rank of every target since :meth:`take` was last called."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._kept: list[tuple[np.ndarray, ...]] = []

    def eval_batch_collect(self, scores_tensor: Tensor, interaction: Interaction, positive_u: Tensor, positive_i: Tensor) -> None:
        super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        if positive_u is None:  # RecBole's value metrics rank nothing
            return
        user = interaction[self.config["USER_ID_FIELD"]].cpu().numpy()
        if len(user) != len(scores_tensor):  # a row for each candidate, and those of a user together
            user = user[np.concatenate([[True], user[1:] != user[:-1]])]
        rank = target_ranks(scores_tensor, positive_u.to(scores_tensor.device), positive_i.to(scores_tensor.device), max(self.topk))
        self._kept.append((user[positive_u.cpu().numpy()], positive_i.cpu().numpy(), rank.cpu().numpy()))

    def take(self, user_token: np.ndarray, item_token: np.ndarray) -> pd.DataFrame:
        """What was kept, as columns ``user`` and ``item`` in the data's own ids and ``rank``; and begin anew."""
        columns = zip(*self._kept) if self._kept else [np.empty(0, np.int64)] * 3
        user, item, rank = (np.concatenate(parts) if self._kept else parts for parts in columns)
        self._kept = []
        return pd.DataFrame({"user": user_token[user], "item": item_token[item], "rank": rank})


def target_ranks(scores: Tensor, row: Tensor, target: Tensor, top: int) -> Tensor:
    """The rank of each target in its row of ``scores [rows, items]``, from 1, int64 like ``target``.

    Within the ``top`` highest it is the place that ``torch.topk`` gives, by which RecBole counts and which decides ties;
    beyond, one more than the number of higher scores, ``top + 1`` at least.
    """
    order = scores.topk(top, dim=-1).indices[row]
    found = order == target[:, None]
    place = found.int().argmax(-1) + 1
    higher = (scores[row] > scores[row, target][:, None]).sum(-1) + 1
    return torch.where(found.any(-1), place, higher.clamp(min=top + 1))
