"""Items that carry the target's title, against a slow ranking without them."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.evaluator.ranks import RankCollector, metric_of_ranks
from recbole_sdpo.evaluator.titles import TitleCollector, highest, without_twins
from tests.conftest import write_dataset


@given(st.data())
def test_only_items_of_a_targets_title_leave_its_row(data):
    rows, items = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 8))
    row_of_scores = st.lists(st.integers(0, 3), min_size=items, max_size=items)
    scores = torch.tensor(data.draw(st.lists(row_of_scores, min_size=rows, max_size=rows))).float()
    group = np.array(data.draw(st.lists(st.integers(0, 3), min_size=items, max_size=items)))
    pairs = data.draw(
        st.lists(
            st.tuples(st.integers(0, rows - 1), st.integers(0, items - 1)),
            min_size=1,
            max_size=6,
            unique=True,
        )
    )
    row, target = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    found = without_twins(scores, row, target, torch.from_numpy(group))
    for r in range(rows):
        for item in range(items):
            twin = (
                any(where == r and group[item] == group[of] for where, of in pairs)
                and (r, item) not in pairs
            )
            assert found[r, item] == (-np.inf if twin else scores[r, item])


def twins(tmp_path):
    """The ring, in which each item has another of its title; and settings to rank all 48."""
    rng = np.random.default_rng(0)
    sequences = [
        [1 + (start + step) % 24 + 24 * int(rng.integers(2)) for step in range(12)]
        for start in range(24)
        for _ in range(2)
    ]
    path = write_dataset(
        tmp_path / "twins", sequences, {item: f"Thing {(item - 1) % 24}" for item in range(1, 49)}
    )
    return {
        "data_path": str(path),
        "eval_args": {"mode": "full"},
        "valid_metric": "NDCG@1",
        "topk": [1, 5],
        "epochs": 1,
    }


@pytest.mark.parametrize("model", ["SDPO-LLM", "Pop", "BPR"])
def test_a_title_that_items_share_is_one_answer(tmp_path, ring, model, monkeypatch):
    seen, collect = [], RankCollector.eval_batch_collect

    def spy(self, scores, interaction, row, item):
        seen.append((scores.clone().double().numpy(), row.numpy(), item.numpy()))
        return collect(self, scores, interaction, row, item)

    monkeypatch.setattr(RankCollector, "eval_batch_collect", spy)
    few = twins(tmp_path) | (
        {"sft_epochs": 1, "objective": "sft", "eval_step": 0}
        if model == "SDPO-LLM"
        else {"eval_step": 0}
    )
    result = quick_start.run(model, "toy", config_dict=ring | few | {"run_dir": "here"})
    ranks = pd.read_csv("here/ranks.csv")
    slow = []
    for scores, rows, items in seen:
        for row, item in zip(rows, items, strict=True):
            others = [
                other
                for other in range(1, 49)
                if other != item and scores[row, other] > scores[row, item]
            ]
            equal = [other for other in range(1, 49) if scores[row, other] == scores[row, item]]
            slow.append((others, equal, item))
    slow = slow[-len(ranks) :]
    # Internal ids of twins, by the ids in the data: i7 and i31 carry one title.
    config = RunConfig(model, "toy", config_dict=ring | few)
    name = create_dataset(config).field2id_token["item_id"]
    title = np.array([-1, *((int(token[1:]) - 1) % 24 for token in name[1:])])
    for (higher, equal, item), rank in zip(slow, ranks["rank"], strict=True):
        least = 1 + sum(title[other] != title[item] for other in higher)
        tied = sum(title[other] != title[item] for other in equal)
        assert least <= rank <= max(least + tied, 6)
        if least <= 5 and not tied:
            assert rank == least
    for metric, value in result["test_result"].items():
        assert metric_of_ranks(metric, ranks["rank"].to_numpy()).mean() == pytest.approx(
            value, abs=6e-5
        ), metric
    if model == "Pop":
        assert result["popularity"]["hit@1"] == pytest.approx(
            result["test_result"]["hit@1"], abs=6e-5
        )


@pytest.mark.parametrize("best", [1, 5])
def test_of_equal_scores_none_is_preferred(ring, best):
    """The last item is as often among the best as any other, which torch.topk alone would not
    see to."""
    config = RunConfig(
        "Pop", "toy", config_dict=ring | {"topk": [best], "valid_metric": f"NDCG@{best}"}
    )
    dataset = create_dataset(config)
    catalogue, user = Catalogue.without_titles(dataset), torch.tensor([0])
    scores = torch.zeros(1, dataset.item_num).index_fill(1, torch.tensor([0]), -torch.inf)
    seeds, seen = 400, np.zeros(dataset.item_num)
    for seed in range(seeds):
        config["candidates_seed"] = seed
        collector = TitleCollector(config, catalogue)
        for needed in ("rec.items", "rec.score"):
            setattr(collector.register, needed, True)
        collector.eval_batch_collect(scores, Interaction({"u": user}), user, user + 1)
        struct = collector.get_data_struct()
        assert struct.get("rec.score").equal(scores)
        items = struct.get("rec.items")[0]
        assert len(set(items.tolist())) == best and not items.eq(0).any()
        seen[items] += 1
    expected = seeds * best / (dataset.item_num - 1)
    assert (abs(seen[1:] - expected) < 5 * expected**0.5).all()


@given(st.data())
def test_of_equals_the_first_is_the_highest(data):
    """By Python's sort, which is stable: so the best two are the best of the best five."""
    items = data.draw(st.integers(1, 40))
    row = st.lists(st.sampled_from([-np.inf, 0.0, 0.5, 1.0]), min_size=items, max_size=items)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    k = data.draw(st.integers(1, items))
    expected = [sorted(range(items), key=lambda item: -row[item])[:k] for row in rows]
    assert highest(torch.tensor(rows), k).tolist() == expected


def test_the_lot_of_equals_is_the_same_for_every_topk(ring):
    """Popularity has few distinct scores."""
    results = {}
    for topk in (1, 2, 5):
        result = quick_start.run(
            "Pop",
            "toy",
            config_dict=ring
            | {"topk": [topk], "valid_metric": f"NDCG@{topk}", "eval_args": {"mode": "full"}}
            | {"metrics": ["Hit", "NDCG", "ItemCoverage"], "run_dir": f"top-{topk}"},
        )
        ranks = pd.read_csv(f"top-{topk}/ranks.csv")["rank"]
        results[topk] = ranks.where(ranks <= topk, 0)
        assert result["test_result"][f"hit@{topk}"] == pytest.approx(
            (ranks <= topk).mean(), abs=1e-4
        )
    assert results[5].gt(0).any()
    for topk in (1, 2):
        assert results[topk].equals(results[5].where(results[5] <= topk, 0))


def test_the_best_alone_are_enough_for_shared_titles(tmp_path, ring):
    few, ranks = twins(tmp_path) | {"sft_epochs": 1, "objective": "sft"}, {}
    for full_sort in ("exact", "topk"):
        quick_start.run(
            "SDPO-LLM",
            "toy",
            config_dict=ring | few | {"run_dir": full_sort, "full_sort": full_sort},
        )
        ranks[full_sort] = pd.read_csv(f"{full_sort}/ranks.csv")["rank"].clip(upper=6).tolist()
    assert ranks["exact"] == ranks["topk"]
