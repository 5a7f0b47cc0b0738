"""Candidates are scored as RecBole scores them, with one pass for each target."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
from recbole.model.general_recommender import bpr, lightgcn
from recbole.model.sequential_recommender import bert4rec, caser, gru4rec, sasrec

from recbole_sdpo.quick_start import run
from recbole_sdpo.trainer.one_pass import OnePass

MODELS = {
    model.__name__: model
    for model in (
        bpr.BPR,
        lightgcn.LightGCN,
        bert4rec.BERT4Rec,
        caser.Caser,
        gru4rec.GRU4Rec,
        sasrec.SASRec,
    )
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
    monkeypatch.setattr("recbole_sdpo.quick_start.with_one_pass", lambda base: base)
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
        patched.setattr("recbole_sdpo.quick_start.with_one_pass", lambda base: base)
        expected, _ = ranked("SASRec", ring, tmp_path / "each")
    monkeypatch.setattr(sasrec.SASRec, "full_sort_predict", every)
    with caplog.at_level(logging.INFO):
        result, _ = ranked("SASRec", ring, tmp_path / "once")
    assert result["test_result"] == expected["test_result"]
    (line,) = [line for line in caplog.messages if "one by one" in line]
    assert line.startswith("SASRec scores candidates one by one") and said in line


def test_rows_without_candidates_are_scored_as_they_are():
    batch = ("rows with a label", None, None, None)
    assert OnePass(None, lambda asked: ("scored", asked))(batch) == ("scored", batch)
