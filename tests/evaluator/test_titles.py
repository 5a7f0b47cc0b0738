"""Items that carry the target's title, against a slow ranking without them."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo import quick_start
from recbole_sdpo.evaluator.ranks import metric_of_ranks
from recbole_sdpo.evaluator.titles import without_twins
from tests.conftest import write_dataset


@given(st.data())
def test_only_items_of_a_targets_title_leave_its_row(data):
    rows, items = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 8))
    row_of_scores = st.lists(st.integers(0, 3), min_size=items, max_size=items)
    scores = torch.tensor(data.draw(st.lists(row_of_scores, min_size=rows, max_size=rows))).float()
    group = np.array(data.draw(st.lists(st.integers(0, 3), min_size=items, max_size=items)))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, items - 1)), min_size=1, max_size=6, unique=True))
    row, target = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    found = without_twins(scores, row, target, torch.from_numpy(group))
    for r in range(rows):
        for item in range(items):
            twin = any(where == r and group[item] == group[of] for where, of in pairs) and (r, item) not in pairs
            assert found[r, item] == (-np.inf if twin else scores[r, item])


@pytest.mark.parametrize("model", ["SDPO-LLM", "Pop", "BPR"])
@pytest.mark.parametrize("full_sort", ["exact", "topk"])
def test_a_title_that_items_share_is_one_answer(tmp_path, ring, model, full_sort):
    """Each item of the ring has a twin of its title that others have met: with it out of the way, ranks are those among 24 titles."""
    if model != "SDPO-LLM" and full_sort == "topk":
        pytest.skip("of SDPO-LLM alone")
    rng = np.random.default_rng(0)
    sequences = [[1 + (start + step) % 24 + 24 * int(rng.integers(2)) for step in range(12)] for start in range(24) for _ in range(2)]
    path = write_dataset(tmp_path / "twins", sequences, {item: f"Thing {(item - 1) % 24}" for item in range(1, 49)})
    few = {"epochs": 1} if model != "SDPO-LLM" else {"sft_epochs": 1, "objective": "sft", "full_sort": full_sort}
    few |= {"data_path": str(path), "run_dir": "here", "eval_args": {"mode": "full"}, "topk": [1, 48 if full_sort == "exact" else 5]}
    result = quick_start.run(model, "toy", config_dict=ring | few | {"valid_metric": "NDCG@1"})
    ranks = pd.read_csv("here/ranks.csv")
    if full_sort == "exact":
        assert ranks["rank"].max() <= 47  # its twin is behind it
    for name, value in result["test_result"].items():
        assert metric_of_ranks(name, ranks["rank"].to_numpy()).mean() == pytest.approx(value, abs=6e-5), name
    if model == "Pop":
        assert result["popularity"]["hit@1"] == pytest.approx(result["test_result"]["hit@1"], abs=6e-5)
