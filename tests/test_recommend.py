"""Recommendations from a checkpoint, against the scores of the model that was trained."""

import json
import os
import random
import re
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from transformers import GPT2Config

from recbole_sdpo import quick_start
from recbole_sdpo.command import program
from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.policy import restore_policy
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.recommend import ITEMS, Recommender
from recbole_sdpo.trainer.checkpoint import Checkpoint
from recbole_sdpo.values import read_arguments
from tests.conftest import TINY, write_dataset
from tests.faults.checkpoints import ADDED, evil_texts, replaced, sealed, tampered
from tests.model.test_sdpo_llm import build, saved

RECOMMEND = ["recbole-sdpo", "recommend", "--checkpoint", "run"]


@pytest.fixture
def trained(ring):
    settings = ring | {
        "run_dir": "run",
        "sft_epochs": 4,
        "data_path": str(Path(ring["data_path"]).relative_to(Path.cwd())),
    }
    quick_start.run("SDPO-LLM", "toy", config_dict=settings)
    return settings


def events(settings):
    return pd.read_csv(Path(settings["data_path"]) / "toy" / "toy.inter", sep="\t", dtype=str)


@pytest.mark.parametrize("folder", ["run", "run/sdpo", "run/sft"])
def test_the_best_titles_are_those_of_the_trained_model(trained, folder):
    config = RunConfig(
        "SDPO-LLM", "toy", config_dict=trained | {"run_dir": None, "eval_args": {"mode": "full"}}
    )
    train, _, test = data_preparation(config, create_dataset(config))
    model = SDPOLLM(config, train._dataset)
    restore_policy(model.lm, Path("run/sft" if folder == "run/sft" else "run/sdpo"))
    # The test rows' histories lack the last item alone: give them as titles.
    rows = test._dataset.inter_feat[:5]
    scores = model.eval().full_sort_predict(rows).view(5, -1)
    recommender = Recommender.load(folder)
    for row in range(5):
        past = rows["item_id_list"][row][: int(rows["item_length"][row])].tolist()
        found = recommender.recommend(
            history=[model.catalogue.titles[item].upper() for item in past], k=4
        )
        best, items = scores[row].topk(4)
        np.testing.assert_allclose(found["score"], best, atol=1e-5)
        assert found["title"].tolist() == [model.catalogue.titles[item] for item in items]
        assert found["item"].tolist() == test._dataset.field2id_token["item_id"][items].tolist()


def test_a_users_history_is_all_that_the_data_hold_and_can_be_left_out(trained):
    recommender, seen = Recommender.load("run"), events(trained)
    items = pd.read_csv(
        Path(trained["data_path"]) / "toy" / "toy.item", sep="\t", index_col=0
    ).iloc[:, 0]
    mine = seen[seen.iloc[:, 0] == "u5"].iloc[:, 1]
    by_user = recommender.recommend("u5", k=24)
    pd.testing.assert_frame_equal(by_user, recommender.recommend(history=list(items[mine]), k=24))
    assert by_user["title"].is_unique and by_user["score"].is_monotonic_decreasing
    rest = recommender.recommend("u5", k=24 - len(set(mine)), exclude_history=True)
    expected = by_user[~by_user["item"].isin(mine)].reset_index(drop=True)
    assert rest["item"].tolist() == expected["item"].tolist()
    np.testing.assert_allclose(rest["score"], expected["score"], atol=1e-5)


def test_later_events_and_new_titles_count(trained):
    folder = Path(trained["data_path"]) / "toy"
    with (folder / "toy.inter").open("a") as file:
        file.write("u5\tnew\t99\n")
    with (folder / "toy.item").open("a") as file:
        file.write("new\tpink cube\n")
    recommender = Recommender.load("run")
    assert recommender.recommend("u5", k=25)["item"].isin(["new"]).sum() == 1
    assert recommender.recommend("u5", k=5, exclude_history=True)["item"].isin(["new"]).sum() == 0


def test_items_without_events_are_ranked_and_may_be_named(trained):
    with (Path(trained["data_path"]) / "toy" / "toy.item").open("a") as file:
        file.write("new\tpink cube\nother\tRED  cube\n")
    recommender = Recommender.load("run")
    ranked = recommender.recommend("u1", k=25)
    # of one title, the item with events
    assert ranked["item"].isin(["new"]).sum() == 1 and not ranked["item"].isin(["other"]).any()
    assert recommender.recommend(history=["Pink Cube"], k=25)["score"].is_monotonic_decreasing
    with pytest.raises(UserError, match="k=26 must be a whole number from 1 to 25, the titles"):
        recommender.recommend("u1", k=26)


@pytest.fixture
def filtered(ring):
    """Data with ratings; u1 has two events, u2 only bad ones, u3 only items that few met."""
    folder = Path(ring["data_path"]) / "toy"
    lines = (folder / "toy.inter").read_text().splitlines()
    rows = [f"{line}\t5" for line in lines[1:] if not line.startswith(("u1\t", "u2\t", "u3\t"))]
    rows += ["u1\ti7\t3\t5", "u1\ti4\t2\t5", "u2\ti4\t1\t1", "u3\trare\t1\t5", "u4\trare\t0\t5"]
    (folder / "toy.inter").write_text("\n".join([lines[0] + "\trating:float", *rows]) + "\n")
    with (folder / "toy.item").open("a") as file:
        file.write("rare\trare cube\nnew\tpink cube\n")
    return ring | {
        "load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]},
        "val_interval": {"rating": "[3,inf)"},
        "run_dir": "run",
        "max_train_targets": 20,
    }


def test_an_interval_is_text_wherever_it_stands(filtered):
    """Closed at both ends it looks like a list."""
    for text in ("[2,900]", "(1,900)"):
        config = RunConfig("SDPO-LLM", "toy", config_dict=filtered | {ITEMS: text})
        assert config[ITEMS] == text
        assert read_arguments([f"--{ITEMS}={text}"]) == ({ITEMS: text}, [])
    quick_start.run("SDPO-LLM", "toy", config_dict=filtered | {ITEMS: "[2,900]"})
    assert len(Recommender.load("run").recommend("u1"))


def test_the_folder_of_the_data_may_have_a_number_for_a_name(filtered):
    quick_start.run("SDPO-LLM", "toy", config_dict=filtered)
    Path(filtered["data_path"]).rename("2024")
    assert len(Recommender.load("run", data_path="2024").recommend("u1"))


@pytest.mark.parametrize("interval", ["[0,inf)", "[3,inf)"])
def test_users_with_few_events_are_served_and_other_filters_hold(filtered, interval):
    few = {"user_inter_num_interval": "[3,inf)", "item_inter_num_interval": interval}
    quick_start.run("SDPO-LLM", "toy", config_dict=filtered | few)
    recommender = Recommender.load("run")
    by_title = recommender.recommend(history=["black cube", "red ball"], k=24)  # i4, then i7
    pd.testing.assert_frame_equal(recommender.recommend("u1", k=24), by_title)
    with pytest.raises(
        UserError,
        match=r"user 'u2' has events in the data, but val_interval=.*'\[3,inf\)'.* leaves none of "
        r"them",
    ):
        recommender.recommend("u2")
    with pytest.raises(UserError, match="user 'u999' is not in the data; the nearest"):
        recommender.recommend("u999")
    if interval == "[0,inf)":
        assert recommender.recommend("u3", k=26)["item"].isin(["rare", "new"]).sum() == 2
    else:
        with pytest.raises(
            UserError,
            match=r"user 'u3' has events in the data, but item_inter_num_interval='\[3,inf\)' of "
            r"the training",
        ):
            recommender.recommend("u3")
        with pytest.raises(
            UserError,
            match=r"'rare cube' is not in the catalogue \(without the items that "
            r"item_inter_num_interval=",
        ):
            recommender.recommend(history=["rare cube"])
        with pytest.raises(UserError, match="k=25 must be a whole number from 1 to 24, the titles"):
            recommender.recommend("u1", k=25)


def test_histories_follow_the_time_as_written(ring):
    """20 s apart in 2024, which RecBole's float32 takes for one instant, and written newest
    first."""
    path = Path(ring["data_path"]) / "toy" / "toy.inter"
    head, *rows = path.read_text().splitlines()
    rows = [
        (user, item, 1_700_000_000 + 20 * int(time))
        for user, item, time in (row.split("\t") for row in rows)
    ]
    rows += [
        ("tie", "i9", 1_700_000_000),
        ("tie", "i2", 1_700_000_000),
        ("tie", "i5", 1_700_000_000),
    ]
    newest_first = sorted(rows, key=lambda row: -row[2])
    path.write_text("\n".join([head, *("\t".join(map(str, row)) for row in newest_first)]) + "\n")
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20}
    )
    recommender = Recommender.load("run")
    tokens = recommender.item_tokens
    expected = {}
    for user, item, _ in sorted(newest_first, key=lambda row: row[2]):
        expected.setdefault(user, []).append(item)
    assert {user: tokens[items].tolist() for user, items in recommender.users.items()} == expected


def test_data_that_are_split_already_show_a_users_last_row(ring):
    folder = Path(ring["data_path"]) / "toy"
    sequences = {
        f"u{user}": [f"i{1 + (user + step) % 24}" for step in range(6 + user % 3)]
        for user in range(20)
    }
    head = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for part, stops in {"train": (-3, -2), "valid": (-2, -1), "test": (-1, 0)}.items():
        rows = []
        for user, items in sequences.items():
            ends = range(1, len(items) - 2) if part == "train" else [len(items) + stops[0]]
            rows += [f"{user}\t{' '.join(items[:end])}\t{items[end]}" for end in ends]
        (folder / f"toy.{part}.inter").write_text("\n".join([head, *rows]) + "\n")
    split = {
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "alias_of_item_id": ["item_id_list"],
    }
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | split | {"run_dir": "run", "max_train_targets": 20}
    )
    recommender = Recommender.load("run")
    assert {
        user: recommender.item_tokens[items].tolist() for user, items in recommender.users.items()
    } == sequences
    assert len(recommender.recommend("u1", k=24)) == 24


def test_items_of_one_title_are_recommended_once(ring):
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text().replace("green cube", "red cube"))
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20}
    )
    found = Recommender.load("run").recommend("u5", k=23)
    assert found["title"].is_unique
    with pytest.raises(
        ValueError, match="k=24 must be a whole number from 1 to 23, the titles that there are"
    ):
        Recommender.load("run").recommend("u5", k=24)


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_checkpoint_stands_alone_with_its_data(ring, tmp_path, peft, monkeypatch):
    """From another folder, with the data elsewhere, and an adapter over random weights too."""
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring | {"run_dir": "run", "peft": peft, "max_train_targets": 50},
    )
    here = Recommender.load("run").recommend("u1", k=3)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    shutil.copytree("run/sdpo", tmp_path / "far" / "checkpoint")
    monkeypatch.chdir(tmp_path / "far")
    with pytest.raises(ValueError, match="toy"):
        Recommender.load("checkpoint")
    pd.testing.assert_frame_equal(
        Recommender.load("checkpoint", data_path=tmp_path / "elsewhere").recommend("u1", k=3), here
    )


def test_what_cannot_be_recommended_is_an_error(trained):
    recommender = Recommender.load("run")
    for given, message in (
        ({"user": "u555"}, "user 'u555' is not in the data; the nearest are 'u55'"),
        (
            {"history": ["red cubes"]},
            "title 'red cubes' is not in the catalogue; the nearest are 'red cube'",
        ),
        (
            {"history": ["zzzzzzzz"]},
            "title 'zzzzzzzz' is not in the catalogue, and nothing there is like it.",
        ),
        (
            {"history": "red cube"},
            "user=None, history='red cube': one of the two must be given, and a history must be a "
            "list of titles.",
        ),
        ({"user": "u1", "k": 2.0}, "k=2.0 must be a whole number from 1 to 24"),
        ({"user": "u1", "k": "ten"}, "k='ten' must be a whole number from 1 to 24"),
        ({"history": []}, "history=\\[\\] must be a list of one title or more."),
        ({}, "user=None, history=None: one of the two must be given"),
        (
            {"user": "u1", "k": 0},
            "k=0 must be a whole number from 1 to 24, the titles that there are to recommend.",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            recommender.recommend(**given)
    with pytest.raises(ValueError, match="checkpoint='nowhere' holds no data.json"):
        Recommender.load("nowhere")
    with pytest.raises(ValueError, match="device='tpu9' cannot be used .*; it must be cpu, cuda"):
        Recommender.load("run", device="tpu9")
    with pytest.raises(
        UserError,
        match="cannot be loaded: .*nowhere/toy.* data_path='nowhere' must be the folder above",
    ):
        Recommender.load("run", data_path="nowhere")
    with pytest.raises(UserError, match="data_path=' ' is blank"):
        Recommender.load("run", data_path=" ")
    for device in ("meta", "cuda:99"):
        with pytest.raises(UserError, match=f"device='{device}' cannot be used"):
            Recommender.load("run", device=device)
    item_file = Path(trained["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text().replace("title:", "name:"))
    with pytest.raises(UserError, match="title_fields=.*toy.item has no column 'title'"):
        Recommender.load("run")


def test_options_of_the_program_around_it_are_not_ours(ring, monkeypatch):
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring | {"run_dir": "run", "peft": "lora", "max_train_targets": 50},
    )
    here = Recommender.load("run").recommend("u1", k=3)
    monkeypatch.setattr(
        sys, "argv", ["serve.py", "--seed=5", "--MAX_ITEM_LIST_LENGTH=2", "--port=80"]
    )
    pd.testing.assert_frame_equal(Recommender.load("run").recommend("u1", k=3), here)
    assert sys.argv[1] == "--seed=5"


def test_what_a_run_named_by_a_relative_path_may_be_gone(ring, tmp_path, monkeypatch):
    """A template file that was edited since, and the working folder of the training."""
    Path("mine.yaml").write_text("header: Seen\ncandidates: ['Seen {history} of {candidates}']\n")
    data = {"data_path": str(Path(ring["data_path"]).relative_to(Path.cwd()))}
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring
        | data
        | {"run_dir": "run", "prompt_templates": "mine.yaml", "max_train_targets": 50},
    )
    here = Recommender.load("run").recommend("u1", k=3)
    Path("mine.yaml").write_text(
        "header: Something else\ncandidates: ['Seen {history} of {candidates}']\n"
    )
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    pd.testing.assert_frame_equal(Recommender.load(tmp_path / "run").recommend("u1", k=3), here)


def test_a_folder_named_as_the_backbone_is_none(ring):
    Path("scratch").mkdir()
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20}
    )
    assert len(Recommender.load("run").recommend("u1", k=3)) == 3


def test_what_made_training_fast_is_not_served(ring):
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20}
    )
    made = Checkpoint.read(Path("run"))
    fast = {"attention": "flex_attention", "compile": True, "gradient_checkpointing": True}

    def served(**given):
        backbone = replace(made.settings.backbone, **given)
        return replace(made, settings=replace(made.settings, backbone=backbone)).chosen(False)

    assert served(**fast) == made.chosen(False)
    assert served(attention="eager").attention == "eager"


def test_a_title_may_hold_a_semicolon(ring, monkeypatch, capsys):
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text().replace("red cube", "red cube; again"))
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20}
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [*RECOMMEND, "--history", "Red cube; again", "-k", "2", "--format", "json"],
    )
    program.main()
    shown = [row["title"] for row in json.loads(capsys.readouterr().out)]
    assert (
        shown
        == Recommender.load("run").recommend(history=["red cube; again"], k=2)["title"].tolist()
    )


def test_prompts_that_need_candidates_are_refused(ring):
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring
        | {
            "run_dir": "run",
            "prompt_style": "candidates",
            "prompt_candidates": 5,
            "max_train_targets": 20,
        },
    )
    with pytest.raises(ValueError, match="was trained with prompt_style='candidates'"):
        Recommender.load("run")


def test_the_command_prints_a_table_or_json(trained, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [*RECOMMEND, *arguments])
        program.main()
        return capsys.readouterr().out

    listed = json.loads(call("--user", "u7", "-k", "3", "--format", "json"))
    assert [set(row) for row in listed] == [{"item", "title", "score"}] * 3
    shown = call("--history", "red cube; green cube", "-k", "2")
    assert shown == call("--history", "red cube", "--history", "green cube", "-k", "2")
    assert len(shown.splitlines()) == 4 and "title" in shown
    for wrong in (
        ["--use", "u7"],
        ["--hist", "red cube"],
        ["--user", "u7", "-k", "x"],
        ["--user", "u7", "--history", "red cube"],
    ):
        with pytest.raises(SystemExit) as usage:
            call(*wrong)
        assert usage.value.code == 2 and "usage: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: history=.* must be a list of one title"):
        call("--history", " ; ")


def test_nothing_is_drawn(trained):
    torch.manual_seed(1)
    first = Recommender.load("run").recommend("u1")
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(Recommender.load("run").recommend("u1"), first)


def files_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }


def write(files, folder):
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a checkpoint whose data stay where they are."""
    folder = tmp_path_factory.mktemp("checkpoint")
    titles = {item: f"title {item}" for item in range(1, 13)}
    data = write_dataset(
        folder / "data",
        [[1 + (start + step) % 12 for step in range(6)] for start in range(12)],
        titles,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pytest"])
        settings = deepcopy(TINY) | {
            "data_path": str(data),
            "run_dir": "run",
            "max_train_targets": 20,
        }
        quick_start.run("SDPO-LLM", "toy", config_dict=settings)
    return files_of(folder / "run" / "sdpo")


@pytest.fixture
def stranger(checkpoint, monkeypatch):
    """The same, where nobody may be asked anything."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on standard input"))
    return checkpoint


@pytest.mark.parametrize("added", ADDED, ids=lambda added: ".".join(added[1]))
def test_a_checkpoint_sets_nothing_but_what_is_listed(stranger, tmp_path, added, monkeypatch):
    write(stranger, tmp_path / "near")
    best, marker = Recommender.load(tmp_path / "near").recommend("u1", k=12), tmp_path / "marker"
    name, path, new = added
    for value in (new, *evil_texts(marker)):
        write(
            stranger
            | {name: json.dumps(replaced(json.loads(stranger[name]), path, value)).encode()},
            tmp_path / "far",
        )
        (tmp_path / "far" / "SHA256SUMS").unlink(missing_ok=True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        try:
            pd.testing.assert_frame_equal(
                Recommender.load(tmp_path / "far").recommend("u1", k=12), best
            )
        except UserError as error:
            # what transformers reads may be refused
            assert name in ("config.json", "tokenizer_config.json"), error
        assert not marker.exists() and os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        assert not {file.name for file in tmp_path.rglob("*")} & {"elsewhere", "evil.pth"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"data.json": b""}, r"data.json is damaged \(.*\); it must be JSON"),
        ({"data.json": b"\xff{}"}, "data.json is damaged"),
        ({"data.json": b"[" * 100_000}, "data.json is damaged"),
        ({"settings.json": b"[]"}, "settings.json holds a list; it must be a dictionary"),
        ({"data.json": b"{}"}, "data.json has no 'dataset'"),
        (
            {"data.json": {"dataset": "../toy"}},
            "data.json: dataset='../toy' must be a name, not a path",
        ),
        ({"data.json": {"dataset": "/toy"}}, "data.json: dataset='/toy' must be a name"),
        ({"data.json": {"dataset": ["toy"]}}, r"data.json: dataset=\['toy'\] must be text"),
        ({"data.json": {"backbone": None}}, "data.json: backbone=None must be text"),
        (
            {"data.json": {"settings": {"MAX_ITEM_LIST_LENGTH": True}}},
            "MAX_ITEM_LIST_LENGTH=True must be a whole number",
        ),
        (
            {"data.json": {"settings": {"load_col": "inter"}}},
            "load_col='inter' must be a dictionary or null",
        ),
        ({"settings.json": {"header": 1}}, "settings.json: header=1 must be text"),
        ({"settings.json": {"header": "\ud800"}}, "settings.json: .*must be"),
        (
            {"settings.json": {"seed": -1}},
            "settings.json: seed=-1 must be a whole number from 0 to",
        ),
        (
            {"settings.json": {"scratch_layers": "2"}},
            "settings.json: scratch_layers='2' must be a whole number",
        ),
        ({"settings.json": {"dtype": "float8"}}, "settings.json: dtype='float8'"),
    ],
)
def test_what_a_checkpoints_files_say_is_checked(stranger, tmp_path, changed, message):
    for name, new in changed.items():
        content = (
            json.dumps(json.loads(stranger[name]) | new).encode() if isinstance(new, dict) else new
        )
        write(
            sealed(
                {file: data for file, data in stranger.items() if file != "SHA256SUMS"}
                | {name: content}
            ),
            tmp_path / "far",
        )
    with pytest.raises(UserError, match=message) as error:
        Recommender.load(tmp_path / "far")
    assert "\n" not in str(error.value)


def test_a_sealed_checkpoint_that_was_changed_is_refused_and_one_without_a_seal_named(
    stranger, tmp_path, caplog
):
    without = {name: data for name, data in stranger.items() if name != "SHA256SUMS"}
    write(sealed(without) | {"settings.json": stranger["settings.json"] + b" "}, tmp_path / "far")
    with pytest.raises(UserError, match="settings.json is damaged"):
        Recommender.load(tmp_path / "far")
    write(without, tmp_path / "far")
    Recommender.load(tmp_path / "far")
    assert "has no SHA256SUMS" in caplog.text


@pytest.mark.parametrize("seed", range(30))
def test_no_tampering_runs_code_or_ends_in_a_traceback(stranger, tmp_path, seed):
    marker = tmp_path / "marker"
    what, files = tampered(random.Random(seed), stranger, marker)
    write(files, tmp_path / "far")
    try:
        Recommender.load(tmp_path / "far").recommend("u1", k=3)
    except UserError as error:
        assert "\n" not in str(error), what
    assert not marker.exists(), what


def test_any_title_is_one_row_of_the_table_and_valid_json(ring, monkeypatch, capsys):
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(
        item_file.read_text()
        .replace("red cube", "red | cube \x1b[31m \x07 東京")
        .replace("red ball", "NaN")
    )
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20}
    )
    capsys.readouterr()
    for form in ("table", "json"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "recbole-sdpo",
                "recommend",
                "--checkpoint",
                "run",
                "--user",
                "u1",
                "-k",
                "24",
                "--format",
                form,
            ],
        )
        program.main()
        shown = capsys.readouterr().out
        if form == "table":
            assert len(shown.splitlines()) == 26 and r"red \| cube \\x1b\[31m \\x07 東京" in shown
            assert {len(re.split(r"(?<!\\)\|", line)) for line in shown.splitlines()} == {6}
        else:
            titles = [row["title"] for row in json.loads(shown, parse_constant=pytest.fail)]
            assert "NaN" in titles and "red | cube \x1b[31m \x07 東京" in titles


def test_a_history_beyond_learned_positions_loses_its_oldest_titles(ring, tmp_path):
    """The data may have longer titles and histories than as the policy was trained."""
    titles = {item: f"title {item:02d} {'x ' * (item % 5)}" for item in range(1, 13)}
    path = write_dataset(tmp_path / "d", [[*range(1, 13)], [2, 4, 6, 8]], titles)
    gpt2 = saved(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=150), tmp_path / "gpt2")
    model, _ = build(ring | gpt2 | {"data_path": str(path), "MAX_ITEM_LIST_LENGTH": 2})
    header, *lines = [
        len(model.lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (model.units.pieces[0], *(f"{title}\n" for title in model.catalogue.titles))
    ]
    history = [*range(1, len(model.catalogue.titles))]
    fits = [n for n in history if header + sum(lines[-n:]) + max(lines[1:]) <= 150]
    assert 2 < len(fits) < len(history)
    names = np.array([f"i{item}" for item in range(len(model.catalogue.titles))])
    long, short = (
        Recommender(model.lm, model.catalogue, model.units, names, {}, window)
        for window in (50, len(fits))
    )
    titles = [model.catalogue.titles[item] for item in history]
    for k in (1, 5):
        pd.testing.assert_frame_equal(
            long.recommend(history=titles, k=k), short.recommend(history=titles, k=k)
        )
