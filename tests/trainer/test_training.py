"""Both stages on a dataset with a rule: item n is followed by n + 1."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import run_recbole
from recbole.utils import get_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from recbole_sdpo import quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.examples import FixedExamples
from recbole_sdpo.errors import UserError
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.trainer.folder import run_folder
from recbole_sdpo.trainer.stage import Stage


def start(settings):
    config = RunConfig("SDPO-LLM", "toy", config_dict=settings)
    loaders = data_preparation(config, create_dataset(config))
    model = SDPOLLM(config, loaders[0]._dataset).to(config["device"])
    return get_trainer(config["MODEL_TYPE"], config["model"])(config, model), loaders


class Recorder:
    """Stands in for a TensorBoard writer."""

    def __init__(self):
        self.seen = {}

    def add_scalar(self, name, value, step):
        self.seen.setdefault(name, []).append(value)

    def add_hparams(self, *_):
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One full run on the rule, with a record of every step."""
    from tests.conftest import TINY, write_dataset

    folder = tmp_path_factory.mktemp("trained")
    items = 24
    sequences = [
        [1 + (s + step) % items for step in range(12)] for s in range(items) for _ in range(3)
    ]
    titles = {i + 1: f"{'abcdef'[i % 6]}{'wxyz'[i // 6]} film" for i in range(items)}
    settings = TINY | {
        "data_path": str(write_dataset(folder / "data", sequences, titles)),
        "checkpoint_dir": str(folder / "saved"),
        "run_dir": str(folder / "run"),
        "scratch_hidden_size": 64,
        "sft_epochs": 20,
        "sft_learning_rate": 3e-3,
        "sft_tokens_per_batch": 64,
        "stopping_step": 50,
        "sdpo_epochs": 3,
        "sdpo_learning_rate": 1e-3,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytest"])
        patch.chdir(folder)
        trainer, loaders = start(settings)
        trainer.tensorboard = recorder = Recorder()
        trainer.prepare(*loaders)
        zero_shot = dict(trainer.evaluate(loaders[2]))
        trainer.fit_stage("sft", loaders[0], loaders[1])
        after_sft = dict(trainer.evaluate(loaders[2]))
        trainer.fit_stage("sdpo", loaders[0], loaders[1])
        after_sdpo = dict(trainer.evaluate(loaders[2]))
    return settings, recorder.seen, zero_shot, after_sft, after_sdpo


def test_sft_learns_the_rule(trained):
    _, _, zero_shot, after_sft, _ = trained
    assert zero_shot["hit@1"] < 0.5
    assert after_sft["hit@1"] > 0.9


def test_sdpo_raises_the_margin_and_keeps_the_rule(trained):
    _, seen, _, _, after_sdpo = trained
    assert seen["sdpo/loss"][0] == pytest.approx(math.log(4), abs=1e-3)
    assert seen["sdpo/margin"][0] == pytest.approx(0, abs=1e-3)
    assert np.mean(seen["sdpo/margin"][-5:]) > 0.5
    assert np.mean(seen["sdpo/accuracy"][-5:]) > 0.6  # chance is a quarter
    assert after_sdpo["hit@1"] > 0.9


def test_everything_worth_watching_is_logged_each_step(trained):
    seen = trained[1]
    names = {
        "loss",
        "gradient_norm",
        "learning_rate",
        "reward_positive",
        "reward_negative",
        "margin",
        "accuracy",
    }
    names |= {"logp_positive", "hardest_negative_weight"}
    assert {f"sdpo/{name}" for name in names} <= set(seen)
    assert {f"sft/{name}" for name in ("loss", "gradient_norm", "learning_rate")} <= set(seen)
    assert len({len(seen[f"sdpo/{name}"]) for name in names}) == 1
    assert max(seen["sft/learning_rate"]) == pytest.approx(3e-3, rel=0.05)
    assert seen["sft/learning_rate"][-1] < 1e-3


def test_checkpoints_are_what_transformers_loads_and_hold_no_pickle(trained):
    settings = trained[0]
    run = Path(settings["run_dir"])
    for stage in ("sft", "sdpo"):
        files = {file.name for file in (run / stage).iterdir()}
        assert "model.safetensors" in files and "settings.json" in files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(run / stage),
            AutoTokenizer.from_pretrained(run / stage),
        )
        prompt = "Chosen so far, in order:\naw film\nbw film\n"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = tokenizer.decode(
            model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        )
        assert answer.startswith("cw film\n")
        assert json.loads((run / stage / "settings.json").read_text())["beta"] == 1.0


def test_a_run_may_start_at_the_second_stage(trained):
    settings, _, _, after_sft, _ = trained
    trainer, loaders = start(
        settings | {"sft_checkpoint": settings["run_dir"], "run_dir": None, "sdpo_epochs": 1}
    )
    report = trainer.fit_stage("sft", *loaders[:2])
    assert report.targets == 0 and report.valid is not None
    assert dict(trainer.evaluate(loaders[2])) == after_sft
    assert trainer.fit_stage("sdpo", *loaders[:2]).targets > 0


def test_a_checkpoint_that_does_not_fit_is_refused(trained, tmp_path):
    settings = trained[0]
    for change, message in (
        ({"scratch_layers": 1}, "does not fit this backbone at|use the settings it was made with"),
        ({"scratch_hidden_size": 16}, "does not fit this backbone at"),
        ({"scratch_heads": 4}, "was made with scratch_heads=2, and this run has 4"),
        ({"scratch_vocab_size": 280}, "has another tokenizer"),
        (
            {"sft_checkpoint": str(tmp_path)},
            "has no config.json; it must be a folder 'sft' or 'sdpo'",
        ),
        ({"peft": "lora"}, "was made with peft='none', and this run has 'lora'"),
        (
            {"item_tokens": "whole"},
            "was made with item_tokens='pieces', and this run has 'whole'",
        ),
        (
            {"prompt_templates": "movies"},
            "was made with prompt_templates='items', and this run has 'movies'",
        ),
    ):
        trainer, loaders = start(
            settings | {"sft_checkpoint": settings["run_dir"], "run_dir": None} | change
        )
        with pytest.raises(ValueError, match=message):
            trainer.fit_stage("sft", *loaders[:2])


def test_a_checkpoint_of_other_prompts_is_refused(trained, tmp_path):
    """The header that it was trained with is kept, and a file of templates may be edited."""
    settings, template = trained[0], tmp_path / "mine.yaml"
    for text in ("Seen", "Watched"):
        template.write_text(f"header: {text}\ncandidates: ['Seen {{history}} of {{candidates}}']\n")
        trainer, loaders = start(
            settings
            | {"prompt_templates": str(template), "run_dir": str(tmp_path / text), "sft_epochs": 0}
            | ({"sft_checkpoint": str(tmp_path / "Seen")} if text == "Watched" else {})
        )
        if text == "Seen":
            trainer.fit_stage("sft", *loaders[:2])
    with pytest.raises(UserError, match=r"with header='Seen\\n', and this run has 'Watched\\n'"):
        trainer.fit_stage("sft", *loaders[:2])


def test_gradients_are_not_divided_by_what_accelerate_is_told(ring, monkeypatch):
    norms = []
    for times in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", times)
        trainer, loaders = start(
            ring | {"objective": "sft", "sft_epochs": 1, "max_train_targets": 40}
        )
        trainer.tensorboard = recorder = Recorder()
        trainer.fit(*loaders[:2])
        norms.append(recorder.seen["sft/gradient_norm"])
    assert norms[0] == norms[1]


def test_without_a_learning_rate_nothing_moves(ring):
    trainer, loaders = start(
        ring | {"sft_epochs": 0, "sdpo_learning_rate": 0.0, "sdpo_weight_decay": 0.0}
    )
    trainer.tensorboard = recorder = Recorder()
    before = {name: p.clone() for name, p in trainer.model.lm.trainable().items()}
    trainer.fit(*loaders[:2])
    assert recorder.seen["sdpo/loss"] == pytest.approx(
        [math.log(4)] * len(recorder.seen["sdpo/loss"]), abs=1e-5
    )
    assert recorder.seen["sdpo/margin"] == pytest.approx(
        [0] * len(recorder.seen["sdpo/margin"]), abs=1e-4
    )
    assert all(torch.equal(before[name], p) for name, p in trainer.model.lm.trainable().items())


@pytest.mark.parametrize("objective", sorted({*OBJECTIVES} - {"sft"}))
def test_every_objective_trains_with_an_adapter(rated, objective):
    trainer, loaders = start(
        rated
        | {
            "peft": "lora",
            "lora_rank": 2,
            "lora_layers": [1],
            "objective": objective,
            "max_train_targets": 60,
            "eval_step": 0,  # the last weights are kept, however good
            "RATING_FIELD": "rating",
        }
    )
    base = {n: p.clone() for n, p in trainer.model.lm.model.named_parameters() if "lora" not in n}
    assert all("layers.1" in name for name in trainer.model.lm.trainable())
    trainer.fit_stage("sft", *loaders[:2])
    adapter = {name: p.detach().clone() for name, p in trainer.model.lm.trainable().items()}
    trainer.fit_stage("sdpo", *loaders[:2])
    assert not any(p.equal(adapter[name]) for name, p in trainer.model.lm.trainable().items())
    assert trainer.reports["sdpo"].targets >= 60
    now = dict(trainer.model.lm.model.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in base.items())
    folder = trainer.run_dir / "sdpo"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "reference").exists()
    plain = AutoModelForCausalLM.from_config(trainer.model.lm.model.get_base_model().config)
    assert isinstance(PeftModel.from_pretrained(plain, folder), PeftModel)


def test_alignment_that_only_harms_is_undone(trained):
    settings, _, _, after_sft, _ = trained
    trainer, loaders = start(
        settings
        | {"sft_checkpoint": settings["run_dir"], "run_dir": None, "sdpo_learning_rate": 1.0}
    )
    trainer.fit(*loaders[:2])
    assert dict(trainer.evaluate(loaders[2])) == after_sft


@pytest.mark.parametrize(
    ("dies_in", "sources"), [("sft", None), ("sdpo", {"uniform": 0.5, "self": 0.5})]
)
def test_a_run_that_dies_goes_on_as_if_it_had_not(ring, dies_in, sources, monkeypatch):
    settings = ring | {
        "negative_sources": sources,
        "sft_epochs": 2,
        "sdpo_epochs": 2,
        "scratch_dropout": 0.1,
        "save_minutes": 0.0,
        "sft_tokens_per_batch": 300,
    }
    whole, loaders = start(settings | {"run_dir": "whole"})
    whole.fit(*loaders[:2])

    step, left = Stage._step, [5]

    def fail_later(self, *batches):
        left[0] -= self.name == dies_in
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *batches)

    monkeypatch.setattr(Stage, "_step", fail_later)
    broken, loaders = start(settings | {"run_dir": "broken"})
    with pytest.raises(KeyboardInterrupt):
        broken.fit(*loaders[:2])
    monkeypatch.setattr(Stage, "_step", step)
    resumed, loaders = start(settings | {"resume": "broken"})
    resumed.fit(*loaders[:2])
    assert resumed.reports["sdpo"].targets == whole.reports["sdpo"].targets
    assert resumed.reports["sft"].valid == whole.reports["sft"].valid
    mine, theirs = whole.model.lm.trainable(), resumed.model.lm.trainable()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    with pytest.raises(ValueError, match="that run had .*training data="):
        other, loaders = start(
            settings | {"resume": "broken", "val_interval": {"timestamp": "[1,20]"}}
        )
        other.fit(*loaders[:2])
    with pytest.raises(ValueError, match=r"that run had beta=1.0 \(now 2.0\); give each as it was"):
        other, loaders = start(settings | {"resume": "broken", "beta": 2.0})
        other.fit(*loaders[:2])


def test_a_resumed_stage_that_gets_no_better_keeps_the_best_of_before(ring, monkeypatch):
    settings = ring | {"objective": "sft", "sft_epochs": 3, "stopping_step": 9}
    run_epoch = Stage.run_epoch

    def begin(scores, **more):
        trainer, loaders = start(settings | more)
        trainer._valid_epoch = lambda *_: (score := scores.pop(0), {"ndcg@5": score})
        return trainer, loaders[:2]

    whole, loaders = begin([0.9, 0.5, 0.4], run_dir="whole")
    whole.fit(*loaders, verbose=False)

    def die_later(stage, *rest):
        if stage.epoch == 2:
            raise KeyboardInterrupt
        return run_epoch(stage, *rest)

    monkeypatch.setattr(Stage, "run_epoch", die_later)
    broken, loaders = begin([0.9, 0.5], run_dir="broken")
    with pytest.raises(KeyboardInterrupt):
        broken.fit(*loaders, verbose=False)
    monkeypatch.setattr(Stage, "run_epoch", run_epoch)
    resumed, loaders = begin([0.4], resume="broken")
    assert resumed.fit(*loaders, verbose=False) == (0.9, {"ndcg@5": 0.9})
    mine, theirs = whole.model.lm.trainable(), resumed.model.lm.trainable()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_seconds_of_a_resumed_stage_are_those_of_both_runs(ring, monkeypatch):
    """Each step takes ten seconds on this clock, and nothing else takes time."""
    settings = ring | {"objective": "sft", "sft_epochs": 2, "save_minutes": 0.0}
    clock, step, left = [0.0], Stage._step, [4]
    monkeypatch.setattr("recbole_sdpo.trainer.sdpo_trainer.time.time", lambda: clock[0])

    def timed_step(self, *batches):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        clock[0] += 10
        return step(self, *batches)

    monkeypatch.setattr(Stage, "_step", timed_step)
    broken, loaders = start(settings | {"run_dir": "broken", "sft_tokens_per_batch": 300})
    with pytest.raises(KeyboardInterrupt):
        broken.fit(*loaders[:2], verbose=False)
    clock[0], left[0] = clock[0] + 1000, 1000  # the time between them is nobody's
    resumed, loaders = start(settings | {"resume": "broken", "sft_tokens_per_batch": 300})
    resumed.fit(*loaders[:2], verbose=False)
    report, steps = resumed.reports["sft"], len(pd.read_csv("broken/steps.csv"))
    assert steps > 4 and report.wall_s == report.train_s == 10 * steps


def test_there_must_be_something_to_resume(ring):
    with pytest.raises(ValueError, match="resume='nowhere' holds no state/state.json"):
        start(ring | {"resume": "nowhere"})


def test_an_equal_score_is_no_better_one(ring):
    trainer, loaders = start(ring | {"sft_epochs": 9, "stopping_step": 1, "sdpo_epochs": 9})
    trainer._valid_epoch = lambda *_: (0.5, {"ndcg@5": 0.5})
    trainer.fit_stage("sft", *loaders[:2])
    # one better than nothing, then stopping_step + 1 that are not
    assert len(trainer.train_loss_dict) == 3
    sft = {name: p.clone() for name, p in trainer.model.lm.trainable().items()}
    trainer.fit_stage("sdpo", *loaders[:2])
    assert all(torch.equal(p, sft[name]) for name, p in trainer.model.lm.trainable().items())


def test_a_stage_may_have_a_patience_of_its_own(ring):
    trainer, loaders = start(ring | {"sft_epochs": 9, "stopping_step": 9, "sft_stopping_step": 0})
    trainer._valid_epoch = lambda *_: (0.5, {"ndcg@5": 0.5})
    trainer.fit_stage("sft", *loaders[:2])
    assert len(trainer.train_loss_dict) == 2


@pytest.mark.parametrize(
    ("schedule", "scores", "told"),
    [
        ("cosine", [0.5] * 9, True),  # ends after the second epoch
        ("linear", [0.5] * 9, True),
        ("constant", [0.5] * 9, False),
        ("cosine", [0.1 * epoch for epoch in range(8)] + [0.0], False),  # after the last
        ("cosine", [0.1 * epoch for epoch in range(9)], False),
    ],
)
def test_a_stage_that_ends_before_its_schedule_says_so(ring, caplog, schedule, scores, told):
    of_the_stage = {"sft_epochs": 9, "sft_stopping_step": 0, "sft_schedule": schedule}
    trainer, loaders = start(ring | of_the_stage)
    score = iter(scores)
    trainer._valid_epoch = lambda *_: ((now := next(score)), {"ndcg@5": now})
    trainer.fit_stage("sft", *loaders[:2])
    sentence = r"sft ended after 2 of 9 epochs, at \d\d% of its .* with a larger sft_stopping_step"
    assert bool(re.search(sentence, caplog.text)) == told
    assert ("ended after" in caplog.text) == told


def test_a_stage_without_a_learning_rate_ends_early_too(ring):
    trainer, loaders = start(ring | {"sft_learning_rate": 0, "sft_stopping_step": 0})
    trainer._valid_epoch = lambda *_: (0.5, {"ndcg@5": 0.5})
    assert trainer.fit_stage("sft", *loaders[:2]).valid == {"ndcg@5": 0.5}


def test_candidates_are_not_frozen_before_what_users_met_is_known(ring):
    trainer, loaders = start(ring)
    with pytest.raises(RuntimeError, match=r"call fit\(\) or prepare\(\) before evaluate"):
        trainer.evaluate(loaders[2])


def test_runs_of_one_second_have_folders_of_their_own(ring):
    config = RunConfig("SDPO-LLM", "toy", config_dict=ring)
    assert len({run_folder(config) for _ in range(5)}) == 5


def test_an_adapter_over_other_random_weights_is_refused(ring):
    small = ring | {"peft": "lora", "max_train_targets": 20}
    trainer, loaders = start(small | {"run_dir": "first"})
    trainer.fit_stage("sft", *loaders[:2])
    for change, message in (
        ({"seed": 5}, "was made with seed=2020, and this run has 5"),
        ({"lora_alpha": 320}, "lora_alpha=32"),
    ):
        trainer, loaders = start(small | {"sft_checkpoint": "first"} | change)
        with pytest.raises(ValueError, match=message):
            trainer.fit_stage("sft", *loaders[:2])


def test_an_sft_that_other_items_were_held_out_from_is_refused(ring):
    """It has met what this run tests as never met."""
    small = ring | {"held_out_items": 0.2, "max_train_targets": 20}
    trainer, loaders = start(small | {"run_dir": "first"})
    trainer.fit_stage("sft", *loaders[:2])
    begin = small | {"sft_checkpoint": "first", "seed": 5}
    trainer, loaders = start(begin)
    with pytest.raises(UserError, match="candidates_seed=2020, and this run has 5"):
        trainer.fit_stage("sft", *loaders[:2])
    trainer, loaders = start(begin | {"candidates_seed": 2020})
    trainer.fit_stage("sft", *loaders[:2])


def test_without_validation_the_last_weights_count(ring):
    trainer, loaders = start(ring | {"eval_step": 0, "sft_epochs": 2})
    trainer._valid_epoch = lambda *_: pytest.fail("validated")
    trainer.fit(*loaders[:2])
    assert (
        trainer.reports["sdpo"].valid is None
        and (trainer.run_dir / "sdpo" / "model.safetensors").is_file()
    )


def test_the_same_seed_gives_the_same_weights_and_another_another(ring):
    def weights(seed):
        trainer, loaders = start(ring | {"seed": seed, "scratch_dropout": 0.1})
        trainer.fit(*loaders[:2])
        return torch.cat([p.flatten() for p in trainer.model.lm.trainable().values()])

    first = weights(3)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_a_loss_that_is_not_finite_stops_the_run(ring):
    trainer, loaders = start(ring)
    with torch.no_grad():
        next(iter(trainer.model.lm.trainable().values())).fill_(float("inf"))
    with pytest.raises(UserError, match="lower sft_learning_rate"):
        trainer.fit(*loaders[:2])


@pytest.mark.parametrize("style", ["history", "candidates"])
def test_accumulated_batches_step_like_one(ring, style):
    """The gradient of two batches accumulated is the mean over all their targets, unequal
    batches included."""
    trainer, loaders = start(
        ring | {"prompt_style": style, "prompt_candidates": 5, "max_train_targets": 50}
    )
    model = trainer.model
    # the same draws for both, however they are cut
    examples = FixedExamples(model.examples(loaders[0]._dataset, loaders[0]._sampler, 0), 0)
    stage = Stage(
        "sft", "sft", model.settings.sft, None, model, examples, trainer.accelerator, None
    )
    trees = np.arange(3)
    grads = []
    for step in ([trees], [trees[:1], trees[1:]]):
        stage.optimizer.step = lambda: None
        stage._step(list(stage.batches.loader([step], 0)), int(examples.targets[trees].sum()))
        grads.append(torch.cat([p.grad.flatten() for p in stage._parameters]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_step_is_that_of_adamw_written_out(ring):
    """With warmup, a falling rate, decay of matrices alone, and a clipped gradient."""
    peak, decay, longest, (one, other) = 0.01, 0.3, 0.5, (0.9, 0.98)
    trainer, loaders = start(
        ring
        | {
            "sft_learning_rate": peak,
            "sft_weight_decay": decay,
            "sft_clip_norm": longest,
            "sft_epochs": 1,
            "sft_schedule": "linear",
            "sft_warmup": 0.4,
            "sft_tokens_per_batch": 300,
        }
    )
    stage = trainer._open("sft", loaders[0], False, False)
    stage.writer = log = Recorder()
    plan = stage.batches.plan(0)
    warm = int(0.4 * len(plan))
    assert warm > 1
    weights = [p.detach().double() for p in stage._parameters]
    mean, square = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for number, step in enumerate(plan):
        stage._step([*stage.batches.loader([step], number)], stage.batches.targets([step]))
        gradients = [p.grad.double() for p in stage._parameters]
        norm = float(sum(gradient.square().sum() for gradient in gradients) ** 0.5)
        told = log.seen["sft/gradient_norm"][number]
        assert norm == pytest.approx(min(longest, told), rel=1e-4)
        left = len(plan) - max(number, warm)
        rate = peak * (number / warm if number < warm else left / (len(plan) - warm))
        for weight, first, second, gradient in zip(weights, mean, square, gradients, strict=True):
            weight *= 1 - rate * decay * (weight.ndim > 1)
            first += (1 - one) * (gradient - first)
            second += (1 - other) * (gradient.square() - second)
            unbiased = (second / (1 - other ** (number + 1))).sqrt() + 1e-8
            weight -= rate * first / (1 - one ** (number + 1)) / unbiased
    assert max(log.seen["sft/gradient_norm"]) > longest
    for weight, p in zip(weights, stage._parameters, strict=True):
        torch.testing.assert_close(p.detach().double(), weight, rtol=1e-3, atol=1e-5)


def test_epochs_without_a_validation_are_those_that_eval_step_says(ring):
    few = {"objective": "sft", "sft_epochs": 5, "eval_step": 2, "stopping_step": 9}
    trainer, loaders = start(ring | few)
    epochs = []

    def validation(*_):
        epochs.append(len(trainer.train_loss_dict))
        return 0.5, {"ndcg@5": 0.5}

    trainer._valid_epoch = validation
    trainer.fit_stage("sft", *loaders[:2])
    assert epochs == [2, 4, 5], "and always the last"


@pytest.mark.parametrize(("bigger", "best"), [(True, 0.6), (False, 0.4)])
def test_where_smaller_is_better_the_smallest_is_the_best(ring, bigger, best):
    trainer, loaders = start(ring | {"objective": "sft", "sft_epochs": 3, "stopping_step": 9})
    trainer.valid_metric_bigger, scores = bigger, iter([0.5, 0.4, 0.6])

    def validation(*_):
        score = next(scores)
        return score, {"ndcg@5": score}

    trainer._valid_epoch = validation
    assert trainer.fit_stage("sft", *loaders[:2]).valid == {"ndcg@5": best}


def test_a_state_is_written_when_so_many_minutes_have_gone(ring, monkeypatch):
    minutes = {"objective": "sft", "sft_epochs": 1, "save_minutes": 2, "eval_step": 0}
    trainer, loaders = start(ring | minutes)
    clock, seconds = [0.0], []
    monkeypatch.setattr("recbole_sdpo.trainer.sdpo_trainer.time.time", lambda: clock[0])
    monkeypatch.setattr(
        "recbole_sdpo.trainer.sdpo_trainer.save_state", lambda *_: seconds.append(clock[0])
    )

    def run_epoch(stage, show, after_step):
        for _ in range(6):
            clock[0] += 50
            after_step(False)
        stage.epoch += 1
        return 0.0

    monkeypatch.setattr(Stage, "run_epoch", run_epoch)
    trainer.fit_stage("sft", loaders[0], saved=True, verbose=False)
    assert seconds == [0, 150, 300, 300, 300], "the last two as the epoch and the stage end"


def test_titles_learn_at_a_rate_of_their_own(ring):
    """A first step of Adam is the rate, whatever the gradient: 3 to 1 for titles, 1 for others."""
    moves = []
    for rate in (1.0, 3.0):
        trainer, loaders = start(
            ring
            | {
                "item_tokens": "whole",
                "scratch_dropout": 0.0,
                "sft_title_rate": rate,
                "sft_weight_decay": 0.0,
                "sft_schedule": "constant",
                "sft_warmup": 0.0,
                "sft_learning_rate": 1e-3,
            }
        )
        weights = trainer.model.lm.trainable()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        stage = trainer._open("sft", loaders[0], False, False)
        (step, *_) = stage.batches.plan(0)
        stage._step([*stage.batches.loader([step], 0)], stage.batches.targets([step]))
        moves.append({name: weights[name].detach() - before[name] for name in weights})
    one, three = moves
    (titles,) = (name for name in one if "embed_in" in name)
    assert one[titles].abs().max() > 5e-4
    for name in one:
        times = 3 if name == titles else 1
        torch.testing.assert_close(three[name], times * one[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_step_asks_the_device_once(ring, monkeypatch, peft):
    """Each number that the host reads keeps it waiting for a GPU, and the GPU for it."""
    trainer, loaders = start(
        ring | {"peft": peft, "sdpo_tokens_per_batch": 100, "sdpo_gradient_accumulation": 2}
    )
    stage = trainer._open("sdpo", loaders[0], False, False)
    model, (step, *_) = trainer.model, stage.batches.plan(0)
    waiting = list(stage.batches.loader([step], 0))
    assert len(waiting) == 2
    read = []

    def noted(name):
        own = getattr(torch.Tensor, name)
        return lambda self, *args, **kwargs: (read.append(name), own(self, *args, **kwargs))[1]

    model.train()
    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
    ):
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    stage._step(waiting, 20)
    assert read == ["tolist"]


def test_epochs_shuffle_and_limits_hold(ring):
    trainer, loaders = start(ring | {"sft_epochs": 2, "sft_gradient_accumulation": 2})
    model = trainer.model
    examples = model.examples(loaders[0]._dataset, None, 0)
    stage = Stage(
        "sft", "sft", model.settings.sft, None, model, examples, trainer.accelerator, None
    )
    plans = [
        np.concatenate([trees for step in stage.batches.plan(epoch) for trees in step])
        for epoch in (0, 1)
    ]
    assert all(sorted(plan.tolist()) == list(range(len(examples.targets))) for plan in plans)
    assert plans[0].tolist() != plans[1].tolist()
    assert all(len(step) == 2 for step in stage.batches.plan(0)[:-1])
    stage.batches.limit = 40
    some = np.concatenate([t for step in stage.batches.plan(0) for t in step])
    assert 40 <= examples.targets[some].sum() < 40 + examples.targets.max()


@pytest.mark.parametrize("style", ["history", "candidates"])
def test_a_step_takes_as_many_targets_as_asked_for(ring, style):
    settings = {
        "prompt_style": style,
        "prompt_candidates": 5,
        "sft_targets_per_step": 16,
        "sft_tokens_per_batch": 90,
    }
    trainer, loaders = start(ring | settings | {"train_targets": "last"})
    model = trainer.model
    examples = model.examples(loaders[0]._dataset, loaders[0]._sampler, 0)
    stage = Stage(
        "sft", "sft", model.settings.sft, None, model, examples, trainer.accelerator, None
    )
    plan = stage.batches.plan(0)
    # a target to a user, of 72
    assert [sum(examples.targets[trees].sum() for trees in step) for step in plan] == [16] * 4 + [8]
    assert any(len(step) > 1 for step in plan)
    padded = [(len(t), stage.batches.sizes[t].max() * len(t)) for step in plan for t in step]
    assert all(trees == 1 or tokens <= 90 for trees, tokens in padded)
    assert sorted(np.concatenate([trees for step in plan for trees in step])) == list(range(72))
    assert set(np.concatenate(stage.batches.plan(1)[0])) != set(np.concatenate(plan[0]))
    stage.run_epoch(False)
    assert stage.step == 5 and stage.targets == 72


@pytest.mark.parametrize("style", ["history", "candidates"])
def test_the_size_of_batches_changes_no_step(ring, style):
    """Its targets, its draws, its gradient and its divergence are those of the seed on every
    device."""
    trainer, loaders = start(
        ring | {"prompt_style": style, "prompt_candidates": 5, "sdpo_targets_per_step": 30}
    )
    model, plans, grads, logged = trainer.model, [], [], []
    examples = model.examples(loaders[0]._dataset, loaders[0]._sampler, 3)
    model.lm.freeze_reference()
    before = copy.deepcopy(model.lm.causal_lm)
    with torch.no_grad():
        for weight in model.lm.trainable().values():
            weight.add_(0.05 * torch.randn_like(weight))
    for tokens in (90, 5000):
        settings = replace(model.settings.sdpo, tokens_per_batch=tokens)
        stage = Stage("sdpo", "sdpo", settings, None, model, examples, trainer.accelerator, None)
        plans.append(stage.batches.plan(0))
        stage.optimizer.step = lambda: None
        first = plans[-1][:1]
        stage._write = logged.append
        step = list(stage.batches.loader(first, 0))
        stage._step(step, stage.batches.targets(first))
        grads.append(torch.cat([p.grad.flatten() for p in stage._parameters]))
    small, large = ([sorted(np.concatenate(step)) for step in plan] for plan in plans)
    assert small == large and len(plans[0][0]) > len(plans[1][0]) == 1
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    # over the next token after the whole trunk of each tree, but for the target that ends it
    (prompts,) = (batch.prompts for batch in step)
    until = {tree: int(before) for tree, before in zip(prompts.tree, prompts.before, strict=True)}
    apart = []
    for tree, units in until.items():
        texts = model.encoder.tokens.take(prompts.trunks[tree][:units])
        ids = torch.from_numpy(texts.values)[None]
        with torch.no_grad():
            now, then = (
                each(input_ids=ids).logits[0, -1].double().softmax(-1)
                for each in (model.lm.causal_lm, before)
            )
        apart.append(float((now * (now / then).log()).sum()))
    assert [values["kl"] for values in logged] == pytest.approx([np.mean(apart)] * 2, rel=1e-3)


def test_targets_and_batches_to_a_step_exclude_each_other(ring):
    with pytest.raises(
        ValueError,
        match="sft_targets_per_step=8 and sft_gradient_accumulation=2 both say when the optimizer "
        "steps",
    ):
        start(ring | {"sft_targets_per_step": 8, "sft_gradient_accumulation": 2})


def test_recboles_own_quick_start_runs_it(ring):
    result = run_recbole(
        model="SDPO-LLM", dataset="toy", config_dict=ring | {"max_train_targets": 50}
    )
    assert {"hit@1", "ndcg@5", "mrr@10"} <= set(result["test_result"])
    ours = quick_start.run("SDPO-LLM", "toy", config_dict=ring | {"max_train_targets": 50})
    assert dict(result["test_result"]) == ours["test_result"]
    for key, value in (("max_eval_targets", 5), ("more_candidates", ["pop5"])):
        with pytest.raises(
            UserError, match=f"{key}=.* has no effect in RecBole's run_recbole; use"
        ):
            run_recbole(model="SDPO-LLM", dataset="toy", config_dict=ring | {key: value})
    # RecBole counts a copy's operations, and what has parts cannot be copied
    with pytest.raises(UserError, match="parallel='fsdp' is not for RecBole's run_recbole"):
        run_recbole(model="SDPO-LLM", dataset="toy", config_dict=ring | {"parallel": "fsdp"})


STAGE_KEYS = {"valid", "test", "wall_s", "targets", "tokens", "train_s", "candidates"}
"""What ``result.json`` has of each stage."""


def test_result_json_says_what_was_run(ring):
    result = quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"max_train_targets": 50, "run_dir": "here"}
    )
    stored = json.loads(Path("here/result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert list(stored["stages"]) == ["sft", "sdpo"]
    for stage in stored["stages"].values():
        assert set(stage) == STAGE_KEYS
        assert stage["candidates"] == {"uni5": {"valid": stage["valid"], "test": stage["test"]}}
        assert stage["targets"] >= 50 and stage["tokens"] > stage["targets"]
    assert stored["test_result"] == stored["stages"]["sdpo"]["test"]
    assert stored["settings"]["beta"] == 1.0 and stored["settings"]["seed"] == 2020
    assert stored["versions"]["recbole"] == "1.2.1" and stored["peak_memory_gib"] > 0
    assert 0 <= stored["popularity"]["hit@1"] <= 1


@pytest.mark.parametrize(
    "model", ["GRU4Rec", "SASRec", "Caser", "BERT4Rec", "Pop", "BPR", "LightGCN"]
)
def test_baselines_run_on_the_same_candidates(ring, model):
    sha = quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"sft_epochs": 0, "objective": "sft"}
    )["candidates_sha256"]
    result = quick_start.run(model, "toy", config_dict=ring | {"epochs": 1})
    assert result["candidates_sha256"] == sha
    (stage,) = result["stages"].values()
    assert set(result["stages"]) == {"fit"} and set(stage) == STAGE_KEYS
    if model == "Pop":
        assert result["test_result"] == result["popularity"]


def test_every_step_has_a_row(ring):
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"sft_epochs": 2, "sdpo_epochs": 1, "run_dir": "here"}
    )
    steps = pd.read_csv("here/steps.csv")
    sft, sdpo = steps[steps.stage == "sft"], steps[steps.stage == "sdpo"]
    for rows in (sft, sdpo):
        assert (
            rows.step.tolist() == list(range(len(rows)))
            and rows.targets.iloc[0] == 0
            and rows.targets.is_monotonic_increasing
        )
    assert sft.loss.notna().all() and sft.margin.isna().all() and sdpo.notna().all(axis=None)
    assert (
        sdpo.margin.iloc[0] == pytest.approx(0, abs=1e-5)
        and sdpo.hardest_negative_weight.between(1 / 3 - 1e-6, 1).all()
    )


def test_dynamic_negatives_are_the_hardest_of_their_draws(ring):
    trainer, loaders = start(
        ring
        | {
            "train_neg_sample_args": {"sample_num": 2, "dynamic": True, "candidate_num": 4},
            "scratch_dropout": 0.5,
        }
    )
    trainer.prepare(*loaders)
    stage = trainer._open("sdpo", loaders[0], False, False)
    assert stage.model.negatives == 2
    plan = [(trees, 0, 0) for trees in stage.batches.plan(0)[0]]
    wide = next(iter(stage.batches.loader([[trees] for trees, _, _ in plan], 0)))
    stage.model.train()
    batch = stage._hardest(wide)
    assert stage.model.training, "scores are without dropout, the training with it"
    assert batch.width == 3 and batch.forest.size < wide.forest.size
    stage.model.eval()
    with torch.no_grad():
        scores = stage.model.lm(wide.forest).view(-1, wide.width)[:, 1:].numpy()
    for row, (drawn, kept) in enumerate(zip(wide.items, batch.items)):
        assert kept[0] == drawn[0]
        for number in range(2):
            group = slice(4 * number, 4 * number + 4)
            assert kept[1 + number] == drawn[1:][group][scores[row, group].argmax()]
    stage.run_epoch(False)


def test_full_ranking_runs(ring):
    result = quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring | {"eval_args": {"mode": "full"}, "max_train_targets": 50},
    )
    assert result["test_result"]["hit@10"] > 0
