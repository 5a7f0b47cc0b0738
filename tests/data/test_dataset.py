"""What RecBole makes of files: order in time, pre-split files, pickles and sizes, against a slow
reading of the same files."""

import os
import pickle
from fractions import Fraction

import numpy as np
import pytest
from recbole.data import data_preparation, utils

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset, user_histories
from recbole_sdpo.data.sequences import histories, met_items
from recbole_sdpo.errors import UserError
from tests.conftest import TINY, write_dataset

MODELS = ["SDPO-LLM", "GRU4Rec", "BPR", "FM"]


def config_of(path, model, **settings):
    return RunConfig(
        model,
        "toy",
        config_dict=TINY
        | {"data_path": str(path), "train_neg_sample_args": {"sample_num": 1}}
        | settings,
    )


def write(tmp_path, rows, head="user_id:token\titem_id:token\ttimestamp:float"):
    folder = tmp_path / "d" / "toy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.inter").write_text(
        "\n".join([head, *("\t".join(map(str, row)) for row in rows)]) + "\n"
    )
    return folder.parent


def events(rng, times):
    """Events in any order in the file, some at one time; and each user's items in order, by a
    slow sort."""
    rows = [
        (f"u{user}", f"i{item}", times(rng))
        for user in range(12)
        for item in rng.permutation(40)[: rng.integers(5, 12)]
    ]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    ordered = sorted(enumerate(rows), key=lambda row: (Fraction(row[1][2]), row[0]))
    return rows, [row for _, row in ordered]


def of_users(rows):
    return {user: [item for who, item, _ in rows if who == user] for user, *_ in rows}


def tokens(dataset):
    rows = dataset.inter_feat
    return [
        dataset.field2id_token[field][rows[field].numpy()].tolist()
        for field in (dataset.uid_field, dataset.iid_field)
    ]


FORMS = {
    "seconds": lambda rng: str(1_700_000_000 + rng.integers(60)),
    "milliseconds": lambda rng: str(1_700_000_000_000 + rng.integers(60)),
    "nanoseconds": lambda rng: str(1_700_000_000_000_000_000 + rng.integers(60)),
    "parts": lambda rng: f"{1_700_000_000 + rng.integers(3)}.{rng.integers(10)}",
    "negative": lambda rng: str(-1_000_000_000 + rng.integers(60)),
    "powers": lambda rng: f"1.{rng.integers(10**7):07}e9",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_events_stand_in_the_order_of_their_times_as_written(tmp_path, form, model):
    rows, ordered = events(np.random.default_rng(3), FORMS[form])
    path, expected = write(tmp_path, rows), of_users(ordered)
    config = config_of(path, model)
    dataset = create_dataset(config)
    item_tokens = dataset.field2id_token["item_id"]
    assert {
        user: item_tokens[items].tolist() for user, items in user_histories(dataset).items()
    } == expected
    parts = [loader._dataset for loader in data_preparation(config, dataset)]
    for part, place in zip(parts[1:], (-2, -1), strict=True):
        users, items = tokens(part)
        assert dict(zip(users, items, strict=True)) == {
            user: sequence[place] for user, sequence in expected.items()
        }
        if "item_id_list" in part.inter_feat:
            past = histories(part.inter_feat, config)
            for row, user in enumerate(users):
                assert (
                    item_tokens[past[row]].tolist()
                    == expected[user][:place][-TINY["MAX_ITEM_LIST_LENGTH"] :]
                )
    assert str(parts[0].inter_feat["timestamp"].dtype) == "torch.float32"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("group_by", ["user", "none"])
@pytest.mark.parametrize("kind", ["RS", "TS"])
def test_shares_are_split_in_order_too(tmp_path, model, group_by, kind):
    rng = np.random.default_rng(4)
    # no ties: all of them within what float32 takes for a few instants
    moments = iter(rng.permutation(10_000).tolist())
    rows, ordered = events(rng, lambda _: str(1_700_000_000 + next(moments)))
    path = write(tmp_path, rows)
    config = config_of(
        path,
        model,
        eval_args={"split": {kind: [0.6, 0.2, 0.2]}, "group_by": group_by, "mode": "uni5"},
    )
    time = {(user, item): int(moment) for user, item, moment in rows}
    loaders = data_preparation(config, create_dataset(config))
    parts = [
        [time[pair] for pair in zip(*tokens(loader._dataset), strict=True)] for loader in loaders
    ]
    if group_by == "none" and kind == "RS":
        assert max(parts[0]) < min(parts[1]) and max(parts[1]) < min(parts[2])
    elif kind == "TS":
        assert max(parts[0] + parts[1]) < min(parts[2])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_held_out_items_are_met_in_tests_alone(tmp_path, model, share):
    """Also where users have one, two or three events, which RecBole would train on."""
    rng = np.random.default_rng(6)
    rows = [
        (f"u{user}", f"i{item}", step)
        for user in range(60)
        for step, item in enumerate(rng.permutation(40)[: 1 + user % 7])
    ]
    path, whole = write(tmp_path, rows), of_users(rows)
    every = {item for _, item, _ in rows}
    drawn = {}
    for seed in (1, 2):
        config = config_of(path, model, held_out_items=share, candidates_seed=seed)
        dataset = create_dataset(config)
        names = dataset.field2id_token["item_id"]
        assert set(names[1:]) == every  # in the catalogue, and among candidates
        left = {user: names[items].tolist() for user, items in user_histories(dataset).items()}
        gone = {
            item
            for user, items in whole.items()
            for item in items
            if item not in left.get(user, ())
        }
        assert len(gone) == round(share * len(every))
        for user, items in whole.items():
            past = [item for item in items[:-1] if item not in gone]
            test = items[-1:] if items[-1] not in gone or len(past) >= 2 else []
            assert left.get(user, []) == past + test
        train, valid, test = (loader._dataset for loader in data_preparation(config, dataset))
        assert not gone & set(names[met_items(train, valid)[1]])
        ends = {items[-1] for items in left.values()}
        assert set(names[test.inter_feat["item_id"].numpy()]) >= gone & ends != set()
        drawn[seed] = gone, left
    assert drawn[1] != drawn[2]
    again = create_dataset(config_of(path, model, held_out_items=share, seed=2))
    names = again.field2id_token["item_id"]
    assert {u: names[i].tolist() for u, i in user_histories(again).items()} == drawn[2][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "mode": "uni5"}}, "needs eval_args"),
        ({"eval_args": {"order": "RO", "mode": "uni5"}}, "needs eval_args"),
        ({"held_out_items": 0.6}, "held_out_items=0.6.*0 to 0.5"),
        ({"held_out_items": 0.01}, "held_out_items=0.01 is 0 of"),
    ],
)
def test_held_out_items_that_show_nothing_are_refused(tmp_path, settings, message):
    rows, _ = events(np.random.default_rng(6), FORMS["seconds"])
    with pytest.raises(UserError, match=message):
        path = write(tmp_path, rows)
        create_dataset(config_of(path, "BPR", **({"held_out_items": 0.1} | settings)))


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_of_events_that_repeat_at_one_time_the_file_decides(tmp_path, keep, model):
    rng = np.random.default_rng(5)
    rows = [
        (f"u{user}", f"i{rng.integers(9)}", 1_700_000_000 + rng.integers(3))
        for user in range(40)
        for _ in range(30)
    ]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    config = config_of(
        write(tmp_path, rows), model, rm_dup_inter=keep, eval_args={"mode": "full"}, repeatable=True
    )
    dataset = create_dataset(config)
    expected = {}
    for user, items in of_users(sorted(rows, key=lambda row: row[2])).items():
        once = (
            list(dict.fromkeys(items))
            if keep == "first"
            else list(dict.fromkeys(items[::-1]))[::-1]
        )
        expected[user] = once
    names = dataset.field2id_token["item_id"]
    assert {
        user: names[items].tolist() for user, items in user_histories(dataset).items()
    } == expected


def test_ties_are_told_of(tmp_path, caplog):
    rows = [("u", f"i{item}", 5) for item in range(5)] + [
        ("v", f"i{item}", item) for item in range(5)
    ]
    config = config_of(write(tmp_path, rows), "Pop", eval_args={"mode": "full"}, repeatable=True)
    data_preparation(config, create_dataset(config))
    assert "4 of 10 events, of 1 users, have the time of the one before them" in caplog.text


@pytest.mark.parametrize(
    ("sequences", "settings", "words"),
    [
        (
            [[1, 2, 3], [2, 3], [4]],
            {},
            "nothing to validate on, of 6 events of 3 users, who have 3 at most; .*four events",
        ),
        ([[1], [2], [3]], {}, "has one event"),
        ([[1, 1, 1, 1, 1]] * 3, {}, "has one item; it must have two or more"),
        (
            [[1, 2, 3, 4, 5]] * 3,
            {"user_inter_num_interval": "[9,inf)"},
            r"nothing is left after.*user_inter_num_interval='\[9,inf\)'",
        ),
    ],
)
@pytest.mark.parametrize("model", ["SDPO-LLM", "SASRec"])
def test_too_little_is_told_of(tmp_path, sequences, settings, words, model):
    config = config_of(write_dataset(tmp_path / "d", sequences, None), model, **settings)
    with pytest.raises(UserError, match=words):
        data_preparation(config, create_dataset(config))


def test_a_user_who_has_met_everything_is_named(tmp_path):
    config = config_of(write_dataset(tmp_path / "d", [[1, 2, 3, 4, 5], [1, 2, 3, 4]], None), "BPR")
    with pytest.raises(
        UserError, match=r"user 'u0' has met all 5 items.*user_inter_num_interval='\[0,4\]'"
    ):
        data_preparation(config, create_dataset(config))


def test_missing_files_are_named_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    path = write_dataset(tmp_path / "d", [[1, 2, 3, 4, 5]] * 3, None)
    for name, words in (
        ("toys", "did you mean 'toy'"),
        ("ml-1m", r"ml-1m/ml-1m.inter; RecBole's copy of it is https"),
    ):
        with pytest.raises(UserError, match=f"there is no file .*{words}"):
            create_dataset(RunConfig("BPR", name, config_dict=TINY | {"data_path": str(path)}))
    os.rename(path / "toy" / "toy.inter", path / "toy" / "other.inter")
    with pytest.raises(
        UserError, match=r"no file .*toy.inter, which must be there; the folder holds other.inter"
    ):
        create_dataset(config_of(path, "BPR"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR"])
def test_no_pickle_is_loaded(ring, model):
    config = RunConfig(model, "toy", config_dict=ring)
    os.makedirs(ring["checkpoint_dir"])
    for name in ("toy-Dataset.pth", "toy-SequentialDataset.pth", f"toy-for-{model}-dataloader.pth"):
        with open(os.path.join(ring["checkpoint_dir"], name), "wb") as stream:
            pickle.dump(Evil(), stream)
    data_preparation(config, create_dataset(config))
    with pytest.raises(UserError, match="toy-.*Dataset.pth is a pickle, which runs code"):
        utils.create_dataset(config)  # RecBole's own, as run_recbole calls it
    utils.data_preparation(config, create_dataset(config))
    for key in ("dataset_save_path", "dataloaders_save_path", "save_dataset", "save_dataloaders"):
        with pytest.raises(UserError, match=f"{key}=.*pickle"):
            create_dataset(
                RunConfig(model, "toy", config_dict=ring | {key: "x" if "path" in key else True})
            )
    assert not os.path.exists("ran")


# Files that are split already

LONG = {
    user: [f"i{item}" for item in np.random.default_rng(user).permutation(60)[:30]]
    for user in range(15)
}


def write_split(
    tmp_path, head="user_id:token\titem_id_list:token_seq\titem_id:token", start=1, name="toy"
):
    folder = tmp_path / "b" / name
    folder.mkdir(parents=True)
    for part, stops in (("train", range(start, 28)), ("valid", [28]), ("test", [29])):
        rows = [
            f"u{user}\t{' '.join(items[:stop])}\t{items[stop]}"
            for user, items in LONG.items()
            for stop in stops
        ]
        (folder / f"{name}.{part}.inter").write_text("\n".join([head, *rows]) + "\n")
    (folder / f"{name}.item").write_text(
        "item_id:token\ttitle:token_seq\n"
        + "".join(f"i{item}\tThing {item}\n" for item in range(60))
    )
    return folder.parent


SPLIT = {
    "benchmark_filename": ["train", "valid", "test"],
    "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
    "eval_args": {"mode": "uni5"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("start", [1, 27])
@pytest.mark.parametrize("longest", [10, 29, 50])
def test_split_files_give_their_histories_and_targets(tmp_path, model, start, longest):
    config = config_of(
        write_split(tmp_path, start=start), model, MAX_ITEM_LIST_LENGTH=longest, **SPLIT
    )
    dataset = create_dataset(config)
    names = dataset.field2id_token["item_id"]
    served = {user: names[items].tolist() for user, items in user_histories(dataset).items()}
    assert served == {f"u{user}": items for user, items in LONG.items()}
    parts = [loader._dataset for loader in data_preparation(config, dataset)]
    for part, place in ((parts[1], 28), (parts[2], 29)):
        users, items = tokens(part)
        for row, (user, item) in enumerate(zip(users, items, strict=True)):
            sequence = LONG[int(user[1:])]
            assert item == sequence[place]
            if model in ("SDPO-LLM", "GRU4Rec"):
                rows = part.inter_feat
                assert rows["item_id_list"].shape[1] == longest and int(
                    rows["item_length"][row]
                ) == min(place, longest)
                assert names[histories(rows, config)[row]].tolist() == sequence[:place][-longest:]
    for until, stop in ((1, 28), (2, 29), (3, 30)):  # whatever was cut off, it was met
        users, items = met_items(*parts[:until])
        pairs = {
            (dataset.field2id_token["user_id"][user], names[item])
            for user, item in zip(users, items, strict=True)
        }
        assert pairs == {
            (f"u{user}", item) for user, sequence in LONG.items() for item in sequence[:stop]
        }


@pytest.mark.parametrize("model", ["BPR", "FM"])
def test_a_model_without_sequences_trains_on_the_events_of_histories(tmp_path, model):
    """But not on what validation or test ask for, which histories of the test hold, too."""
    dataset = create_dataset(config_of(write_split(tmp_path, start=27), model, **SPLIT))
    train, *_ = [part._dataset for part in data_preparation(dataset.config, dataset)]
    assert sorted(zip(*tokens(train), strict=True)) == sorted(
        (f"u{user}", item) for user, items in LONG.items() for item in items[:28]
    )
    assert not {"item_id_list"} & {*train.inter_feat.columns, *train.fields()}


def test_a_model_without_sequences_says_what_it_does_not_see(tmp_path, caplog):
    folder = write_split(tmp_path, start=27)
    for file in (folder / "toy").glob("*.inter"):
        head, *rows = file.read_text().splitlines()
        file.write_text("\n".join([f"{head}\trating:float", *(f"{row}\t5" for row in rows)]) + "\n")
    load = {"inter": ["user_id", "item_id_list", "item_id", "rating"]}
    config = config_of(folder, "BPR", **(SPLIT | {"load_col": load}))
    data_preparation(config, create_dataset(config))
    assert "trains on the 15 events of the training file; 405 further ones" in caplog.text
    assert "for they have no 'rating'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"benchmark_filename": ["train", "test"]}, "must be a list of three"),
        ({"benchmark_filename": ["train", "valid", "tset"]}, "no file .*toy.tset.inter"),
        (
            {"load_col": {"inter": ["user_id", "item_id"]}},
            "'item_id_list', must be loaded from .*toy.train.inter",
        ),
        ({"seq_len": {"item_id_list": 5}}, "seq_len=.*would cut the end of histories"),
        ({"user_inter_num_interval": "[3,inf)"}, "user_inter_num_interval=.*taken as they are"),
        ({"rm_dup_inter": "first"}, "rm_dup_inter=.*taken as they are"),
    ],
)
def test_what_split_files_cannot_do_is_refused(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        create_dataset(config_of(write_split(tmp_path), "SDPO-LLM", **(SPLIT | settings)))


def test_sessions_of_which_the_longest_rows_come_first_give_the_same_histories(tmp_path):
    folder = write_split(tmp_path)
    file = folder / "toy" / "toy.train.inter"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *rows[::-1]]) + "\n")
    dataset = create_dataset(config_of(folder, "GRU4Rec", **SPLIT))
    names = dataset.field2id_token["item_id"]
    served = {user: names[items].tolist() for user, items in user_histories(dataset).items()}
    assert served == {f"u{user}": items for user, items in LONG.items()}


def test_a_tab_may_be_spelled_as_a_shell_hands_it_on(ring):
    assert (
        RunConfig("BPR", "toy", config_dict=ring | {"field_separator": "\\t"})["field_separator"]
        == "\t"
    )
