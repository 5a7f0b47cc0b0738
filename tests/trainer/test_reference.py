"""The kept log-probabilities of the reference change nothing but the work."""

import numpy as np
import pytest
import torch

from recbole_sdpo.checks.configuration import check_settings
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.trainer.reference import ReferenceCache
from recbole_sdpo.trainer.stage import Stage
from tests.trainer.test_training import Recorder, start

SMALL = {
    "sft_epochs": 1,
    "sdpo_epochs": 2,
    "max_train_targets": 200,
    "stopping_step": 9,
    "fixed_negatives": True,
    "eval_step": 0,
}


@pytest.fixture
def asked(monkeypatch):
    """How many responses the reference was asked for."""
    counts = []
    ask = LanguageModel._reference_answers

    def counted(self, forest, *attention):
        counts.append(forest.responses)
        return ask(self, forest, *attention)

    monkeypatch.setattr(LanguageModel, "_reference_answers", counted)
    return counts


def train(settings):
    trainer, loaders = start(settings)
    trainer.tensorboard = recorder = Recorder()
    trainer.fit(*loaders[:2], verbose=False)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.lm.trainable().values()])
    return recorder.seen, weights


@pytest.mark.parametrize("style", ["history", "candidates"])
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_reference_is_asked_once_and_nothing_else_changes(ring, tmp_path, asked, peft, style):
    settings = (
        ring
        | SMALL
        | {"peft": peft, "prompt_style": style, "prompt_candidates": 6, "max_train_targets": None}
    )
    settings |= {"cache_dir": str(tmp_path / "cache")}
    seen, weights = train(settings | {"reference": "compute"})
    every_time = sum(asked)
    assert not (tmp_path / "cache").exists()
    asked.clear()
    cached, same = train(settings)
    assert 2 * sum(asked) == every_time > 0
    np.testing.assert_allclose(cached["sdpo/margin"], seen["sdpo/margin"], atol=1e-4)
    torch.testing.assert_close(same, weights, rtol=0, atol=1e-4)
    asked.clear()
    train(settings | {"beta": 0.5, "sdpo_learning_rate": 1e-4})
    assert not asked and len(list((tmp_path / "cache/reference").glob("*"))) == 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 7}, {"sft_learning_rate": 2e-3}, {"train_neg_sample_args": {"sample_num": 2}}],
)
def test_what_the_values_depend_on_makes_another_cache(ring, tmp_path, asked, change):
    settings = ring | SMALL | {"sdpo_epochs": 1, "cache_dir": str(tmp_path / "cache")}
    train(settings)
    first = sum(asked)
    train(settings | change)
    assert sum(asked) > first and len(list((tmp_path / "cache/reference").glob("*"))) == 2


@pytest.fixture
def cache(ring, tmp_path):
    """Makes the cache of one run, as often as it is asked."""
    trainer, loaders = start(ring | SMALL)
    model = trainer.model
    model.lm.freeze_reference()
    examples = model.examples(loaders[0]._dataset, loaders[0]._sampler, 3)
    return lambda precision="float32": ReferenceCache(
        tmp_path / "cache", model.lm, examples, model.encoder.tokens, precision
    )


def test_what_was_written_is_read_and_the_rest_is_missing(cache):
    first, other = cache(), cache()
    values = -torch.rand(3, 4) - 0.1
    first.add(np.array([5, 1]), values[:2], to_disk=True)
    other.add(np.array([7]), values[2:], to_disk=True)  # another run, at the same time
    other.add(np.array([8]), values[2:], to_disk=False)
    assert first.read(np.array([1, 5])).equal(values[:2].flip(0)) and first.missing()[7]
    again = cache()
    assert again.folder == first.folder and again.read(np.array([5, 1, 7])).equal(values)
    assert np.flatnonzero(~again.missing()).tolist() == [1, 5, 7]
    assert cache("bf16").folder != first.folder


def test_a_flipped_bit_or_a_lost_page_is_asked_for_again(cache):
    made, values = cache(), -torch.rand(4, 4) - 0.1
    for target in range(4):
        made.add(np.array([target]), values[[target]], to_disk=True)
    flipped, zeros, cut, _ = sorted(made.folder.iterdir())
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))
    zeros.write_bytes(bytes(zeros.stat().st_size))
    cut.write_bytes(cut.read_bytes()[:-7])
    again = cache()
    (known,) = np.flatnonzero(~again.missing())
    assert again.read(np.array([known])).equal(values[[known]])
    for target in range(4):  # computed anew, they are what they were
        again.add(np.array([target]), values[[target]], to_disk=True)
    assert cache().read(np.arange(4)).equal(values) and len(list(made.folder.iterdir())) == 4


def test_what_cannot_be_a_log_probability_is_missing(cache):
    values = torch.full((5, 4), -1.0)
    for target, impossible in enumerate((0.0, 0.5, float("inf"), float("-inf"))):
        values[target, 2] = impossible
    cache().add(np.arange(5), values, to_disk=True)
    assert np.flatnonzero(~cache().missing()).tolist() == [4]


def test_the_scale_of_an_adapter_is_part_of_the_reference(ring, tmp_path):
    files = set()
    for alpha in (32, 8):
        trainer, loaders = start(ring | SMALL | {"peft": "lora", "lora_alpha": alpha})
        model = trainer.model
        examples = model.examples(loaders[0]._dataset, loaders[0]._sampler, 3)
        files.add(ReferenceCache(tmp_path, model.lm, examples, model.encoder.tokens, "no").folder)
    assert len(files) == 2


def test_a_part_of_the_targets_is_asked_for_once_and_a_warm_cache_changes_no_bit(
    ring, tmp_path, asked
):
    settings = (
        ring
        | SMALL
        | {"max_train_targets": 130, "sdpo_epochs": 2, "cache_dir": str(tmp_path / "cache")}
    )
    cold, weights = train(settings)
    first = sum(asked)
    assert 4 * 130 < first < 4 * 72 * 9  # targets of 72 users
    asked.clear()
    warm, same = train(settings)
    assert not asked and warm == cold and same.equal(weights)


def test_fixed_negatives_are_those_of_every_epoch(ring):
    trainer, loaders = start(ring | SMALL)
    examples = trainer.model.examples(loaders[0]._dataset, loaders[0]._sampler, 3)
    trees = np.array([4, 0, 9])
    (first, items), (second, again) = (
        examples.batch(trees, 1, "epoch", 0),
        examples.batch(trees, 2, "epoch", 1),
    )
    assert np.array_equal(items, again) and np.array_equal(first.target, second.target)
    assert np.array_equal(items[:, 0], first.target)
    assert np.array_equal(
        examples.prompts.target[
            np.concatenate([np.flatnonzero(examples.prompts.tree == t) for t in trees])
        ],
        first.target,
    )


def test_negatives_drawn_anew_cannot_be_kept(ring):
    with pytest.raises(
        ValueError,
        match="reference='cache' needs negatives that stay the same; set fixed_negatives=True",
    ):
        start(ring | {"reference": "cache"})
    assert check_settings(start(ring)[0].config).caches_reference is False


def test_a_worker_prepares_the_same_batches(ring):
    settings = ring | SMALL | {"fixed_negatives": False}
    (seen, weights), (ahead, same) = train(settings), train(settings | {"worker": 1})
    assert seen == ahead and same.equal(weights)


def test_a_folder_that_cannot_be_is_found_before_training(ring, tmp_path):
    (tmp_path / "file").write_text("")
    trainer, loaders = start(ring | SMALL | {"cache_dir": str(tmp_path / "file" / "x")})
    with pytest.raises(
        ValueError, match=r"cache_dir=.* cannot hold files \(.*\); give another folder"
    ):
        trainer.prepare(*loaders[:2])


def test_the_time_of_a_stage_holds_that_of_asking_the_reference(ring, monkeypatch):
    trainer, loaders = start(ring | SMALL | {"sdpo_epochs": 1})
    clock = [0.0]
    monkeypatch.setattr("recbole_sdpo.trainer.sdpo_trainer.time.time", lambda: clock[0])
    fill = ReferenceCache.fill
    monkeypatch.setattr(
        ReferenceCache, "fill", lambda *args: clock.__setitem__(0, clock[0] + 1000) or fill(*args)
    )

    def run_epoch(stage, *_):
        clock[0] += 10
        stage.epoch += 1
        return 0.0

    monkeypatch.setattr(Stage, "run_epoch", run_epoch)
    trainer.fit(*loaders[:2], verbose=False)
    sft, sdpo = trainer.reports["sft"], trainer.reports["sdpo"]
    assert sft.wall_s == sft.train_s == 10 * trainer.model.settings.sft.epochs
    assert (sdpo.wall_s, sdpo.train_s) == (1000 + 10, 10)  # that of the epochs does not


def test_a_state_in_the_middle_of_an_epoch_has_the_seconds_of_its_steps(ring, monkeypatch):
    """Those of a signal, too: what goes on from it counts its own alone."""
    trainer, loaders = start(ring | SMALL | {"sft_epochs": 2, "sdpo_epochs": 0})
    clock, seconds = [0.0], []
    monkeypatch.setattr("recbole_sdpo.trainer.sdpo_trainer.time.time", lambda: clock[0])
    monkeypatch.setattr(
        "recbole_sdpo.trainer.sdpo_trainer.save_state",
        lambda run_dir, stage, rest: seconds.append(rest["train_s"]),
    )

    def run_epoch(stage, show, after_step):
        clock[0] += 7
        stage.epoch_steps = 1
        after_step(True)
        clock[0] += 3
        stage.epoch, stage.epoch_steps = stage.epoch + 1, 0
        return 0.0

    monkeypatch.setattr(Stage, "run_epoch", run_epoch)
    trainer.fit_stage("sft", loaders[0], saved=True, verbose=False)
    assert seconds == [0, 7, 10, 17, 20, 20]
