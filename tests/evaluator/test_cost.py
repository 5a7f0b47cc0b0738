"""What is timed, by a clock of the test."""

from types import SimpleNamespace

import pytest
import torch

from recbole_sdpo import compat, quick_start
from recbole_sdpo.evaluator.cost import BUDGET, USERS, top_time


class Timed:
    """A trainer and a loader of ``users``, and the clock that they move."""

    def __init__(self, users: int, seconds: list[float]) -> None:
        self.sample_size, self.seconds, self.now = users, seconds, 0.0
        self.asked: list[int] = []
        self.model = SimpleNamespace(eval=lambda: None)

    def collate_fn(self, index: list[int]) -> list[int]:
        self.now += 100  # what a loader does is no work of the model's
        return index

    def _full_sort_batch_eval(self, batch: list[int]) -> tuple:
        (user,) = batch
        assert not torch.is_grad_enabled()
        self.now += self.seconds[min(len(self.asked), len(self.seconds) - 1)]
        self.asked.append(user)
        return None, torch.arange(12.0)[None], None, None

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("users", "seconds", "ms", "timed"),
    [
        (3, [0.5, 0.25, 0.125], 187.5, 2),  # the first warms up
        (1, [0.25], 250.0, 1),
        (500, [0.0, 2**-9], 1.953, USERS),
        (500, [0.5, 0.5, 0.5, 0.5, 0.5], 500.0, int(BUDGET / 0.5) - 1),
        (500, [60.0], 60000.0, 1),
    ],
)
def test_one_user_is_timed_after_the_other(users, seconds, ms, timed):
    both = Timed(users, seconds)
    assert top_time(both, both, both.clock) == {"ms": ms, "users": timed}
    assert len(set(both.asked)) == len(both.asked) and max(both.asked) < users
    if len(both.asked) == USERS + 1:
        assert both.asked[0] == 0 and both.asked[-1] == users - 1


@pytest.mark.parametrize("model", ["SDPO-LLM", "NeuMF"])
def test_every_model_that_ranks_the_catalogue_is_timed(ring, model, monkeypatch):
    """NeuMF has no ranking of its own: RecBole scores each item."""
    few = {"sft_epochs": 1, "objective": "sft"} if model == "SDPO-LLM" else {"epochs": 2}
    ticks = iter(range(10**6))
    monkeypatch.setattr(compat, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    full = {"more_candidates": ["full"], "topk": [5], "valid_metric": "NDCG@5"}
    result = quick_start.run(model, "toy", config_dict=ring | few | full)
    assert set(result["top10"]) == {"ms", "users"} and 1 <= result["top10"]["users"] <= USERS
    (stage,) = result["stages"].values()
    if model == "NeuMF":
        assert stage["train_s"] == 2  # a tick for each epoch
    sampled = quick_start.run(model, "toy", config_dict=ring | few)
    assert sampled["top10"] is None
