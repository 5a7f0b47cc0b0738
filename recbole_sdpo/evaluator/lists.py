"""Metrics of the lists that all users get from the whole catalogue: one number for all of them."""

from __future__ import annotations

import numpy as np
from recbole.evaluator.base_metric import AbstractMetric
from recbole.evaluator.collector import DataStruct
from recbole.utils import EvaluatorType

from recbole_sdpo import compat
from recbole_sdpo.errors import UserError

GROUPS = "data.groups"
"""Under which RecBole's collector keeps how much of each item is of each group, float64
``[items, groups]``, of which a row adds up to 1, or to 0 for an item of none."""

POPULARITY_GROUPS = 5
"""As many as in IFairLRS."""

MOST = 3
"""How many items ORRatio looks at, as in SPRec."""


class _OfLists(AbstractMetric):
    metric_type = EvaluatorType.RANKING
    metric_need: tuple[str, ...] = ("rec.items",)
    smaller = True

    def __init__(self, config: dict) -> None:
        super().__init__(config)
        self.topk = config["topk"]

    def calculate_metric(self, dataobject: DataStruct) -> dict[str, float]:
        """A value for each cut-off; none where users choose among a sample."""
        if "rec.items" not in dataobject:
            return {}
        lists, name = dataobject.get("rec.items").numpy(), type(self).__name__.lower()
        return {
            f"{name}@{k}": round(float(self.of(lists[:, :k], dataobject)), self.decimal_place)
            for k in self.topk
        }

    def of(self, lists: np.ndarray, dataobject: DataStruct) -> float:
        """Of the items that users get, int64 ``[users, k]``."""
        raise NotImplementedError


class ORRatio(_OfLists):
    """The share of the three items that are recommended most among all that are recommended (Gao et
    al., *SPRec: Self-Play to Debias LLM-based Recommendation*, WWW 2025, its evaluation)."""

    def of(self, lists: np.ndarray, dataobject: DataStruct) -> float:
        counts = np.unique(lists, return_counts=True)[1]
        return np.sort(counts)[-MOST:].sum() / lists.size


class _Unfairness(_OfLists):
    """What groups of items have of the recommendations, less what they have of the interactions
    (Jiang et al., *Item-side Fairness of Large Language Model-based Recommendation System*, WWW
    2024, its metrics).

    GU(G) = GP(G) - GH(G), where GP is G's share of all lists and GH its share of the interactions
    in training. An item of g categories is 1 / g of each, as in SPRec's code; IFairLRS's counts it
    once in each. Both count for GH the histories in the prompts of the test, which models without a
    prompt have not.
    """

    metric_need = ("rec.items", "data.count_items", GROUPS)

    def unfairness(self, lists: np.ndarray, dataobject: DataStruct) -> np.ndarray:
        """GU of each group, float64 ``[groups]``."""
        if GROUPS not in dataobject:
            raise UserError(
                f"metric {type(self).__name__} needs groups of items, which RecBole's own trainers "
                "do not collect; use recbole_sdpo.quick_start.run."
            )
        groups, met = dataobject.get(GROUPS), dataobject.get("data.count_items")
        items = np.arange(1, len(groups))
        recommended = groups[lists.reshape(-1)].sum(0)
        interactions = np.array([met.get(item, 0) for item in items]) @ groups[1:]
        return _shares(recommended) - _shares(interactions)


def _shares(amounts: np.ndarray) -> np.ndarray:
    return amounts / max(amounts.sum(), np.finfo(float).tiny)


class MGU(_Unfairness):
    """Mean group unfairness: the mean of abs(GU) over groups."""

    def of(self, lists: np.ndarray, dataobject: DataStruct) -> float:
        return np.abs(self.unfairness(lists, dataobject)).mean()


class DGU(_Unfairness):
    """Disparity of group unfairness: the largest GU less the smallest."""

    def of(self, lists: np.ndarray, dataobject: DataStruct) -> float:
        return np.ptp(self.unfairness(lists, dataobject))


OURS = (MGU, DGU, ORRatio)

OF_LISTS = {kind.__name__.lower(): kind for kind in (*compat.OF_LISTS, *OURS)}
"""The metrics of what all users get, by RecBole's name."""


def popularity_groups(met: np.ndarray) -> np.ndarray:
    """Five groups of as many items, the least popular first, float64 ``[items, 5]``.

    Args:
        met: int64 ``[items]``, how many users met each; the first is RecBole's padding.
    """
    order = np.argsort(met[1:], kind="stable")
    groups = np.zeros((len(met), POPULARITY_GROUPS))
    groups[1 + order, np.arange(len(order)) * POPULARITY_GROUPS // max(len(order), 1)] = 1
    return groups
