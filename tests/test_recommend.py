"""Recommendations from a checkpoint, against the scores of the model that was trained."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data import create_dataset, data_preparation

from recbole_sdpo import quick_start, recommend
from recbole_sdpo.config import RunConfig
from recbole_sdpo.lm.backbone import restore_policy
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.recommend import Recommender


@pytest.fixture
def trained(ring):
    settings = ring | {"run_dir": "run", "sft_epochs": 4, "data_path": str(Path(ring["data_path"]).relative_to(Path.cwd()))}
    quick_start.run("SDPO-LLM", "toy", config_dict=settings)
    return settings


def events(settings):
    return pd.read_csv(Path(settings["data_path"]) / "toy" / "toy.inter", sep="\t", dtype=str)


@pytest.mark.parametrize("folder", ["run", "run/sdpo", "run/sft"])
def test_the_best_titles_are_those_of_the_trained_model(trained, folder):
    config = RunConfig("SDPO-LLM", "toy", config_dict=trained | {"run_dir": None, "eval_args": {"mode": "full"}})
    train, _, test = data_preparation(config, create_dataset(config))
    model = SDPOLLM(config, train._dataset)
    restore_policy(model.lm, Path("run/sft" if folder == "run/sft" else "run/sdpo"))
    # The test rows' histories lack the last item alone: give them as titles.
    rows = test._dataset.inter_feat[:5]
    scores = model.eval().full_sort_predict(rows).view(5, -1)
    recommender = Recommender.load(folder)
    for row in range(5):
        past = rows["item_id_list"][row][: int(rows["item_length"][row])].tolist()
        found = recommender.recommend(history=[model.catalogue.titles[item].upper() for item in past], k=4)
        best, items = scores[row].topk(4)
        np.testing.assert_allclose(found["score"], best, atol=1e-5)
        assert found["title"].tolist() == [model.catalogue.titles[item] for item in items]
        assert found["item"].tolist() == test._dataset.field2id_token["item_id"][items].tolist()


def test_a_users_history_is_all_that_the_data_hold_and_can_be_left_out(trained):
    recommender, seen = Recommender.load("run"), events(trained)
    items = pd.read_csv(Path(trained["data_path"]) / "toy" / "toy.item", sep="\t", index_col=0).iloc[:, 0]
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


def test_items_of_one_title_are_recommended_once(ring):
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text().replace("green cube", "red cube"))
    quick_start.run("SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20})
    found = Recommender.load("run").recommend("u5", k=23)
    assert found["title"].is_unique
    with pytest.raises(ValueError, match="k=24 is out of range; there are 23 titles"):
        Recommender.load("run").recommend("u5", k=24)


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_checkpoint_stands_alone_with_its_data(ring, tmp_path, peft, monkeypatch):
    """From another folder, with the data elsewhere, and an adapter over random weights too."""
    quick_start.run("SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "peft": peft, "max_train_targets": 50})
    here = Recommender.load("run").recommend("u1", k=3)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    shutil.copytree("run/sdpo", tmp_path / "far" / "checkpoint")
    monkeypatch.chdir(tmp_path / "far")
    with pytest.raises(ValueError, match="toy"):
        Recommender.load("checkpoint")
    pd.testing.assert_frame_equal(Recommender.load("checkpoint", data_path=tmp_path / "elsewhere").recommend("u1", k=3), here)


def test_what_cannot_be_recommended_is_an_error(trained):
    recommender = Recommender.load("run")
    for given, message in (
        ({"user": "u555"}, "user 'u555' is not in the data; the nearest are 'u55'"),
        ({"history": ["red cubes"]}, "title 'red cubes' is not in the catalogue; the nearest are 'red cube'"),
        ({"history": ["zzzzzzzz"]}, "title 'zzzzzzzz' is not in the catalogue, and nothing there is like it."),
        ({"history": "red cube"}, "Give either a user, or a history as a list of titles."),
        ({"user": "u1", "k": 2.0}, "k=2.0 is out of range"),
        ({"history": []}, "The history is empty; give one title or more."),
        ({}, "Give either a user, or a history as a list of titles."),
        ({"user": "u1", "k": 0}, "k=0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            recommender.recommend(**given)
    with pytest.raises(ValueError, match="checkpoint='nowhere' holds no data.json"):
        Recommender.load("nowhere")
    with pytest.raises(ValueError, match="device='tpu9' is none"):
        Recommender.load("run", device="tpu9")
    with pytest.raises(ValueError, match="cannot be loaded: .* If they have moved, give data_path"):
        Recommender.load("run", data_path="nowhere")


def test_options_of_the_program_around_it_are_not_ours(ring, monkeypatch):
    quick_start.run("SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "peft": "lora", "max_train_targets": 50})
    here = Recommender.load("run").recommend("u1", k=3)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--seed=5", "--MAX_ITEM_LIST_LENGTH=2", "--port=80"])
    pd.testing.assert_frame_equal(Recommender.load("run").recommend("u1", k=3), here)
    assert sys.argv[1] == "--seed=5"


def test_what_a_run_named_by_a_relative_path_may_be_gone(ring, tmp_path, monkeypatch):
    """A template file that was edited since, and the working folder of the training."""
    Path("mine.yaml").write_text("header: Seen\ncandidates: ['Seen {history} of {candidates}']\n")
    data = {"data_path": str(Path(ring["data_path"]).relative_to(Path.cwd()))}
    quick_start.run(
        "SDPO-LLM", "toy", config_dict=ring | data | {"run_dir": "run", "prompt_templates": "mine.yaml", "max_train_targets": 50}
    )
    here = Recommender.load("run").recommend("u1", k=3)
    Path("mine.yaml").write_text("header: Something else\ncandidates: ['Seen {history} of {candidates}']\n")
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    pd.testing.assert_frame_equal(Recommender.load(tmp_path / "run").recommend("u1", k=3), here)


def test_a_title_may_hold_a_semicolon(ring, monkeypatch, capsys):
    item_file = Path(ring["data_path"]) / "toy" / "toy.item"
    item_file.write_text(item_file.read_text().replace("red cube", "red cube; again"))
    quick_start.run("SDPO-LLM", "toy", config_dict=ring | {"run_dir": "run", "max_train_targets": 20})
    monkeypatch.setattr(sys, "argv", ["recommend", "--checkpoint", "run", "--history", "Red cube; again", "-k", "2", "--format", "json"])
    recommend.main()
    shown = [row["title"] for row in json.loads(capsys.readouterr().out)]
    assert shown == Recommender.load("run").recommend(history=["red cube; again"], k=2)["title"].tolist()


def test_prompts_that_need_candidates_are_refused(ring):
    quick_start.run(
        "SDPO-LLM",
        "toy",
        config_dict=ring | {"run_dir": "run", "prompt_style": "candidates", "prompt_candidates": 5, "max_train_targets": 20},
    )
    with pytest.raises(ValueError, match="was trained with prompt_style='candidates'"):
        Recommender.load("run")


def test_the_command_prints_a_table_or_json(trained, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["recommend", "--checkpoint", "run", *arguments])
        recommend.main()
        return capsys.readouterr().out

    listed = json.loads(call("--user", "u7", "-k", "3", "--format", "json"))
    assert [set(row) for row in listed] == [{"item", "title", "score"}] * 3
    shown = call("--history", "red cube; green cube", "-k", "2")
    assert shown == call("--history", "red cube", "--history", "green cube", "-k", "2")
    assert len(shown.splitlines()) == 4 and "title" in shown
    with pytest.raises(SystemExit, match="error: The history is empty"):
        call("--history", " ; ")


def test_nothing_is_drawn(trained):
    torch.manual_seed(1)
    first = Recommender.load("run").recommend("u1")
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(Recommender.load("run").recommend("u1"), first)
