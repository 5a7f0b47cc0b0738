"""Ranks of single targets, against RecBole's own metrics and against sorting."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.model.sequential_recommender.gru4rec import GRU4Rec

from recbole_sdpo import quick_start
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.ranks import RankCollector, metric_of_ranks, target_ranks, third_of
from recbole_sdpo.evaluator.titles import highest


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


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_ranks_of_one_evaluation_are_kept_at_a_time(ring, monkeypatch, model):
    """Validations are many, and nobody reads their ranks."""
    most, struct = [], RankCollector.get_data_struct

    def counted(self):
        result = struct(self)
        most.append(sum(map(len, self._ranks)) + sum(map(len, self._batches)))
        return result

    monkeypatch.setattr(RankCollector, "get_data_struct", counted)
    settings = ring | {"epochs": 3, "more_candidates": ["pop4"], "run_dir": "here"}
    quick_start.run(model, "toy", config_dict=settings)
    assert len(most) > 4 and set(most) == {72}
    assert len(pd.read_csv("here/ranks.csv")) == 72 * (4 if model == "SDPO-LLM" else 2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_thirds_are_of_interactions(met):
    for item, group in enumerate(third_of(np.array(met))):
        by_more = sum(other for other in met if other > met[item])
        share = by_more / max(sum(met), 1)
        third = ["head", "middle", "tail"][(share >= 1 / 3) + (share >= 2 / 3)]
        assert group == (third if met[item] else "cold")


def ranks_of(scores, row, target, top):
    return target_ranks(scores, torch.tensor(row), torch.tensor(target), highest(scores, top))


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
    found, _ = ranks_of(torch.from_numpy(scores), row, target, top)
    expected = [
        1 + sorted(scores[r], reverse=True).index(scores[r, t]) for r, t in zip(row, target)
    ]
    assert found.tolist() == expected


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_beyond_the_top_equals_share_the_middle_of_their_places(equal, above, below):
    scores = torch.tensor([[2.0] * above + [1.0] * equal + [0.0] * below])
    places = np.arange(above + 1, above + equal + 1)
    for item in set(range(above, above + equal)) - {0}:
        rank, tied = ranks_of(scores, [0], [item], 1)
        assert bool(tied) == (equal > 1 and not above)
        assert rank == max(2, int(places.mean()))


@pytest.mark.parametrize(("model", "tied"), [("Pop", True), ("BPR", False)])
def test_a_model_of_many_equal_scores_is_warned_of(ring, caplog, model, tied):
    """All items are met alike, so that to popularity they are one."""
    settings = ring | {"epochs": 1, "run_dir": "here", "more_candidates": ["full"]}
    quick_start.run(model, "toy", config_dict=settings)
    told = [line for line in caplog.messages if "the score of another candidate" in line]
    assert len(told) == 2 * tied  # of each test
    assert all(line.startswith("Pop gives 100% of the targets") for line in told)
    assert "tied" not in pd.read_csv("here/ranks.csv")


def test_bounds_beyond_the_top_are_no_equal_scores(ring, caplog, monkeypatch):
    """full_sort=topk gives all titles below a prefix that it has not opened one score."""
    full = GRU4Rec.full_sort_predict

    def bounded(self, rows):
        scores = full(self, rows).view(len(rows), -1)
        best = scores.topk(5 + 11).values[:, -1:]  # whatever eleven the user has met
        return torch.where(scores < best, -1e3, scores)

    monkeypatch.setattr(GRU4Rec, "full_sort_predict", bounded)
    settings = ring | {"epochs": 1, "run_dir": "here", "eval_args": {"mode": "full"}, "topk": [5]}
    quick_start.run("GRU4Rec", "toy", config_dict=settings)
    assert (pd.read_csv("here/ranks.csv")["rank"] > 5).any()
    assert "the score of another candidate" not in caplog.text


@pytest.mark.parametrize("mode", ["uni5", "full"])
def test_scores_that_are_no_numbers_are_no_hits(ring, monkeypatch, mode):
    predict, full = GRU4Rec.predict, GRU4Rec.full_sort_predict
    for name, score in (("predict", predict), ("full_sort_predict", full)):
        monkeypatch.setattr(
            GRU4Rec, name, lambda self, rows, score=score: score(self, rows).mul(torch.nan)
        )
    settings = ring | {"epochs": 1, "eval_args": {"mode": mode}, "run_dir": "here"}
    with pytest.raises(UserError, match=r"GRU4Rec gives \d+ of \d+ scores that are no numbers"):
        quick_start.run("GRU4Rec", "toy", config_dict=settings)


def test_of_equals_the_first_are_the_best():
    scores = torch.zeros(1, 6)
    assert [int(ranks_of(scores, [0], [item], 3)[0]) for item in range(6)] == [1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("name", ["HR", "hit", "HitRate", "HITRATIO"])
def test_hit_has_more_names_than_one(name):
    assert metric_of_ranks(f"{name}@2", np.array([1, 2, 3])).tolist() == [1, 1, 0]


@pytest.mark.parametrize("metric", ["precision@1", "hit", "hit@0", "hit@x", ""])
def test_what_is_no_metric_of_a_rank_is_refused(metric):
    with pytest.raises(ValueError, match=r"must be one of HR@k, NDCG@k, MRR@k"):
        metric_of_ranks(metric, np.array([1]))
