"""Candidates are scored as RecBole scores them, with one pass for each target."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.model.sequential_recommender import bert4rec, caser, gru4rec, sasrec

from recbole_sdpo.quick_start import run
from recbole_sdpo.trainer.one_pass import OnePass

MODELS = {
    model.__name__: model
    for model in (bert4rec.BERT4Rec, caser.Caser, gru4rec.GRU4Rec, sasrec.SASRec)
}


def ranked(model: str, settings: dict, folder) -> tuple[dict, pd.DataFrame]:
    result = run(model, "toy", config_dict=settings | {"run_dir": str(folder), "epochs": 3})
    return result, pd.read_csv(folder / "ranks.csv")


@pytest.mark.parametrize("model", MODELS)
def test_ranks_are_those_of_a_pass_for_each_candidate(ring, tmp_path, monkeypatch, model):
    ring = ring | {"eval_batch_size": 60, "more_candidates": ["pop4"]}
    asked, predict = [], MODELS[model].predict

    def counted(self, rows):
        asked.append(len(rows))
        return predict(self, rows)

    monkeypatch.setattr(MODELS[model], "predict", counted)
    once, ranks = ranked(model, ring, tmp_path / "once")
    assert len(asked) == 1  # of all batches of all validations and tests
    monkeypatch.setattr("recbole_sdpo.quick_start.OnePass", lambda model, each: each)
    each, expected = ranked(model, ring, tmp_path / "each")
    assert len(asked) > 20
    pd.testing.assert_frame_equal(ranks, expected)
    assert once["test_result"] == each["test_result"]


full_sort_predict = sasrec.SASRec.full_sort_predict


@pytest.mark.parametrize(
    ("every", "said"),
    [
        (lambda self, rows: 1 / (1 + full_sort_predict(self, rows).exp()), "apart"),
        (lambda self, rows: full_sort_predict(self, rows)[:-1], "is invalid for input"),
        (lambda self, rows: full_sort_predict(self, rows)[:, :-1], "out of bounds"),
        (lambda self, rows: rows["nothing"], "KeyError"),
    ],
)
def test_a_model_whose_scores_of_all_items_are_others_is_asked_for_each(
    ring, tmp_path, monkeypatch, caplog, every, said
):
    ring = ring | {"eval_batch_size": 60}
    with monkeypatch.context() as patched:
        patched.setattr("recbole_sdpo.quick_start.OnePass", lambda model, each: each)
        expected, _ = ranked("SASRec", ring, tmp_path / "each")
    monkeypatch.setattr(sasrec.SASRec, "full_sort_predict", every)
    with caplog.at_level(logging.INFO):
        result, _ = ranked("SASRec", ring, tmp_path / "once")
    assert result["test_result"] == expected["test_result"]
    (line,) = [line for line in caplog.messages if "one by one" in line]
    assert line.startswith("SASRec scores candidates one by one") and said in line


def test_rows_without_candidates_are_left_to_recbole():
    rows = ("rows", None, None, None)
    one_pass = OnePass(Table(SCORES), lambda asked: ("scored", asked))
    assert one_pass(rows) == ("scored", rows) and one_pass.agrees is None


def test_a_model_without_sequences_is_not_asked_for_all_items():
    class Items(GeneralRecommender):
        asked, n_items = False, 5
        __init__ = torch.nn.Module.__init__

        def full_sort_predict(self, rows):
            self.asked = True

    model = Items()
    one_pass = OnePass(model, one_by_one(SCORES))
    scores = one_pass(batch([1, 2, 3]))[1]
    torch.testing.assert_close(scores, one_by_one(SCORES)(batch([1, 2, 3]))[1])
    assert not model.asked


class Table(SequentialRecommender):
    """Scores of a table, of which ``wrong`` is how those of all items are read."""

    def __init__(self, scores: torch.Tensor, wrong=lambda scores: scores) -> None:
        torch.nn.Module.__init__(self)
        self.scores, self.wrong, self.n_items = scores, wrong, scores.shape[1]
        self.ITEM_ID, self.device = "item", torch.device("cpu")
        self.asked: list[int] = []  # how many targets at once

    def full_sort_predict(self, rows):
        self.asked.append(len(rows))
        return self.wrong(self.scores[rows["user"]])


def batch(users: list[int], width: int = 3) -> tuple:
    """Each user with candidates 0, 1, ...."""
    rows = {
        "user": torch.tensor(users).repeat_interleave(width),
        "item": torch.arange(width).repeat(len(users)),
    }
    return Interaction(rows), torch.arange(len(users)).repeat_interleave(width), None, None


def one_by_one(table: torch.Tensor):
    def scores(asked: tuple) -> tuple:
        rows, target, *rest = asked
        expected = torch.full((int(target[-1]) + 1, table.shape[1]), -torch.inf)
        expected[target, rows["item"]] = table[rows["user"], rows["item"]].float()
        return rows, expected, *rest

    return scores


SCORES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scores", [SCORES, 100 + 1e-3 * SCORES, SCORES.double()])
@pytest.mark.parametrize("at_once", [2**22, 11, 1])
def test_scores_are_those_of_each_candidate_however_many_targets_go_at_once(
    monkeypatch, scores, at_once
):
    monkeypatch.setattr("recbole_sdpo.trainer.one_pass.SCORES_AT_ONCE", at_once)
    table = Table(scores)
    one_pass = OnePass(table, one_by_one(scores))
    for users in ([3], [0, 4, 2], [5], [1, 1, 0, 5]):
        ours = one_pass(batch(users))[1]
        torch.testing.assert_close(ours, one_by_one(scores)(batch(users))[1])
    assert one_pass.agrees
    assert max(table.asked) == max(1, min(4, at_once // 5)) and sum(table.asked) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scores: scores + 0.005,  # of scores near 100, .03 apart
        lambda scores: scores.T.contiguous().view(scores.shape),  # right of one target
        lambda scores: scores * torch.nan,
    ],
    ids=["near", "swapped", "nan"],
)
def test_one_target_or_equal_scores_prove_nothing(wrong):
    scores = 100 + 1e-2 * SCORES
    scores[0] = 100.0
    one_pass = OnePass(Table(scores, wrong), one_by_one(scores))
    for users in ([2], [0, 0]):
        one_pass(batch(users))
        assert one_pass.agrees is None
    scores_of_three = one_pass(batch([1, 2, 3]))[1]
    assert one_pass.agrees is False
    torch.testing.assert_close(scores_of_three, one_by_one(scores)(batch([1, 2, 3]))[1])
