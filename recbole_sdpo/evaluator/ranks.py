"""The rank of every target, user by user, so that models can be compared without another run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from logging import getLogger
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import DataStruct
from torch import Tensor

from recbole_sdpo.checks.metrics import metric_key
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.answers import HIT, OF_ANSWERS, VALID, named
from recbole_sdpo.evaluator.titles import TitleCollector

METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "hit": lambda rank, k: (rank <= k).astype(float),
    "ndcg": lambda rank, k: np.where(rank <= k, 1 / np.log2(rank + 1), 0.0),
    "mrr": lambda rank, k: np.where(rank <= k, 1 / rank, 0.0),
}
"""RecBole's metrics where each user has one target, as functions of its rank, from 1, and of k."""

TIED = 0.1
"""Share of targets, maybe within the largest ``topk``, with the score of another candidate, from
which a run warns of it."""

THIRDS = ["head", "middle", "tail", "cold"]
"""Groups of items by popularity: thirds of the interactions in training, and what none holds."""


def third_of(met: np.ndarray) -> np.ndarray:
    """The group of :data:`THIRDS` of each item, by how many users met it, ``[items]``.

    An item is of the head if those that more users met have less than a third of all interactions,
    and of the middle if they have less than two thirds. Items that as many met are of one group.
    ::

        met            9  4  4  3  2  2  1  1  1  0      27 interactions
        by more users  0  9  9  17 20 20 24 24 24 27
        group          h  m  m  m  t  t  t  t  t  cold
    """
    most_first = np.sort(met)[::-1]
    so_far = np.concatenate([[0], most_first.cumsum()])
    by_more = so_far[np.searchsorted(-most_first, -met)]
    third = np.where(met > 0, 3 * by_more // max(int(met.sum()), 1), THIRDS.index("cold"))
    return np.array(THIRDS)[third]


def metric_of_ranks(metric: str, rank: np.ndarray) -> np.ndarray:
    """A metric of each target, float64 of ``rank``'s shape.

    Args:
        metric: such as ``HR@1``, ``Hit@1``, ``NDCG@5`` or ``MRR@10``; case does not matter.
        rank: of each target, from 1.

    Raises:
        UserError: the metric is none of one target's rank.
    """
    name, _, k = metric_key(metric).partition("@")
    if name not in METRICS or not k.isdecimal() or int(k) < 1:
        others = ", ".join(kind.__name__ for kind in OF_ANSWERS.values())
        raise UserError(
            f"metric {metric!r} is not one of a single target; "
            f"it must be one of HR@k, NDCG@k, MRR@k, such as NDCG@5, {others}."
        )
    return METRICS[name](np.asarray(rank, float), int(k))


def metric_of_targets(metric: str, targets: pd.DataFrame) -> np.ndarray | None:
    """A metric of each row of ``ranks.csv``, float64; None for one of answers where there are none.

    Raises:
        UserError: there is no such metric.
    """
    if metric.lower() not in OF_ANSWERS:
        return metric_of_ranks(metric, targets["rank"].to_numpy())
    if "named" not in targets:
        return None
    valid = targets["named"] != ""
    hit = valid & (targets["named"] == targets["item"])
    return (valid if metric.lower() == "validratio" else hit).to_numpy(float)


class Writer(Protocol):
    """A model that answers in words."""

    catalogue: Catalogue

    def answers(self, interaction: Interaction, candidates: np.ndarray) -> list[str]:
        """The answer to the prompt of each row with its ``candidates [rows, C]``, item ids."""


class RankCollector(TitleCollector):
    """RecBole's collector, which also keeps the rank of every target, and its answer, until
    :meth:`pop_ranks`.

    Args:
        writer: a language model, who answers where the metrics ask for answers, and to whom items
            of one title are one.
        popularity_discount: how many times log popularity comes off every score before items are
            ranked by it.
    """

    def __init__(
        self,
        config: Any,
        catalogue: Catalogue,
        writer: Writer | None = None,
        popularity_discount: float = 0.0,
    ) -> None:
        super().__init__(config, catalogue)
        self.writer = writer if any(map(self.register.need, (VALID, HIT))) else None
        self.popularity_discount = popularity_discount
        self._by_title = writer is not None
        self._batches: list[pd.DataFrame] = []
        self._ranks: list[pd.DataFrame] = []  # of the evaluation before

    @cached_property
    def _third(self) -> np.ndarray:
        """Each item's group by popularity, ``[items]``."""
        return third_of(self._counts[1])

    @cached_property
    def _log_popularity(self) -> Tensor:
        """Of each item, or of its title; 1 is added, as it may be 0."""
        met = self._met
        if self._by_title and self._group is not None:
            met = torch.bincount(self._group, weights=met)[self._group]
        return (met + 1).double().log()

    def eval_batch_collect(
        self,
        scores_tensor: Tensor,
        interaction: Interaction,
        positive_u: Tensor,
        positive_i: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        scores = scores_tensor
        if self.popularity_discount:
            scores = scores - (self.popularity_discount * self._log_popularity).to(scores)
        # RecBole's collector takes its top items here, so that a discount must come first.
        ranking = super().eval_batch_collect(scores, interaction, positive_u, positive_i)
        if ranking is None:
            return None
        scores, column, best = ranking
        if scores.isnan().any():  # of which torch.topk makes the highest scores
            raise UserError(
                f"{self.config['model']} gives {int(scores.isnan().sum())} of {scores.numel()} "
                "scores that are no numbers; train with a lower learning rate."
            )
        # A row for each candidate, and those of a target together.
        each = len(interaction) // len(scores)
        first, place = interaction[np.arange(0, len(interaction), each)], positive_u.cpu().numpy()
        row, target = positive_u.to(scores.device), column.to(scores.device)
        rank, tied = target_ranks(scores, row, target, best)
        user = first[self.config["USER_ID_FIELD"]].cpu().numpy()
        item = positive_i.cpu().numpy()
        histories, met = self._counts
        batch = pd.DataFrame(
            {
                "user": user[place],
                "item": item,
                "rank": rank.cpu().numpy(),
                "met": met[item],
                "popularity": self._third[item],
                "history": histories[user[place]],
                "tied": tied.cpu().numpy(),
            }
        )
        if self.writer:
            if len(positive_i) != len(scores):
                raise UserError(
                    "A user has several targets, which RecBole ranks together; "
                    "for answers use recbole_sdpo.quick_start.run."
                )
            candidates = interaction[self.config["ITEM_ID_FIELD"]].view(-1, each).cpu().numpy()
            batch["answer"], batch["named"] = self._ask(self.writer, first, candidates)
        self._batches.append(batch)
        return ranking

    def _ask(
        self, writer: Writer, rows: Interaction, candidates: np.ndarray
    ) -> tuple[list[str], list[int]]:
        """The answers, and the items that they name or 0; the metrics are told.

        The target is the first of its candidates.
        """
        answers, titles = writer.answers(rows, candidates), writer.catalogue.titles
        places = [
            named(answer, [titles[item] for item in row])
            for answer, row in zip(answers, candidates, strict=True)
        ]
        self.data_struct.update_tensor(VALID, torch.tensor([place is not None for place in places]))
        self.data_struct.update_tensor(HIT, torch.tensor([place == 0 for place in places]))
        pairs = zip(places, candidates, strict=True)
        return answers, [0 if place is None else row[place] for place, row in pairs]

    def get_data_struct(self) -> DataStruct:
        """As RecBole's, which forgets what it has handed out, at the end of an evaluation."""
        struct = super().get_data_struct()
        self._ranks, self._batches = self._batches, []
        for key in {VALID, HIT} & set(self.data_struct._data_dict):
            del self.data_struct[key]
        return struct

    def pop_ranks(self, user_token: np.ndarray, item_token: np.ndarray) -> pd.DataFrame:
        """The ranks of the last evaluation, in the data's own ids, which are then forgotten; warns
        where many of them are by chance.

        Columns are ``user``, ``item``, ``rank``, ``met``, the users who met the item in training,
        ``popularity``, its group of :data:`THIRDS`, ``history``, the items that the user met in
        training, and if answers were asked for ``answer`` and ``named``, the candidate that it
        names or nothing.
        """
        columns = ("user", "item", "rank", "met", "popularity", "history", "tied")
        nothing = pd.DataFrame({column: [] for column in columns}, dtype=np.int64)
        ranks, self._ranks = pd.concat(self._ranks or [nothing]), []
        tied = ranks.pop("tied").mean()
        if tied > TIED:
            getLogger().warning(
                f"{self.config['model']} gives {tied:.0%} of the targets the score of another "
                "candidate; which of equals comes first is drawn by lot."
            )
        if "named" in ranks:
            ranks["named"] = np.where(ranks["named"] > 0, item_token[ranks["named"]], "")
        return ranks.assign(user=user_token[ranks["user"]], item=item_token[ranks["item"]])


def target_ranks(
    scores: Tensor, row: Tensor, target: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """The rank of each target in its row of ``scores [rows, items]``, from 1, int64, and whether
    it may be within the ``top`` highest and another item has its score, so that chance counts.

    Within ``best [rows, top]``, the highest in their order, it is the target's place there, by
    which RecBole counts; beyond, the middle of the places that its equals share, ``top + 1`` at
    least.
    """
    top = best.shape[1]
    hits = best[row] == target[:, None]
    place = hits.int().argmax(-1) + 1
    own, all_scores = scores[row, target][:, None], scores[row]
    higher, equal = (all_scores > own).sum(-1), (all_scores == own).sum(-1)
    beyond = higher + (equal + 1) // 2
    # Beyond the top no metric changes, and full_sort=topk has bounds in place of scores.
    tied = (equal > 1) & (higher < top)
    return torch.where(hits.any(-1), place, beyond.clamp(min=top + 1)), tied
