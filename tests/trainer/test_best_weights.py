"""Each candidate set is tested with the weights that validate best on it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.model.general_recommender.bpr import BPR
from recbole.utils import early_stopping

from recbole_sdpo import quick_start
from recbole_sdpo.trainer.best_weights import BestWeights, restore, snapshot
from recbole_sdpo.trainer.sdpo_trainer import SDPOTrainer
from tests.conftest import write_dataset


def alone(model, settings, mode):
    return quick_start.run(
        model,
        "toy",
        config_dict=settings | {"eval_args": {"mode": mode}, "run_dir": f"alone-{mode}"},
    )


@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec"])
def test_a_further_candidate_set_is_what_a_run_of_its_own_would_have(ring, model):
    """While no set stops the training early, one run gives what a run for each gives."""
    settings = ring | {
        "stopping_step": 50,
        "epochs": 3,
        "sft_epochs": 3,
        "objective": "sft",
        "candidates_seed": 7,
    }
    both = quick_start.run(
        model, "toy", config_dict=settings | {"more_candidates": ["pop9"], "run_dir": "both"}
    )
    stage = both["stages"]["fit" if model == "GRU4Rec" else "sft"]
    ranks = pd.read_csv("both/ranks.csv")
    for mode in ("uni5", "pop9"):
        one = alone(model, settings, mode)
        assert both["candidates_sha256"][mode] == one["candidates_sha256"][mode]
        found = next(iter(one["stages"].values()))
        assert stage["candidates"][mode] == {"valid": found["valid"], "test": found["test"]}
        mine = ranks[ranks.candidates == mode].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, pd.read_csv(f"alone-{mode}/ranks.csv"))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("bigger", [False, True])
def test_of_equal_epochs_the_one_is_kept_that_the_trainer_keeps(bigger, later):
    """RecBole's early stopping takes an equal score for a better one."""
    scores = [{"ndcg@5": value} for value in (0.4, 0.5, 0.5, 0.3)]
    trainer = SimpleNamespace(valid_metric="ndcg@5", valid_metric_bigger=bigger)
    best, weights = None, BestWeights(trainer, {}, None, later)
    for epoch, score in enumerate(scores):
        if weights._better(score, best and scores[best]):
            best = epoch
    if bigger:
        assert best == 1 + later
    else:
        assert best == 3
    *_, stop, keep = early_stopping(0.5, 0.5, 0, 10, bigger=bigger)
    assert keep and not stop


def test_a_baseline_that_keeps_no_file_is_tested_with_its_best_weights_too(ring, tmp_path):
    """On sequences without a rule, of which no epoch learns more than another."""
    drawn = np.random.default_rng(0)
    write_dataset(
        tmp_path / "noise",
        [[int(item) for item in drawn.permutation(24)[:10] + 1] for _ in range(48)],
        None,
    )
    settings = ring | {
        "data_path": str(tmp_path / "noise"),
        "epochs": 8,
        "learning_rate": 0.03,
        "more_candidates": ["pop9"],
    }
    kept, unkept = (
        quick_start.run("GRU4Rec", "toy", config_dict=settings, saved=saved)
        for saved in (True, False)
    )
    assert unkept["stages"]["fit"]["candidates"] == kept["stages"]["fit"]["candidates"]


def test_a_resumed_run_tests_the_weights_that_the_uninterrupted_one_does(ring, monkeypatch):
    settings = ring | {
        "more_candidates": ["pop9"],
        "sft_epochs": 4,
        "sdpo_epochs": 1,
        "sft_learning_rate": 0.02,
    }
    whole = quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"run_dir": "whole"})

    class Dead(Exception):
        pass

    def die(*_, **__):
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(quick_start, "_test", die)
        with pytest.raises(Dead):
            quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"run_dir": "cut"})
    again = quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"resume": "cut"})
    for stage in ("sft", "sdpo"):
        assert again["stages"][stage]["candidates"] == whole["stages"][stage]["candidates"]


@pytest.mark.parametrize(("discount", "times"), [(0.0, 2), (1.0, 4)])
def test_what_no_sft_has_changed_is_validated_once(ring, monkeypatch, discount, times):
    settings = ring | {"more_candidates": ["pop9"], "sft_epochs": 1, "sdpo_epochs": 0}
    quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"run_dir": "before"})
    settings |= {"sft_checkpoint": "before", "popularity_discount": discount}
    validated, evaluate = [], SDPOTrainer.evaluate

    def counted(self, eval_data, *args, **kwargs):
        validated.append(eval_data)
        return evaluate(self, eval_data, *args, **kwargs)

    monkeypatch.setattr(SDPOTrainer, "evaluate", counted)
    stages = quick_start.run("SDPO-LLM", "toy", config_dict=settings)["stages"]
    sft, sdpo = (stages[name]["candidates"]["pop9"] for name in ("sft", "sdpo"))
    assert sft == sdpo  # of items that are met alike, too, whose popularity changes no order
    # the test sets of two stages, and each validation set by each way to score
    assert len(validated) == 4 + times
    assert len({id(loader) for loader in validated}) == 4


class Sometimes:
    """A trainer whose validation follows a script."""

    valid_metric, valid_metric_bigger = "ndcg@5", True

    def __init__(self, scores):
        self.model = torch.nn.Linear(2, 2)
        self.model.other_parameter = dict
        self.model.load_other_parameter = lambda rest: None
        self.scores = scores

    def evaluate(self, loader, load_best_model):
        return {"ndcg@5": next(self.scores[loader])}


@pytest.mark.parametrize("interrupted", [False, True])
def test_each_set_keeps_its_own_best(tmp_path, interrupted):
    trainer = Sometimes({"a": iter([0.1, 0.3, 0.2]), "b": iter([0.5, 0.4, 0.6])})
    best = BestWeights(trainer, {"pop1": "a", "pop2": "b"}, tmp_path)
    best.begin("sft", validated=False)
    weights = []
    for epoch in range(3):
        if epoch == 2 and interrupted:
            best = BestWeights(trainer, {"pop1": "a", "pop2": "b"}, tmp_path)
            best.begin("sft", validated=True)
        torch.nn.init.normal_(trainer.model.weight)
        weights.append(trainer.model.weight.detach().clone())
        best()
    for mode, epoch in (("pop1", 1), ("pop2", 2)):
        best.restore(mode)
        assert torch.equal(trainer.model.weight, weights[epoch])
    best.begin("sdpo", validated=False)
    assert not best.valid


def test_with_its_weights_a_model_has_what_it_keeps_beside_them():
    trainer = Sometimes({"a": iter([0.1, 0.3, 0.2]), "b": iter([0.5, 0.4, 0.6])})
    model = trainer.model
    model.other_parameter = lambda: {"epoch": model.epoch}
    model.load_other_parameter = lambda rest: setattr(model, "loaded", rest)
    best = BestWeights(trainer, {"pop1": "a", "pop2": "b"}, None)
    best.begin("fit", validated=False)
    for model.epoch in range(3):
        model.restore_user_e = f"representations of epoch {model.epoch}"
        best()
    for mode, number in (("pop1", 1), ("pop2", 2)):
        model.restore_user_e = "representations of epoch 2"
        best.restore(mode)
        assert model.loaded == {"epoch": number} and model.restore_user_e is None


def test_a_snapshot_has_what_training_changes():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    kept = snapshot(model)
    assert set(kept) == {
        "0.weight",
        *(
            f"1.{name}"
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(8, 2)).sum().backward()
    torch.optim.SGD(p for p in model.parameters() if p.requires_grad).step()
    assert not np.array_equal(model[1].running_mean, before["1.running_mean"])
    restore(model, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("named", [True, False], ids=["as LightGCN", "as KGIN"])
@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_representations_that_a_model_keeps_are_those_of_the_weights_it_is_tested_with(
    ring, tmp_path, monkeypatch, named, mode
):
    """A model that keeps them scores as one that makes them anew each time."""
    drawn = np.random.default_rng(0)
    without_rule = [[int(item) for item in drawn.permutation(24)[:10] + 1] for _ in range(48)]
    write_dataset(tmp_path / "noise", without_rule, None)

    class Keeping(BPR):
        if named:
            other_parameter_name = ["restore_user_e", "restore_item_e"]

        def __init__(self, config, dataset):
            super().__init__(config, dataset)
            self.restore_user_e, self.restore_item_e = None, None

        def calculate_loss(self, interaction):
            self.restore_user_e, self.restore_item_e = None, None
            return super().calculate_loss(interaction)

        def full_sort_predict(self, interaction):
            if self.restore_user_e is None:
                self.restore_user_e, self.restore_item_e = (
                    self.user_embedding.weight.detach().clone(),
                    self.item_embedding.weight.detach().clone(),
                )
            user = self.restore_user_e[interaction[self.USER_ID]]
            return (user @ self.restore_item_e.T).view(-1)

    settings = ring | {
        "data_path": str(tmp_path / "noise"),
        "epochs": 8,
        "learning_rate": 0.3,  # so that the last epoch is not the best
        "eval_args": {"mode": mode},
        "more_candidates": ["full"] if mode != "full" else ["uni5"],
    }
    anew = quick_start.run("BPR", "toy", config_dict=settings | {"run_dir": "anew"})
    monkeypatch.setattr("recbole_sdpo.compat.model_class", lambda name: Keeping)
    kept = quick_start.run("BPR", "toy", config_dict=settings | {"run_dir": "kept"})
    assert kept["stages"]["fit"]["candidates"] == anew["stages"]["fit"]["candidates"]
