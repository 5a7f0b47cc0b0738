"""The rank of every target, kept user by user, so that two models can be compared without running them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.answers import HIT, OF_ANSWERS, VALID, named
from recbole_sdpo.evaluator.popularity import popularity
from recbole_sdpo.evaluator.titles import TitleCollector

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
        UserError: the metric is none of one target's rank.
    """
    name, _, k = metric.lower().replace("hr@", "hit@").partition("@")
    if name not in METRICS or not k.isdecimal() or int(k) < 1:
        valid = ", ".join(kind.__name__ for kind in OF_ANSWERS.values())
        raise UserError(f"metric {metric!r} is not one of a single target; valid are HR@k, NDCG@k, MRR@k, such as NDCG@5, and {valid}.")
    return METRICS[name](np.asarray(rank, float), int(k))


def metric_of_targets(metric: str, targets: pd.DataFrame) -> np.ndarray | None:
    """A metric of each row of ``ranks.csv``, float64; None for a metric of answers where none were asked for.

    Raises:
        UserError: there is no such metric.
    """
    if metric.lower() not in OF_ANSWERS:
        return metric_of_ranks(metric, targets["rank"].to_numpy())
    if "named" not in targets:
        return None
    valid = targets["named"] != ""
    return (valid & (metric.lower() == "validratio" or targets["named"] == targets["item"])).to_numpy(float)


class Writer(Protocol):
    """A model that answers in words."""

    catalogue: Catalogue

    def answers(self, interaction: Interaction, candidates: np.ndarray) -> list[str]:
        """The answer for each of the interaction's rows, to a prompt with the row's ``candidates [rows, C]``, item ids."""


class RankCollector(TitleCollector):
    """RecBole's collector, which also keeps the rank of every target since :meth:`take` was last called, and its answer.

    Args:
        writer: a language model, who answers where the metrics ask for answers, and to whom items of one title are one.
        popularity_discount: how many times log popularity comes off every score before items are ranked by it.
    """

    def __init__(self, config: Any, catalogue: Catalogue, writer: Writer | None = None, popularity_discount: float = 0.0) -> None:
        super().__init__(config, catalogue)
        self.writer = writer if any(map(self.register.need, (VALID, HIT))) else None
        self.popularity_discount = popularity_discount
        self._by_title = writer is not None
        self._kept: list[pd.DataFrame] = []

    def data_collect(self, train_data: AbstractDataLoader) -> None:
        """As RecBole's, and remember where popularity is to be counted."""
        super().data_collect(train_data)
        self._train = train_data._dataset

    @cached_property
    def _log_popularity(self) -> Tensor:
        """Of each item, or of its title; one is added, for popularity may be 0. Counted only where a discount asks for it."""
        met = popularity(self._train)
        if self._by_title and self._group is not None:
            met = torch.bincount(self._group, weights=met)[self._group]
        return (met + 1).double().log()

    def eval_batch_collect(self, scores_tensor: Tensor, interaction: Interaction, positive_u: Tensor, positive_i: Tensor) -> Tensor:
        if self.popularity_discount:
            scores_tensor = scores_tensor - (self.popularity_discount * self._log_popularity).to(scores_tensor)
        scores_tensor = super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        if positive_u is None:  # RecBole's value metrics rank nothing
            return scores_tensor
        each = len(interaction) // len(scores_tensor)  # a row for each candidate, and those of a target together
        first, place = interaction[np.arange(0, len(interaction), each)], positive_u.cpu().numpy()
        rank = target_ranks(scores_tensor, positive_u.to(scores_tensor.device), positive_i.to(scores_tensor.device), max(self.topk))
        user = first[self.config["USER_ID_FIELD"]].cpu().numpy()
        kept = pd.DataFrame({"user": user[place], "item": positive_i.cpu().numpy(), "rank": rank.cpu().numpy()})
        if self.writer:
            if len(positive_i) != len(scores_tensor):
                raise UserError("A user has several targets, which RecBole ranks together; for answers use recbole_sdpo.quick_start.run.")
            kept["answer"], kept["named"] = self._ask(first, interaction[self.config["ITEM_ID_FIELD"]].view(-1, each).cpu().numpy())
        self._kept.append(kept)
        return scores_tensor

    def _ask(self, rows: Interaction, candidates: np.ndarray) -> tuple[list[str], list[int]]:
        """The answers, and the items that they name or 0; the metrics are told. The target is the first of its candidates."""
        answers, titles = self.writer.answers(rows, candidates), self.writer.catalogue.titles
        places = [named(answer, [titles[item] for item in row]) for answer, row in zip(answers, candidates, strict=True)]
        self.data_struct.update_tensor(VALID, torch.tensor([place is not None for place in places]))
        self.data_struct.update_tensor(HIT, torch.tensor([place == 0 for place in places]))
        return answers, [0 if place is None else row[place] for place, row in zip(places, candidates, strict=True)]

    def get_data_struct(self) -> Any:
        """As RecBole's, which forgets what it has handed out."""
        struct = super().get_data_struct()
        for key in {VALID, HIT} & set(self.data_struct._data_dict):
            del self.data_struct[key]
        return struct

    def take(self, user_token: np.ndarray, item_token: np.ndarray) -> pd.DataFrame:
        """What was kept, in the data's own ids, and begin anew: ``user``, ``item``, ``rank``, and if answers were asked for
        ``answer`` and ``named``, the candidate that it names or nothing."""
        kept = pd.concat(self._kept) if self._kept else pd.DataFrame({"user": [], "item": [], "rank": []}, dtype=np.int64)
        self._kept = []
        if "named" in kept:
            kept["named"] = np.where(kept["named"] > 0, item_token[kept["named"]], "")
        return kept.assign(user=user_token[kept["user"]], item=item_token[kept["item"]])


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
