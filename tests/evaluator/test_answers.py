"""When an answer is valid, and whether RecBole's evaluation counts it so."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import create_dataset
from recbole.quick_start import run_recbole

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.evaluator.answers import named
from recbole_sdpo.evaluator.ranks import metric_of_targets
from recbole_sdpo.lm.generation import NOTHING
from recbole_sdpo.model import sdpo_llm
from tests.conftest import TINY, write_dataset

FILMS = [
    "Star Trek",
    "Star Trek: First Contact",
    "M",
    "Heat (1995)",
    "Se7en",
    "The Net",
    "the  net",
    "$9.99",
    "肖申克的救赎",
    "ต้มยำกุ้ง",
    "24",
]
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
        ("Heat (1995)x", None),
        ("我推荐肖申克的救赎。", 8),  # scripts without blanks between words
        ("推荐Heat (1995)吧", 3),
        ("ดูต้มยำกุ้งเถอะ", 9),
        ("肖申克", None),
        ("第24集", None),  # a number and its counter
        ("第 24", 10),
    ],
)
def test_an_answer_names_one_candidate_or_none(answer, place):
    assert named(answer, FILMS) == place


WORDS = st.lists(
    st.sampled_from(["red", "Blue", "moon", "7", "(1999)", "été", "ÉTÉ"]), min_size=1, max_size=4
).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_a_title_is_named_as_a_slow_reader_would(titles, answer):
    """By words: the longest runs of the answer's words that are titles."""
    fold = lambda text: tuple(text.casefold().split())  # noqa: E731
    words = fold(answer)
    runs = [
        (i, j)
        for i in range(len(words))
        for j in range(i + 1, len(words) + 1)
        if words[i:j] in map(fold, titles)
    ]
    longest = {
        words[i:j]
        for i, j in runs
        if not any((a, b) != (i, j) and a <= i and j <= b for a, b in runs)
    }
    places = [place for place, title in enumerate(titles) if fold(title) in longest]
    assert named(answer, titles) == (places[0] if len(places) == 1 else None)


def test_all_three_come_from_one_evaluation(ring):
    settings = ring | {
        "metrics": ANSWERS,
        "prompt_style": "candidates",
        "prompt_candidates": 6,
        "run_dir": "here",
        "objective": "sft",
    }
    settings |= {
        "sft_epochs": 6,
        "sft_learning_rate": 1e-2,
        "sft_tokens_per_batch": 512,
        "max_train_targets": 400,
    }
    result = quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=settings | {"more_candidates": ["uni3"], "valid_metric": "GenHit"},
    )
    config = RunConfig("SDPO-LLM", "toy", config_dict=settings)
    dataset = create_dataset(config)
    titles = dict(
        zip(
            dataset.field2id_token["item_id"],
            Catalogue.from_dataset(dataset, ["title"]).titles,
            strict=True,
        )
    )
    ranks = pd.read_csv("here/ranks.csv", keep_default_na=False)
    for mode, found in result["stages"]["sft"]["candidates"].items():
        mine = ranks[ranks.candidates == mode]
        right = (mine["answer"] == mine["item"].map(titles)).mean()
        written = mine[mine["named"] != ""]
        # some have words around the title
        assert (written["named"].map(titles) == written["answer"]).mean() > 0.5
        for metric in ("GenHit", "ValidRatio"):
            assert metric_of_targets(metric, mine).mean() == pytest.approx(
                found["test"][metric.lower()], abs=6e-5
            )
        assert found["test"]["genhit"] == pytest.approx(right, abs=6e-5)
        # some answers name another candidate, and some none
        assert 0 < right < found["test"]["validratio"] < 1
        assert found["test"]["hit@1"] == pytest.approx((mine["rank"] == 1).mean(), abs=6e-5)
    assert "genhit" not in result["popularity"]


def test_constrained_answers_are_valid_and_those_of_the_ranking_where_a_title_is_one_token(ring):
    settings = ring | {
        "metrics": ANSWERS,
        "scratch_vocab_size": 2000,
        "decoding": "constrained",
        "run_dir": "here",
        "objective": "sft",
    }
    result = quick_start.run("SDPO-LLM", "toy", config_dict=settings)["test_result"]
    assert result["validratio"] == 1 and result["genhit"] == result["hit@1"] > 0.2


def test_constrained_answers_are_valid_whatever_titles_look_like(tmp_path):
    """Titles of several tokens, one inside another, alike but for case, and with what a
    tokenizer might lose."""
    titles = {
        1: "Star Trek",
        2: "star trek",
        3: "Star Trek: First Contact",
        4: "?!, '",
        5: "<s>",
        6: "été",
        7: "ÉTÉ",
    }
    titles |= {i: f"film {i} <unk>" for i in range(8, 25)}
    sequences = [
        [1 + (start + step) % 24 for step in range(12)] for start in range(24) for _ in range(3)
    ]
    data = {
        "data_path": str(write_dataset(tmp_path / "odd", sequences, titles)),
        "scratch_vocab_size": 270,
    }
    settings = (
        TINY
        | data
        | {"metrics": ANSWERS, "decoding": "constrained", "run_dir": "here", "objective": "sft"}
    )
    result = quick_start.run("SDPO-LLM", "toy", config_dict=settings)["test_result"]
    assert result["validratio"] == 1
    ranks = pd.read_csv("here/ranks.csv", keep_default_na=False)
    assert set(ranks["answer"]) <= set(titles.values()) and ranks["answer"].nunique() > 1


def test_a_constrained_answer_that_is_no_title_is_no_hit(ring, monkeypatch):
    monkeypatch.setattr(
        sdpo_llm, "write", lambda lm, prompts, limit, *_: np.full((len(prompts), limit), NOTHING)
    )
    with pytest.raises(RuntimeError, match="A constrained answer is no candidate's title"):
        quick_start.run(
            "SDPO-LLM",
            "toy",
            config_dict=ring
            | {"metrics": ANSWERS, "decoding": "constrained", "objective": "sft", "sft_epochs": 0},
        )


def test_labelled_rows_are_scored_one_by_one(ring):
    """RecBole's value metrics have rows and no candidates."""
    file = Path(ring["data_path"]) / "toy" / "toy.inter"
    head, *rows = file.read_text().splitlines()
    file.write_text(
        "\n".join(
            [
                head + "\tlabel:float",
                *(f"{row}\t{number % 5 % 2}" for number, row in enumerate(rows)),
            ]
        )
        + "\n"
    )
    labels = {
        "eval_args": {"mode": "labeled"},
        "metrics": ["AUC"],
        "valid_metric": "AUC",
        "train_neg_sample_args": None,
    }
    loaded = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "label"]}}
    result = quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | labels | loaded | {"objective": "sft"}
    )
    assert 0 < result["test_result"]["auc"] < 1


def test_targets_with_the_same_last_items_share_no_prompt(tmp_path):
    """Whoever hears one artist again and again has many targets after the same history; each has
    candidates of its own."""
    rng = np.random.default_rng(0)
    sequences = [[*rng.integers(1, 25, 6).tolist(), *[1 + user % 24] * 14] for user in range(30)]
    data = {
        "data_path": str(
            write_dataset(tmp_path / "again", sequences, {i: f"title {i}" for i in range(1, 25)})
        )
    }
    split = {
        "eval_args": {"split": {"RS": [6, 2, 2]}, "order": "TO", "group_by": "none", "mode": "uni5"}
    }
    settings = (
        TINY
        | data
        | split
        | {
            "prompt_style": "candidates",
            "prompt_candidates": 6,
            "objective": "sft",
            "MAX_ITEM_LIST_LENGTH": 4,
        }
    )
    found = []
    for size in (6, 60, 4096):
        given = settings | {
            "run_dir": f"run{size}",
            "eval_batch_size": size,
            "max_train_targets": 50,
            "eval_step": 0,
        }
        quick_start.run("SDPO-LLM", "toy", config_dict=given)
        found.append(
            pd.read_csv(f"run{size}/ranks.csv")
            .sort_values(["user", "item", "rank"])["rank"]
            .tolist()
        )
    assert found[0] == found[1] == found[2]


def test_recboles_own_quick_start_gives_no_wrong_answers(ring, tmp_path):
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(np.arange(1, 25))[:12].tolist() for _ in range(30)]
    data = {
        "data_path": str(
            write_dataset(tmp_path / "many", sequences, {i: f"title {i}" for i in range(1, 25)})
        )
    }
    split = {
        "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "none", "mode": "uni5"}
    }
    with pytest.raises(ValueError, match="for answers use recbole_sdpo.quick_start.run"):
        run_recbole(
            model="SDPO-LLM",
            dataset="toy",
            config_dict=ring | data | split | {"metrics": ANSWERS, "max_train_targets": 20},
        )


def test_each_target_is_ranked_on_its_own(ring, tmp_path):
    """With a split by time users have several targets; RecBole ranks those together."""
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(np.arange(1, 25))[:12].tolist() for _ in range(30)]
    data = {
        "data_path": str(
            write_dataset(tmp_path / "many", sequences, {i: f"title {i}" for i in range(1, 25)})
        )
    }
    split = {
        "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "none", "mode": "uni5"}
    }
    for model, few in (
        ("SDPO-LLM", {"objective": "sft"}),
        ("GRU4Rec", {"epochs": 1}),
        ("BPR", {"epochs": 1}),
    ):
        result = quick_start.run(
            model, "toy", config_dict=ring | data | split | few | {"run_dir": model}
        )
        ranks = pd.read_csv(f"{model}/ranks.csv")
        assert ranks["user"].duplicated().any() and ranks["rank"].max() <= 11
        assert result["test_result"]["hit@1"] == pytest.approx(
            (ranks["rank"] == 1).mean(), abs=6e-5
        )
        assert len(ranks) in (33, 36)  # a tenth of the rows: those with a history, or for BPR all


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("GRU4Rec", {}, "GenHit needs an answer in words, and GRU4Rec writes none"),
        ("SDPO-LLM", {"eval_args": {"mode": "full"}}, "GenHit needs sampled candidates"),
        ("SDPO-LLM", {"decoding": "beam"}, "decoding='beam' must be one of free, constrained"),
        ("SDPO-LLM", {"valid_metric": "GenHit@1"}, "valid_metric='GenHit@1' is not computed"),
    ],
)
def test_what_cannot_be_answered_is_refused(ring, model, settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(
            model, "toy", config_dict=ring | {"metrics": ["Hit", "NDCG", "GenHit"]} | settings
        )
