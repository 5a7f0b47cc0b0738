"""``candidates_file``: each target stands among exactly the candidates of its list."""

import csv
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from recbole.data import data_preparation
from recbole.data.dataset import Dataset

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.candidates import FrozenCandidates, fingerprint
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.file import Experiment
from recbole_sdpo.experiment.identity import identity
from recbole_sdpo.experiment.plan import plan
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.loaders import evaluation_loaders
from recbole_sdpo.quick_start import run


@pytest.fixture
def given(ring, tmp_path):
    """Lists of ten candidates for the tests and validations of the ring, which ends each user's
    sequence by a rule, and the settings of a run on them."""
    rng, rows = np.random.default_rng(3), []
    for user in range(72):
        start = user // 3
        for phase, step in (("valid", 10), ("test", 11)):
            target = 1 + (start + step) % 24
            others = rng.permutation([item for item in range(1, 25) if item != target])[:9]
            items = rng.permutation([target, *others])
            rows.append([f"u{user}", f"i{target}", *(f"i{item}" for item in items), phase])
    ring["candidates_file"] = str(write(tmp_path / "lists.csv", rows))
    return ring, rows


def write(file, rows):
    head = ["user", "target", *(f"candidate_{n + 1}" for n in range(len(rows[0]) - 3)), "phase"]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
    return file


def loaded(model, settings):
    config = RunConfig(model, "toy", config_dict=dict(settings))
    dataset = create_dataset(config)
    catalogue = Catalogue.from_dataset(dataset, ["title"])
    train, *rest = data_preparation(config, dataset)
    return evaluation_loaders(config, train, rest, catalogue)


def shown(loader):
    """{(user, target): candidates}, in the data's own ids, of what a model is handed."""
    dataset, lists = loader._dataset, {}
    users, items = (dataset.field2id_token[name] for name in ("user_id", "item_id"))
    for batch, rows, *_, targets in loader:
        rows, item = rows.numpy(), items[batch["item_id"].numpy()]
        for row, target in enumerate(targets.numpy()):
            (user,) = set(users[batch["user_id"].numpy()[rows == row]])
            lists[user, items[target]] = item[rows == row].tolist()
    return lists


def of(rows, phase):
    return {(user, target): set(items) for user, target, *items, own in rows if own == phase}


@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec", "BPR"])
def test_each_target_stands_among_its_candidates_for_every_model(given, model):
    settings, rows = given
    ((mode, loaders),) = loaded(model, settings).items()
    assert mode == "file"
    for phase, loader in zip(("valid", "test"), loaders, strict=True):
        lists = shown(loader)
        assert {pair: set(items) for pair, items in lists.items()} == of(rows, phase)
        assert all(len(items) == 10 for items in lists.values())
    fingerprints = {fingerprint(*loaders), fingerprint(*loaded("Pop", settings)["file"])}
    assert len(fingerprints) == 1


def test_other_lists_have_another_fingerprint_and_identity(given):
    settings, rows = given

    def now():
        config = RunConfig("SASRec", "toy", config_dict=without(settings, "train_neg_sample_args"))
        return fingerprint(*loaded("BPR", settings)["file"]), identity(
            config, Inputs.of(config), None
        )

    before = now()
    user, target, *items, phase = rows[1]
    other = next(f"i{n}" for n in range(1, 25) if f"i{n}" not in items)
    place = 0 if items[0] != target else 1
    items[place] = other
    write(Path(settings["candidates_file"]), [rows[0], [user, target, *items, phase], *rows[2:]])
    assert all(one != another for one, another in zip(before, now(), strict=True))


def without(settings, key):
    return {name: value for name, value in settings.items() if name != key}


def test_without_lists_of_its_own_validation_draws_as_before(given, tmp_path):
    settings, rows = given
    tests = [row for row in rows if row[-1] == "test"]
    settings["candidates_file"] = str(write(tmp_path / "tests.csv", tests))
    valid, test = loaded("GRU4Rec", settings)["file"]
    drawn, _ = loaded("GRU4Rec", without(settings, "candidates_file"))["uni5"]
    assert shown(valid) == shown(drawn)
    assert {pair: set(items) for pair, items in shown(test).items()} == of(rows, "test")


def test_given_test_lists_may_hold_what_was_met(given, tmp_path, caplog):
    """Where validation is drawn, the warning of drawn candidates is not of the test."""
    settings, rows = given
    inter = Path(settings["data_path"], "toy", "toy.inter")
    head, *events = inter.read_text().splitlines()
    inter.write_text("\n".join([head, *(row for row in events for _ in "12")]) + "\n")
    tests = [row for row in rows if row[-1] == "test"]
    settings["candidates_file"] = str(write(tmp_path / "tests.csv", tests))
    loaded("Pop", settings)
    assert "of the test targets are items that their user has met" not in caplog.text
    loaded("Pop", settings | {"more_candidates": ["uni5"]})
    assert "100% of the test targets are items that their user has met" in caplog.text


def test_further_candidates_and_fewer_targets_go_with_a_file(given):
    settings, rows = given
    settings |= {"more_candidates": ["uni5", "full"], "max_eval_targets": 20}
    loaders = loaded("GRU4Rec", settings)
    assert list(loaders) == ["file", "uni5", "full"]
    lists = shown(loaders["file"][1])
    assert len(lists) == 20 and all(set(lists[pair]) == of(rows, "test")[pair] for pair in lists)
    assert shown(loaders["uni5"][1]).keys() == lists.keys()
    assert {len(items) for items in shown(loaders["uni5"][1]).values()} == {6}


def test_targets_without_a_list_are_left_out_and_said(given, tmp_path, caplog):
    settings, rows = given
    some = [row for row in rows if row[-1] == "test"][:30]
    user, target, *items, phase = some[0]
    odd = [user, next(item for item in items if item != target), *items, phase]  # of no target
    settings["candidates_file"] = str(write(tmp_path / "some.csv", [*some, odd]))
    with caplog.at_level(logging.WARNING):
        loaders = loaded("SDPO-LLM", settings)["file"]
    assert shown(loaders[1]).keys() == of(some, "test").keys()
    (said,) = (text for text in caplog.messages if "have no list" in text)
    assert "42 of 72 test targets have no list, the first of user " in said
    assert f"1 of 31 lists are of no test target, the first of user {user!r}" in said


def test_lists_of_another_split_are_refused(given, tmp_path):
    settings, rows = given
    swapped = [[*row[:-1], "test"] for row in rows if row[-1] == "valid"]
    settings["candidates_file"] = str(write(tmp_path / "other.csv", swapped))
    with pytest.raises(UserError, match="72 of 72 test targets have no list, the first of user "):
        loaded("BPR", settings)
    valid = [row for row in rows if row[-1] == "valid"]
    settings["candidates_file"] = str(write(tmp_path / "valid.csv", valid))
    with pytest.raises(UserError, match="has no list of the phase test"):
        loaded("BPR", settings)


LABELED = {
    "eval_args": {"mode": "labeled"},
    "metrics": ["AUC"],
    "valid_metric": "AUC",
    "threshold": {"rating": 3},
    "load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates_file": "nowhere.csv"}, "'nowhere.csv' must be a file that is there"),
        ({"candidates_file": 3}, "candidates_file=3 must be text, or null for drawn candidates"),
        (LABELED, "is for metrics of a ranking; eval_args.mode="),
    ],
)
def test_what_cannot_be_ranked_is_refused_at_once(given, rated, monkeypatch, change, message):
    monkeypatch.setattr(Dataset, "__init__", None)  # before any data are read
    settings = given[0] | change
    with pytest.raises(UserError, match=message):
        run("Pop", "toy", config_dict=settings)


def test_lists_that_hold_a_twin_of_their_target_are_counted(given, caplog):
    settings, rows = given
    file = Path(settings["data_path"], "toy", "toy.item")
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    first, second = rows[1][1], next(item for item in rows[1][2:-1] if item != rows[1][1])
    title = next(title for item, title in lines if item == first)
    file.write_text(
        "\n".join(f"{item}\t{title if item == second else own}" for item, own in lines) + "\n"
    )
    pair = {first, second}
    twins = sum(row[1] in pair and pair <= set(row[2:-1]) for row in rows)
    with caplog.at_level(logging.WARNING):
        loaded("BPR", settings)
    assert any(f"{twins} of 144 lists hold another item of" in text for text in caplog.messages)


def test_the_result_is_of_the_given_candidates(given, caplog):
    settings, rows = given
    settings |= {"audit": True, "more_candidates": ["uni5"]}
    with caplog.at_level(logging.INFO):
        result = run("Pop", "toy", config_dict=settings)
    floor = {
        mode: [guess["guesser"] for guess in found["guesses"]]
        for mode, found in result["audit"].items()
    }
    assert list(floor) == ["file", "uni5"] and set(floor["file"]) - set(floor["uni5"]) == {
        "position"
    }
    assert "| audit: position" in caplog.text and "| audit: nearest lists (" in caplog.text
    assert not result["audit"]["file"]["halves"]  # its own lists for validation are the reference
    ranks = pd.read_csv(Path(result["run_dir"], "ranks.csv")).set_index("user")
    assert set(ranks["candidates"]) == {"file", "uni5"} == set(result["candidates_sha256"])
    ranks = ranks[ranks["candidates"] == "file"]
    events = pd.read_csv(Path(settings["data_path"], "toy", "toy.inter"), sep="\t")
    events.columns = ["user", "item", "step"]
    met = events[events.step < 10].item.value_counts()
    for user, target, *items, phase in rows:
        if phase == "test":
            higher = sum(met[item] > met[target] for item in items)
            alike = sum(met[item] == met[target] for item in items)
            assert higher < ranks.loc[user, "rank"] <= higher + alike


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_lists_that_hold_what_their_user_has_met_are_counted(given, caplog, model):
    settings, rows = given

    def said(met):
        """Of lists whose last candidate is ``met(user, phase)`` steps after the user's first
        item; the user meets 12 items, and the others are met by others."""
        lists = []
        for user, target, *_, phase in rows:
            start = int(user[1:]) // 3
            others = [f"i{1 + (start + step) % 24}" for step in (12, 13, 14, met(user, phase))]
            lists.append([user, target, *others, target, phase])
        write(Path(settings["candidates_file"]), lists)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded(model, settings)
        return [text for text in caplog.messages if "has met" in text]

    def some(user, phase):
        return 0 if user in ("u3", "u5") else 11 if phase == "valid" else 10

    # step 10 is the target of the validation, which is met before the test; step 11 is after it
    (text,) = said(some)
    assert ": 2 of 72 valid lists and 72 of 72 test lists hold items that their user" in text
    (text,) = said(lambda user, phase: 9 if user == "u7" and phase == "test" else 15)
    assert ": 1 of 72 test lists hold items that their user has met before" in text
    assert not said(lambda user, phase: 15)


def experiment(tmp_path, **content):
    file = tmp_path / "e.yaml"
    file.write_text(
        yaml.safe_dump({"dataset": "toy", "runs": [{"name": "Pop", "model": "Pop"}]} | content)
    )
    return Experiment.load(file)


def test_an_experiment_names_the_candidates_of_a_file(given, tmp_path):
    settings, _ = given
    both = {"settings": settings | {"eval_args": {}}, "candidates": ["file", "uni5"]}
    (first,) = plan(experiment(tmp_path, **both))
    assert (
        first.settings["more_candidates"] == ["uni5"] and "mode" not in first.settings["eval_args"]
    )
    for wrong in ({"candidates": ["uni5"]}, {"settings": {}}, {"candidates": ["uni5", "file"]}):
        with pytest.raises(UserError, match="the first must be 'file' where all runs have that"):
            experiment(tmp_path, **both | wrong)


def test_drawn_candidates_have_no_order_and_given_ones_keep_theirs(given):
    settings, rows = given
    given_lists = loaded("BPR", settings)["file"][1]._sampler
    tokens = loaded("BPR", settings)["file"][1]._dataset.field2id_token
    published = {(row[0], row[1]): row[2:-1] for row in rows if row[-1] == "test"}
    for user, target, items in zip(
        given_lists.user, given_lists.target, given_lists.lists(), strict=True
    ):
        pair = tokens["user_id"][user], tokens["item_id"][target]
        assert tokens["item_id"][items].tolist() == published[pair]
    drawn = FrozenCandidates("test", np.array([1]), np.array([2]), np.array([[3, 4]]))
    assert drawn.place is None and drawn.lists().tolist() == [[2, 3, 4]]


def test_a_hit_among_all_candidates_of_a_list_is_warned_of(given, caplog):
    loaded("GRU4Rec", given[0] | {"topk": [1, 5, 9]})
    assert "is 1 for every model" not in caplog.text
    loaded("GRU4Rec", given[0] | {"topk": [1, 5, 10], "metrics": ["Hit", "NDCG"]})
    assert "topk=10: Hit@10 of file is 1 for every model, as it has 10 candidates" in caplog.text
