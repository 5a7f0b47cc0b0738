"""Ranks of single targets, against RecBole's own metrics and against sorting."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo import quick_start
from recbole_sdpo.evaluator.ranks import metric_of_ranks, target_ranks, third_of


@pytest.mark.parametrize("model", ["SDPO-LLM", "Pop", "GRU4Rec", "BPR"])
@pytest.mark.parametrize("mode", ["uni5", "full"])
def test_metrics_of_ranks_are_recboles(ring, model, mode):
    few = {"epochs": 1} if model != "SDPO-LLM" else {"sft_epochs": 1, "objective": "sft"}
    result = quick_start.run(
        model, "toy", config_dict=ring | few | {"run_dir": "here", "eval_args": {"mode": mode}}
    )
    ranks = pd.read_csv("here/ranks.csv")
    events = pd.read_csv(f"{ring['data_path']}/toy/toy.inter", sep="\t")
    user, item, time = (
        next(c for c in events if c.startswith(k)) for k in ("user", "item", "time")
    )
    events = events.sort_values(time, kind="stable")
    trained = events[events.groupby(user).cumcount(ascending=False) > 1]  # two are held out
    met = trained.drop_duplicates([user, item])[item].value_counts()
    assert ranks["met"].tolist() == [met.get(target, 0) for target in ranks["item"]]
    of_user = trained.drop_duplicates([user, item]).groupby(user)[item].size()
    assert ranks["history"].tolist() == of_user[ranks["user"]].tolist()
    assert set(ranks["popularity"]) == {"head"}  # all items are met alike
    assert ranks.user.is_unique and len(ranks) == 72 and set(ranks.candidates) == {mode}
    for name, value in result["test_result"].items():
        assert metric_of_ranks(name, ranks["rank"].to_numpy()).mean() == pytest.approx(
            value, abs=6e-5
        ), name


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_thirds_are_of_interactions(met):
    for item, group in enumerate(third_of(np.array(met))):
        by_more = sum(other for other in met if other > met[item])
        share = by_more / max(sum(met), 1)
        third = ["head", "middle", "tail"][(share >= 1 / 3) + (share >= 2 / 3)]
        assert group == (third if met[item] else "cold")


@given(st.data())
def test_a_rank_is_a_place_in_the_sorted_row(data):
    rows, items = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    top = data.draw(st.integers(1, items))
    scores = np.array(
        data.draw(st.lists(st.permutations(range(items)), min_size=rows, max_size=rows)),
        dtype=np.float32,
    )
    row = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
    target = np.array(
        data.draw(st.lists(st.integers(0, items - 1), min_size=len(row), max_size=len(row)))
    )
    found = target_ranks(
        torch.from_numpy(scores), torch.from_numpy(row), torch.from_numpy(target), top
    )
    expected = [
        1 + sorted(scores[r], reverse=True).index(scores[r, t]) for r, t in zip(row, target)
    ]
    assert found.tolist() == expected


def test_ties_count_as_recbole_counts_them():
    scores = torch.zeros(1, 6)
    first = scores.topk(3).indices[0]
    ranks = [
        int(target_ranks(scores, torch.tensor([0]), torch.tensor([item]), 3)) for item in range(6)
    ]
    assert [ranks[item] for item in first] == [1, 2, 3]
    assert sorted(ranks) == [1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("metric", ["precision@1", "hit", "hit@0", "hit@x", ""])
def test_what_is_no_metric_of_a_rank_is_refused(metric):
    with pytest.raises(ValueError, match=r"must be one of HR@k, NDCG@k, MRR@k"):
        metric_of_ranks(metric, np.array([1]))
