"""When an answer is valid, and whether RecBole's evaluation counts it so."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import create_dataset

from recbole_sdpo import quick_start
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.evaluator.answers import named
from recbole_sdpo.quick_start import ExperimentConfig
from tests.conftest import write_dataset

FILMS = ["Star Trek", "Star Trek: First Contact", "M", "Heat (1995)", "Se7en", "The Net", "the  net", "$9.99"]
ANSWERS = ["Hit", "NDCG", "ValidRatio", "GenHit"]


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ("Heat (1995)", 3),
        ("  heat\t(1995) ", 3),
        ("The next film watched is: Heat (1995).", 3),
        ("Ｈｅａｔ (1995)", 3),  # full-width letters
        ("Heat", None),  # a part of a title names nothing
        ("Preheat (1995)", None),
        ("Star Trek", 0),
        ("Star Trek: First Contact", 1),  # and not the title inside it
        ("Star Trek and Star Trek: First Contact", None),
        ("Star Trek, Star Trek", 0),
        ("Heat (1995) or M", None),
        ("M", 2),
        ("Mad", None),
        ("The Net", None),  # two candidates differ in nothing that matters
        ("a film for $9.99", 7),
        ("", None),
        ("none of them", None),
    ],
)
def test_an_answer_names_one_candidate_or_none(answer, place):
    assert named(answer, FILMS) == place


WORDS = st.lists(st.sampled_from(["red", "Blue", "moon", "7", "(1999)", "été", "ÉTÉ"]), min_size=1, max_size=4).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_a_title_is_named_as_a_slow_reader_would(titles, answer):
    """By words: the longest runs of the answer's words that are titles."""
    fold = lambda text: tuple(text.casefold().split())  # noqa: E731
    words = fold(answer)
    runs = [(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1) if words[i:j] in map(fold, titles)]
    longest = {words[i:j] for i, j in runs if not any((a, b) != (i, j) and a <= i and j <= b for a, b in runs)}
    places = [place for place, title in enumerate(titles) if fold(title) in longest]
    assert named(answer, titles) == (places[0] if len(places) == 1 else None)


@pytest.mark.parametrize("style", ["history", "candidates"])
def test_all_three_come_from_one_evaluation(ring, style):
    settings = ring | {"metrics": ANSWERS, "prompt_style": style, "prompt_candidates": 6, "run_dir": "here", "objective": "sft"}
    result = quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"more_candidates": ["uni3"], "valid_metric": "GenHit"})
    config = ExperimentConfig("SDPO-LLM", "toy", config_dict=settings)
    dataset = create_dataset(config)
    titles = dict(zip(dataset.field2id_token["item_id"], Catalogue.from_dataset(dataset, ["title"]).titles, strict=True))
    ranks = pd.read_csv("here/ranks.csv", keep_default_na=False)
    for mode, found in result["stages"]["sft"]["candidates"].items():
        mine = ranks[ranks.candidates == mode]
        right = (mine["answer"] == mine["item"].map(titles)).mean()
        assert found["test"]["genhit"] == pytest.approx(right, abs=6e-5)
        assert right <= found["test"]["validratio"] <= 1 and found["test"]["hit@1"] == pytest.approx((mine["rank"] == 1).mean(), abs=6e-5)
    assert "genhit" not in result["popularity"]


def test_constrained_answers_are_valid_and_those_of_the_ranking_where_a_title_is_one_token(ring):
    settings = ring | {"metrics": ANSWERS, "scratch_vocab_size": 2000, "decoding": "constrained", "run_dir": "here", "objective": "sft"}
    result = quick_start.run("SDPO-LLM", "toy", config_dict=settings)["test_result"]
    assert result["validratio"] == 1 and result["genhit"] == result["hit@1"] > 0.2


def test_each_target_is_ranked_on_its_own(ring, tmp_path):
    """With a split by time users have several targets; RecBole ranks those together."""
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(np.arange(1, 25))[:12].tolist() for _ in range(30)]
    data = {"data_path": str(write_dataset(tmp_path / "many", sequences, {i: f"title {i}" for i in range(1, 25)}))}
    split = {"eval_args": {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "none", "mode": "uni5"}}
    for model, few in (("SDPO-LLM", {"objective": "sft"}), ("GRU4Rec", {"epochs": 1}), ("BPR", {"epochs": 1})):
        result = quick_start.run(model, "toy", config_dict=ring | data | split | few | {"run_dir": model})
        ranks = pd.read_csv(f"{model}/ranks.csv")
        assert ranks["user"].duplicated().any() and ranks["rank"].max() <= 11
        assert result["test_result"]["hit@1"] == pytest.approx((ranks["rank"] == 1).mean(), abs=6e-5)
        assert len(ranks) in (33, 36)  # a tenth of the rows: those with a history, or for BPR all


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("GRU4Rec", {}, "GenHit needs an answer in words, and GRU4Rec writes none"),
        ("SDPO-LLM", {"eval_args": {"mode": "full"}}, "GenHit needs sampled candidates"),
        ("SDPO-LLM", {"decoding": "beam"}, "decoding='beam' is out of range; valid is one of free, constrained"),
        ("SDPO-LLM", {"valid_metric": "GenHit@1"}, "valid_metric='GenHit@1' is not computed"),
    ],
)
def test_what_cannot_be_answered_is_refused(ring, model, settings, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(model, "toy", config_dict=ring | {"metrics": ["Hit", "NDCG", "GenHit"]} | settings)
