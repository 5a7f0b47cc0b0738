"""The rating that reaches an objective is the one that the user gave to the target."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_trainer

from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.trainer.state import resume_identity

HEAD = "user_id:token\titem_id:token\ttimestamp:float\tstars:float"
RATED = {"objective": "recpo", "RATING_FIELD": "stars", "max_eval_targets": 5}


@pytest.fixture
def stars(ring):
    """The toy data, shuffled, each event with a rating from 1 to 5.5 in steps of a half; some users
    meet an item a second time, and rate it otherwise."""
    path, rng = Path(ring["data_path"], "toy", "toy.inter"), np.random.default_rng(5)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    rows += [[user, item, "6.5"] for user, item, time in rows if time == "1" and user[-1] in "37"]
    rows = [[*row, str(rng.integers(2, 12) / 2)] for row in rows]
    rng.shuffle(rows)
    path.write_text("\n".join([HEAD, *("\t".join(row) for row in rows)]) + "\n")
    return ring | RATED


def in_order(settings):
    """From the file: each user's targets of training with their ratings, oldest first."""
    path = Path(settings["data_path"], "toy", "toy.inter")
    users = {}
    for line in path.read_text().splitlines()[1:]:
        user, item, time, stars = line.split("\t")
        users.setdefault(user, []).append((float(time), item, float(stars)))
    # The first has no history, and the last two are of validation and test.
    return {user: [event[1:] for event in sorted(rows)[1:-2]] for user, rows in users.items()}


def build(settings):
    config = RunConfig("SDPO-LLM", "toy", config_dict=settings)
    loaders = data_preparation(config, create_dataset(config))
    model = SDPOLLM(config, loaders[0]._dataset)
    return get_trainer(config["MODEL_TYPE"], config["model"])(config, model), loaders


def named(dataset, users, items, ratings):
    """For each user's name the items' names and ratings, in the order given."""
    met = {}
    for user, item, stars in zip(users, items, ratings, strict=True):
        name = str(dataset.field2id_token["user_id"][user])
        met.setdefault(name, []).append((str(dataset.field2id_token["item_id"][item]), stars))
    return met


@pytest.mark.parametrize(
    ("style", "fixed", "loaded"),
    [("history", False, False), ("candidates", True, False), ("history", True, True)],
    ids=["apart", "candidates, fixed", "fixed, beside RecBole's own, scaled to 0..1"],
)
def test_each_target_has_its_own_over_batches_and_processes(stars, style, fixed, loaded):
    columns = {"inter": ["user_id", "item_id", "timestamp", "stars"]}
    stars |= {"load_col": columns, "normalize_all": True} if loaded else {}
    stars |= {"prompt_style": style, "prompt_candidates": 5, "fixed_negatives": fixed}
    trainer, (train, *_) = build(stars | {"reference": "compute", "max_train_targets": 200})
    trainer.prepare(train)
    dataset = train._dataset
    stage = trainer._open("sdpo", train, False, False)
    expected, plan = in_order(stars), stage.batches.plan(0)[:3]
    rows = dataset.inter_feat
    assert ("stars" in rows) is loaded and (not loaded or rows["stars"].max() == 1)
    seen = 0
    for process in range(2):
        for batch in replace(stage.batches, process=(process, 2)).loader(plan, 0):
            logps, _ = stage._logps(batch, True)
            met = named(dataset, batch.prompts.user, batch.prompts.target, logps.rating.tolist())
            for user, events in met.items():
                assert set(events) <= set(expected[user])
            seen += len(logps.rating) * batch.counts
    assert seen == stage.batches.targets(plan) > 15

    # all of them, of a user in the order of time, so that a second rating is told from the first
    examples = stage.examples
    if style == "history" and not fixed:
        prompts = examples.prompts
        assert named(dataset, prompts.user, prompts.target, examples.ratings.tolist()) == expected
    assert sorted(examples.ratings) == sorted(s for rows in expected.values() for _, s in rows)


def test_recboles_trainers_hand_them_on(stars, monkeypatch):
    trainer, (train, *_) = build(stars)
    model, expected, seen = trainer.model, in_order(stars), []
    trainer.model.lm.freeze_reference()
    model.objective = "watched"
    watched = OBJECTIVES["recpo"]._replace(
        loss=lambda logps, constants: seen.append(logps) or logps.policy_pos
    )
    monkeypatch.setitem(OBJECTIVES, "watched", watched)
    batch = next(iter(train))
    model.calculate_loss(batch)
    rows = len(batch) // 3
    users, items = batch["user_id"][:rows].tolist(), batch["item_id"][:rows].tolist()
    for user, events in named(train._dataset, users, items, seen[0].rating.tolist()).items():
        assert set(events) <= set(expected[user])


def test_in_files_that_are_split_they_are_of_the_same_row(stars):
    folder = Path(stars["data_path"], "toy")
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\tstars:float"
    # two sessions of one user, between which stands another's
    rows = ["u1\ti1 i2\ti3\t1.5", "u2\ti4\ti5\t2", "u1\ti7\ti8\t4.5", "u1\ti7 i8\ti9\t5"]
    for part, some in (("train", rows), ("valid", rows[1:2]), ("test", rows[1:2])):
        (folder / f"toy.{part}.inter").write_text("\n".join([head, *some]) + "\n")
    columns = {"inter": ["user_id", "item_id_list", "item_id"]}
    stars |= {"benchmark_filename": ["train", "valid", "test"], "load_col": columns}
    trainer, (train, *_) = build(stars | {"topk": [1, 5]})
    examples = trainer.model.examples(train._dataset, train._sampler, 3)
    prompts = examples.prompts
    met = named(train._dataset, prompts.user, prompts.target, examples.ratings.tolist())
    assert met == {"u1": [("i3", 1.5), ("i8", 4.5), ("i9", 5.0)], "u2": [("i5", 2.0)]}


@pytest.mark.parametrize(
    ("model", "change"), [("SASRec", {}), ("SDPO-LLM", {"objective": "sdpo"})], ids=str
)
def test_who_does_not_read_them_has_none(stars, model, change):
    shared = {key: stars[key] for key in ("data_path", "RATING_FIELD")}
    dataset = create_dataset(RunConfig(model, "toy", config_dict=shared | change))
    assert set(dataset.inter_feat.columns) == {"user_id", "item_id", "timestamp"}


def test_what_is_missing_is_one_sentence_before_training(stars):
    path = Path(stars["data_path"], "toy", "toy.inter")
    sentence = (
        "^objective='recpo' reads ratings, so RATING_FIELD='rating' must be a column of type float "
        "of .*toy.inter, whose columns are .*stars:float; name it, or choose another objective.$"
    )
    with pytest.raises(UserError, match=sentence):
        RunConfig("SDPO-LLM", "toy", config_dict=stars | {"RATING_FIELD": "rating"})
    content = path.read_text().splitlines()
    path.write_text("\n".join([*content, "u0\ti3\t9\t"]) + "\n")
    with pytest.raises(UserError, match=r"toy.inter.*'' is no rating; the objective needs one"):
        build(stars)


def test_a_rating_without_a_loss_is_refused_before_training(stars):
    trainer, (train, *_) = build(stars | {"unrated_score": 2.5})
    with pytest.raises(UserError, match=r"'recpo' has no loss for the rating 1 with unrated_score"):
        trainer.prepare(train)
    trainer.model.settings = replace(trainer.model.settings, unrated_score=1.9)
    trainer.prepare(train)


def test_a_run_is_not_resumed_with_other_ratings(stars):
    path, data = Path(stars["data_path"], "toy", "toy.inter"), []
    for _ in range(2):
        trainer, (train, *_) = build(stars)
        data.append(resume_identity(trainer.model, train._dataset, 1)["training data"])
        path.write_text(path.read_text().replace("\t2.5\n", "\t3.5\n"))
    assert data[0] != data[1]
