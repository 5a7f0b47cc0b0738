"""What all users get, against the published definitions, item by item."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metrics_dict

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.lists import OF_LISTS
from recbole_sdpo.evaluator.ranks import RankCollector

ALL = ["ItemCoverage", "AveragePopularity", "GiniIndex", "ShannonEntropy", "TailPercentage"]


def slowly(lists: list[list[int]], counts: dict[int, int], tail: float) -> dict[str, float]:
    """Each metric by its formula, from the lists of all users and how often an item of the
    catalogue was met."""
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
    return {
        "itemcoverage": len(set(shown)) / len(counts),
        "averagepopularity": sum(
            sum(counts[item] for item in row) / len(row) for row in lists
        ) / len(lists),
        "giniindex": pairs / (2 * len(times) ** 2 * (sum(times) / len(times))),
        "shannonentropy": -sum(
            p * math.log(p) for p in (n / len(shown) for n in times if n)
        ),
        "tailpercentage": sum(
            sum(item in in_tail for item in row) / len(row) for row in lists
        ) / len(lists),
    }  # fmt: skip


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
    config = {"topk": [k], "metric_decimal_place": 9, "tail_ratio": tail}
    expected = slowly(lists, counts, tail)
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
    for k in (1, 3):
        expected = slowly(full.topk(k).indices.tolist(), counts, 0.1)
        for name, value in expected.items():
            found = tests["full"]["test"][f"{name}@{k}"]
            assert found == pytest.approx(value, abs=6e-5), (name, k)
    assert not np.isnan(result["popularity"]["hit@1"]) and "giniindex@1" not in result["popularity"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_args": {"mode": "uni5"}}, r"GiniIndex .*set eval_args.mode=full \(now uni5\)"),
        ({"eval_args": {"mode": "uni5"}, "more_candidates": ["pop5"]}, "set eval_args.mode=full"),
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
