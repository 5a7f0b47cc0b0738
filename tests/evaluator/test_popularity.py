"""Popularity taken off a model's scores, against counts of the sequences that the test itself
has written."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recbole_sdpo import quick_start
from recbole_sdpo.recommend import Recommender
from tests.conftest import write_dataset

ITEMS, USERS = 12, 40


@pytest.fixture
def skewed(ring, tmp_path) -> tuple[dict, list[list[int]]]:
    """Settings for a dataset of which some items are popular, and its sequences."""
    draw, share = np.random.default_rng(3), np.arange(1, ITEMS + 1) ** 2.0
    sequences = [
        draw.choice(ITEMS, 6, replace=False, p=share / share.sum()).tolist() for _ in range(USERS)
    ]
    titles = {item: f"title {'abcdefghijkl'[item]}" for item in range(ITEMS)}
    settings = {
        "data_path": str(write_dataset(tmp_path / "skewed", sequences, titles)),
        "eval_args": {"mode": "full"},
    }
    return ring | settings | {"run_dir": "here", "topk": [5, ITEMS]}, sequences


def places(
    score: np.ndarray, sequences: list[list[int]], twins: Sequence[int] = ()
) -> dict[str, tuple[int, int]]:
    """For each user the first and the last place that the last item may have, ranked by
    ``score`` among all whose titles the user has not met before; ``twins`` have one title."""
    found = {}
    for user, (*met, target) in enumerate(sequences):
        others = np.delete(score, [target, *met, *(twins if {*twins} & {*met} else [])])
        found[f"u{user}"] = (
            1 + (others > score[target] + 1e-6).sum(),
            1 + (others >= score[target] - 1e-6).sum(),
        )
    return found


def met_in_training(sequences: list[list[int]]) -> np.ndarray:
    return np.bincount([item for row in sequences for item in row[:-2]], minlength=ITEMS)


def check_ranks(expected: dict[str, tuple[int, int]], stage: str | None = None) -> None:
    kept = pd.read_csv("here/ranks.csv")
    kept = kept[kept.stage == stage] if stage else kept
    assert set(kept["user"]) == set(expected)
    for user, rank in zip(kept["user"], kept["rank"]):
        assert expected[user][0] <= rank <= expected[user][1]


@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_recboles_pop_is_the_floor(skewed, mode):
    settings, _ = skewed
    result = quick_start.run("Pop", "toy", config_dict=settings | {"eval_args": {"mode": mode}})
    assert result["test_result"] == result["popularity"]


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_log_popularity_comes_off_the_scores(skewed, times):
    settings, sequences = skewed
    quick_start.run("Pop", "toy", config_dict=settings | {"popularity_discount": times})
    met = met_in_training(sequences)
    check_ranks(places(met / met.max() - times * np.log(met + 1), sequences))


def test_of_a_language_model_it_is_that_of_the_title_and_of_the_last_stage(skewed, tmp_path):
    settings, sequences = skewed
    file, twins = tmp_path / "skewed" / "toy" / "toy.item", [9, 11]
    file.write_text(file.read_text().replace("title l", "title j"))
    quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"popularity_discount": 1.5})
    met = met_in_training(sequences)
    met[twins] = met[twins].sum()
    recommender, expected = Recommender.load("here"), {}
    for user, row in enumerate(sequences):
        found = recommender.recommend(
            history=[f"title {'abcdefghijkj'[item]}" for item in row[:-1]], k=ITEMS - 1
        )
        score = np.empty(ITEMS)
        for item, log_prob in zip(found["item"], found["score"]):
            score[twins if int(item[1:]) in twins else int(item[1:])] = log_prob
        expected |= {
            f"u{user}": place
            for place in places(score - 1.5 * np.log(met + 1), [row], twins).values()
        }
    check_ranks(expected, "sdpo")
    quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"run_dir": "plain"})
    assert (
        Path("here/sft/model.safetensors").read_bytes()
        == Path("plain/sft/model.safetensors").read_bytes()
    )
    plain, less = (pd.read_csv(f"{folder}/ranks.csv") for folder in ("plain", "here"))
    assert less[less.stage == "sft"].equals(plain[plain.stage == "sft"]) and not less.equals(plain)


def test_alignment_has_to_beat_its_start_under_the_same_discount(skewed):
    settings = skewed[0] | {"popularity_discount": 1.5}
    aligned = quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"sdpo_epochs": 0})[
        "stages"
    ]
    start = quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=settings
        | {"sft_checkpoint": "here/sft", "objective": "sft", "run_dir": "start"},
    )
    assert aligned["sdpo"]["valid"] == start["stages"]["sft"]["valid"] != aligned["sft"]["valid"]


@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec"])
def test_so_much_of_it_that_the_rarest_is_first(skewed, model):
    settings, sequences = skewed
    few = {"epochs": 1} if model == "GRU4Rec" else {"sft_epochs": 1, "objective": "sft"}
    result = quick_start.run(
        model, "toy", config_dict=settings | few | {"popularity_discount": 1000}
    )
    rarity = -met_in_training(sequences)
    check_ranks(places(rarity, sequences))
    first, last = np.array(list(places(rarity, [row[:-1] for row in sequences]).values())).T
    (stage,) = result["stages"].values()  # the weights are chosen by the same scores
    assert (1 / last).mean() - 1e-4 <= stage["valid"][f"mrr@{ITEMS}"] <= (1 / first).mean() + 1e-4


def test_the_floor_is_not_logged_as_the_model_to_weights_and_biases(skewed, tmp_path, monkeypatch):
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        "run = SimpleNamespace(summary={})\n"
        "def log(*args, **kwargs): pass\n"
        "define_metric = init = log\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    settings, _ = skewed
    result = quick_start.run("BPR", "toy", config_dict=settings | {"log_wandb": True, "epochs": 1})
    summary = sys.modules.pop("wandb").run.summary
    assert summary == {f"eval/{name}": value for name, value in result["test_result"].items()}
    assert result["popularity"] != result["test_result"]
