"""Sequences and windows against the rows that RecBole makes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data import create_dataset, data_preparation

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import sequences
from recbole_sdpo.data.prompts import batches, history_windows
from recbole_sdpo.data.sequences import (
    Sequences,
    digest_of_targets,
    histories,
    last_targets,
    met_items,
    target_rows,
    training_sequences,
)
from recbole_sdpo.ragged import Ragged
from tests.conftest import TINY, write_dataset

HEADER = 10_000


@pytest.fixture
def loaders(tmp_path):
    # At least four items each: of three, RecBole gives a general model a validation target and a
    # sequential one none.
    rng = np.random.default_rng(0)
    content = [rng.integers(1, 30, length).tolist() for length in (20, 5, 4, 9, 15)]
    path = write_dataset(tmp_path / "d", content, None)

    def load(model):
        config = RunConfig(
            model, "toy", config_dict=TINY | {"data_path": str(path), "MAX_ITEM_LIST_LENGTH": 5}
        )
        return data_preparation(config, create_dataset(config))

    return content, load


def tokens(dataset, field, ids):
    return [int(dataset.field2id_token[field][i][1:]) for i in ids]


def targets(sequences):
    return (sequences.items.lengths - sequences.history).sum()


def test_sequences_are_the_users_items_without_the_last_two(loaders):
    content, load = loaders
    dataset = load("GRU4Rec")[0]._dataset
    sequences = training_sequences(dataset)
    found = {
        u: tokens(dataset, "item_id", sequences.items[i])
        for i, u in enumerate(tokens(dataset, "user_id", sequences.user))
    }
    assert found == {u: items[:-2] for u, items in enumerate(content)}
    assert targets(sequences) == len(dataset)
    assert (sequences.history == 1).all()


def test_rows_of_users_may_be_mixed(loaders):
    """Each user's in their order; targets stand as target_rows says."""
    dataset = loaders[1]("GRU4Rec")[0]._dataset
    user = dataset.inter_feat["user_id"].numpy()
    step = np.array([(user[:row] == user[row]).sum() for row in range(len(user))])
    mixed = dataset.copy(dataset.inter_feat[np.lexsort((user, step))])
    before, after = training_sequences(dataset), training_sequences(mixed)
    assert before.items.lengths.tolist() == after.items.lengths.tolist()
    assert before.items.values.tolist() == after.items.values.tolist()
    targets = mixed.inter_feat["item_id"].numpy()[target_rows(mixed)]
    assert targets.tolist() == dataset.inter_feat["item_id"].tolist()


def test_rows_that_do_not_chain_stand_alone(loaders):
    dataset = loaders[1]("GRU4Rec")[0]._dataset
    dataset.inter_feat = dataset.inter_feat[np.arange(len(dataset))[::-1].copy()]
    sequences = training_sequences(dataset)
    assert targets(sequences) == len(dataset)
    assert len(sequences.items) == len(dataset)


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_met_items_are_the_same_for_general_and_sequential_models(
    loaders, rows_at_once, monkeypatch
):
    monkeypatch.setattr(sequences, "ROWS_AT_ONCE", rows_at_once)
    content, load = loaders
    found = []
    for model in ("GRU4Rec", "BPR"):
        parts = [loader._dataset for loader in load(model)]
        for until, cut in ((1, -2), (2, -1), (3, None)):
            users, items = met_items(*parts[:until])
            pairs = set(
                zip(
                    tokens(parts[0], "user_id", users),
                    tokens(parts[0], "item_id", items),
                    strict=True,
                )
            )
            expected = {(u, i) for u, sequence in enumerate(content) for i in sequence[:cut]}
            found.append(pairs == expected)
    assert all(found)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 59)), min_size=1, max_size=5),
    st.integers(2, 20),
)
def test_windows_ask_for_each_target_once_with_half_a_window_of_history(shapes, window):
    lengths, opening = zip(*((n, min(h, n - 1)) for n, h in shapes), strict=True)
    rows = [np.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths)]
    prompts = history_windows(
        Sequences(Ragged.from_rows(rows), np.arange(len(rows)), np.array(opening)), window, HEADER
    )
    assert sorted(prompts.target) == sorted(
        item for row, h in zip(rows, opening, strict=True) for item in row[h:]
    )
    for tree, before, target, user in zip(
        prompts.tree, prompts.before, prompts.target, prompts.user, strict=True
    ):
        trunk, place = prompts.trunks[tree], target % 100
        assert trunk[0] == HEADER and trunk[before] == target and user == target // 100
        # the items just before the target
        assert trunk[1:before].tolist() == list(range(target - (before - 1), target))
        assert min(place, window // 2) <= before - 1 < max(window, opening[user] + 1)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_batches_hold_every_row_once_within_the_budget(sizes, budget):
    sizes = np.array(sizes, int)
    cut = batches(sizes, budget)
    assert sorted(np.concatenate(cut).tolist() if cut else []) == list(range(len(sizes)))
    assert all(len(rows) == 1 or sizes[rows].max() * len(rows) <= budget for rows in cut)


def test_select_keeps_targets_with_their_trees():
    rows = [np.arange(1, 12), np.arange(20, 26)]
    prompts = history_windows(
        Sequences(Ragged.from_rows(rows), np.array([7, 8]), np.array([1, 1])), 4, HEADER
    )
    chosen = np.array([len(prompts) - 1, 0])
    picked = prompts.select(chosen)
    assert picked.target.tolist() == prompts.target[prompts.target_index(chosen)].tolist()
    assert [
        picked.trunks[t][b] for t, b in zip(picked.tree, picked.before, strict=True)
    ] == picked.target.tolist()


def test_histories_drop_the_padding(loaders):
    rows = loaders[1]("GRU4Rec")[2]._dataset.inter_feat
    past = histories(
        rows,
        {
            "ITEM_ID_FIELD": "item_id",
            "LIST_SUFFIX": "_list",
            "ITEM_LIST_LENGTH_FIELD": "item_length",
        },
    )
    assert (
        past.lengths.max() <= 5
        and (past.values > 0).all()
        and past.lengths.tolist() == rows["item_length"].tolist()
    )


@pytest.mark.parametrize("split", [{}, {"split": {"RS": [8, 1, 1]}, "group_by": "none"}])
def test_the_last_target_of_each_user(tmp_path, split):
    rng = np.random.default_rng(0)
    content = [rng.integers(1, 30, length).tolist() for length in (20, 5, 4, 9, 15)]
    path = write_dataset(tmp_path / "d", content, None)
    config = RunConfig(
        "GRU4Rec",
        "toy",
        config_dict=TINY | {"data_path": str(path), "eval_args": {"mode": "uni5", **split}},
    )
    dataset = data_preparation(config, create_dataset(config))[0]._dataset
    rows = dataset.inter_feat
    latest = {}
    for user, item, time in zip(
        rows["user_id"].tolist(), rows["item_id"].tolist(), rows["timestamp"].tolist(), strict=True
    ):
        if time >= latest.get(user, (-1,))[0]:
            latest[user] = (time, item)
    last = last_targets(dataset).inter_feat
    assert dict(zip(last["user_id"].tolist(), last["item_id"].tolist(), strict=True)) == {
        user: item for user, (_, item) in latest.items()
    }
    assert len(last) == len(latest) and len(dataset) > len(last)
    assert targets(training_sequences(last_targets(dataset))) == len(last)


def test_targets_have_a_digest_of_their_own_whatever_else_is_in_the_data(ring):
    def digest():
        config = RunConfig("SDPO-LLM", "toy", config_dict=dict(ring))
        return digest_of_targets(data_preparation(config, create_dataset(config))[0]._dataset)

    before, folder = digest(), Path(ring["data_path"], "toy")
    with (folder / "toy.item").open("a") as items:
        items.write("i99\ta title that nobody met\n")
    assert digest() == before
    file = folder / "toy.inter"
    file.write_text(file.read_text().replace("u5\ti", "u99\ti"))
    assert digest() != before
