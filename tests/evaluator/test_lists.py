"""What all users get, against the published definitions, item by item."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metrics_dict
from recbole.quick_start import run_recbole

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.lists import MGU, OF_LISTS, popularity_groups
from recbole_sdpo.evaluator.ranks import RankCollector

RECBOLES = ["ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy", "TailPercentage"]
ALL = [*RECBOLES, "MGU", "DGU", "ORRatio"]


def slowly(
    lists: list[list[int]], counts: dict[int, int], tail: float, genres: dict[int, set[str]]
) -> dict[str, float]:
    """Each metric by its formula, from the lists of all users, how often an item of the catalogue
    was met, and what it is."""
    shown = [item for row in lists for item in row]
    times = sorted(shown.count(item) for item in counts)
    rarest = sorted(counts, key=lambda item: (counts[item], item))
    in_tail = (
        {item for item in counts if counts[item] <= tail}
        if tail > 1
        else set(rarest[: max(1, int(tail * len(counts)))])
    )
    # twice the area between the Lorenz curve and the diagonal, as a mean over pairs
    pairs = sum(abs(a - b) for a in times for b in times)
    unfairness = []
    for genre in set().union(*genres.values()):
        part = {item: (genre in of) / len(of) for item, of in genres.items() if of}
        gp = sum(part.get(item, 0) for item in shown)
        gp /= sum(bool(genres[item]) for item in shown) or 1
        gh = sum(part.get(item, 0) * counts[item] for item in counts)
        gh /= sum(bool(genres[item]) * counts[item] for item in counts) or 1
        unfairness.append(gp - gh)
    return {
        "itemcoverage": len(set(shown)) / len(counts),
        "averagepopularity": np.mean([np.mean([counts[item] for item in row]) for row in lists]),
        "giniindex": pairs / (2 * len(times) ** 2 * (sum(times) / len(times))),
        "shannonentropy": -sum(p * math.log(p) for p in (n / len(shown) for n in times if n)),
        "tailpercentage": np.mean([np.mean([item in in_tail for item in row]) for row in lists]),
        "mgu": np.mean(np.abs(unfairness)),
        "dgu": max(unfairness) - min(unfairness),
        "orratio": sum(times[-3:]) / len(shown),
    }


@given(st.data())
def test_metrics_are_as_they_were_published(data):
    items, k = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 2))
    row = st.lists(st.integers(1, items), min_size=k, max_size=k, unique=True)
    lists = data.draw(st.lists(row, min_size=1, max_size=6))
    counts = {item: data.draw(st.integers(0, 4)) for item in range(1, items + 1)}
    tail = data.draw(st.sampled_from([0.1, 0.5, 1.0, 2, 3]))
    struct = DataStruct()
    struct.set("rec.items", torch.tensor(lists))
    struct.set("data.num_items", items + 1)  # with RecBole's padding
    struct.set("data.count_items", counts)
    some = st.sets(st.sampled_from("abc"))
    genres = {item: data.draw(some) for item in counts} | {1: {"a"}}
    weights = [[0.0] * 3] + [[(g in of) / max(len(of), 1) for g in "abc"] for of in genres.values()]
    here = [place for place, g in enumerate("abc") if any(g in of for of in genres.values())]
    struct.set("data.groups", np.array(weights)[:, here])
    config = {"topk": [k], "metric_decimal_place": 9, "tail_ratio": tail}
    expected = slowly(lists, counts, tail, genres)
    for name in map(str.lower, ALL):
        assert metrics_dict[name] is OF_LISTS[name]
        found = metrics_dict[name](config).calculate_metric(struct)
        assert found == {f"{name}@{k}": pytest.approx(expected[name], abs=1e-6)}, name


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_every_model_is_judged_on_the_whole_catalogue_and_there_alone(ring, model, monkeypatch):
    scores = {}
    collect = RankCollector.eval_batch_collect

    def heard(self, scores_tensor, interaction, *targets):
        scores.setdefault(len(interaction) > len(scores_tensor), []).append(scores_tensor.clone())
        return collect(self, scores_tensor, interaction, *targets)

    monkeypatch.setattr(RankCollector, "eval_batch_collect", heard)
    few = {"epochs": 1, "eval_step": 0, "sft_epochs": 1, "objective": "sft"}
    given = few if model == "SDPO-LLM" else {"epochs": 1, "eval_step": 0}
    result = quick_start.run(
        model,
        "toy",
        config_dict=ring
        | given
        | {"more_candidates": ["full"], "metrics": ["Hit", *ALL], "topk": [1, 3]}
        | {"valid_metric": "Hit@1"},
    )
    tests = result["stages"]["sft" if model == "SDPO-LLM" else "fit"]["candidates"]
    assert set(tests["uni5"]["test"]) == {"hit@1", "hit@3"}
    full = torch.cat(scores[False])
    assert full.shape == (72, 25)
    # the ring: 24 items in 72 users' twelve events, of which the last two are held out
    counts = dict.fromkeys(range(1, 25), 30)
    fifths = {item: {str((item - 1) * 5 // 24)} for item in counts}
    for k in (1, 3):
        expected = slowly(full.topk(k).indices.tolist(), counts, 0.1, fifths)
        for name, value in expected.items():
            found = tests["full"]["test"][f"{name}@{k}"]
            assert found == pytest.approx(value, abs=6e-5), (name, k)
    assert not np.isnan(result["popularity"]["hit@1"]) and "giniindex@1" not in result["popularity"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"eval_args": {"mode": "uni5"}},
            r"GiniIndex .*set eval_args.mode=full, or .*\(now uni5\)",
        ),
        ({"eval_args": {"mode": "uni5"}, "more_candidates": ["pop5"]}, "set eval_args.mode=full"),
        ({"candidates_file": "x.csv"}, r"set more_candidates=\['full'\] \(now candidates_file='x"),
        (
            {
                "candidates_file": "x.csv",
                "more_candidates": ["full"],
                "valid_metric": "GiniIndex@5",
            },
            r"valid_metric='GiniIndex@5' must be of a target's rank.*\(file, full\)",
        ),
        (
            {"valid_metric": "GiniIndex@5", "more_candidates": ["uni5"]},
            r"valid_metric='GiniIndex@5' must be of a target's rank.*\(full, uni5\)",
        ),
    ],
)
def test_what_a_sample_of_items_cannot_say_is_refused(ring, settings, message):
    full = {"eval_args": {"mode": "full"}, "metrics": ["NDCG", "GiniIndex"]}
    with pytest.raises(UserError, match=message):
        RunConfig("BPR", "toy", config_dict=ring | full | settings)
    assert RunConfig("BPR", "toy", config_dict=ring | full)["metrics"] == full["metrics"]


def test_groups_may_be_a_column_of_the_items(rated, monkeypatch):
    """The class of the nth item is 1 + n % 5; one row has two."""
    file = Path(rated["data_path"]) / "toy" / "toy.item"
    text = file.read_text().replace("class:token", "class:token_seq")
    file.write_text(text.replace("red cube\t1", "red cube\t1 2"))
    lists = []
    of = MGU.of
    monkeypatch.setattr(MGU, "of", lambda self, *a: lists.append(a[0]) or of(self, *a))
    settings = {"eval_args": {"mode": "full"}, "metrics": ["NDCG", "MGU", "DGU"], "topk": [5]}
    settings |= {"epochs": 1, "eval_step": 0, "fairness_groups": "class"}
    test = quick_start.run("GRU4Rec", "toy", config_dict=rated | settings)["test_result"]
    dataset = create_dataset(RunConfig("GRU4Rec", "toy", config_dict=rated | settings))
    number = [0, *(int(token[1:]) for token in dataset.field2id_token["item_id"][1:])]
    genres = {n: {str(1 + (n - 1) % 5)} for n in range(1, 25)} | {1: {"1", "2"}}
    shown = [[number[item] for item in row] for row in lists[0]]
    expected = slowly(shown, dict.fromkeys(range(1, 25), 30), 0.1, genres)
    assert test["mgu@5"] == pytest.approx(expected["mgu"], abs=6e-5)
    assert test["dgu@5"] == pytest.approx(expected["dgu"], abs=6e-5)


def test_a_column_that_is_not_there_is_named_before_training(rated):
    settings = {"eval_args": {"mode": "full"}, "metrics": ["NDCG", "MGU"], "epochs": 10**6}
    file = Path(rated["data_path"], "toy", "toy.item")
    text = file.read_text()
    file.write_text(text.replace("item_id:", "product:", 1))
    with pytest.raises(
        UserError, match=r"fairness_groups='class': .*toy.item has no column 'item_id'"
    ):
        quick_start.run("BPR", "toy", config_dict=rated | settings | {"fairness_groups": "class"})
    file.write_text(text)
    with pytest.raises(UserError, match="fairness_groups='genre' must be popularity.*: .*class"):
        quick_start.run("BPR", "toy", config_dict=rated | settings | {"fairness_groups": "genre"})


def test_a_column_without_a_category_is_named_before_training(rated):
    file = Path(rated["data_path"]) / "toy" / "toy.item"
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{head}\tgenre:token_seq", *(f"{line}\t" for line in lines)]))
    settings = {"eval_args": {"mode": "full"}, "metrics": ["NDCG", "MGU"], "epochs": 10**6}
    with pytest.raises(UserError, match="genre.* must name the category of some item"):
        quick_start.run("BPR", "toy", config_dict=rated | settings | {"fairness_groups": "genre"})


def test_recboles_own_trainers_have_no_groups(ring):
    settings = {"eval_args": {"mode": "full"}, "metrics": ["NDCG", "MGU"], "epochs": 1}
    with pytest.raises(UserError, match="MGU needs groups of items.*quick_start.run"):
        run_recbole(model="BPR", dataset="toy", config_dict=ring | settings)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_fifths_hold_as_many_items(met):
    groups = popularity_groups(np.array([99, *met]))
    assert not groups[0].any() and (groups[1:].sum(1) == 1).all()
    sizes = groups.sum(0)
    assert sizes.max() - sizes.min() <= 1
    of = groups[1:].argmax(1)
    assert all(of[a] <= of[b] for a in range(len(met)) for b in range(len(met)) if met[a] < met[b])
