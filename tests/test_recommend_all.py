"""The best titles of all users in one file, against those of each user alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_sdpo import quick_start, recommend, recommend_all
from recbole_sdpo.command import program
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.ranking import score_all
from recbole_sdpo.recommend import Recommender
from tests.conftest import write_dataset
from tests.faults.checkpoints import evil_texts

COMMAND = ["recbole-sdpo", "recommend", "--checkpoint", "run", "--users"]


@pytest.fixture
def recommender(ring, tmp_path, monkeypatch):
    """Of users with histories of several lengths, some with titles that are hard to write."""
    rows = [[(user + step) % 20 for step in range(4 + user % 9)] for user in range(40)]
    titles = dict(enumerate([*evil_texts(tmp_path / "x"), "NA", '"a, b"', "1e5", "null", "=1+1"]))
    titles |= {item: f"title {item}" for item in range(len(titles), 20)}
    path = write_dataset(tmp_path / "hard", rows, titles)
    settings = ring | {"data_path": str(path), "objective": "sft", "run_dir": "run"}
    quick_start.run("SDPO-LLM", "toy", config_dict=settings | {"eval_args": {"mode": "uni3"}})
    monkeypatch.setattr(recommend_all, "USERS", 7)
    return Recommender.load("run")


def alone(recommender, **options):
    """Each user alone, by the tree of what is allowed."""
    rows = []
    for user in recommender.users:
        best = recommender.recommend(user, **options)
        rows.append(best.assign(user=user, rank=range(1, len(best) + 1)))
    return pd.concat(rows, ignore_index=True)[["user", "rank", "item", "title", "score"]]


def read(file):
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    text = {"user": str, "item": str, "title": str}
    return pd.read_csv(file, dtype=text, keep_default_na=False)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_all_users_have_what_each_has_alone(recommender, ending, exclude_history):
    file, users = Path(f"best{ending}"), list(recommender.users)
    recommend_all.recommend_all(recommender, file, users, 5, exclude_history)
    written = read(file)
    expected = alone(recommender, k=5, exclude_history=exclude_history)
    pd.testing.assert_frame_equal(written, expected, check_dtype=False, atol=1e-5)
    assert sorted(path.name for path in Path().glob("best*")) == [file.name]
    if exclude_history:
        for user, item in zip(written["user"], written["item"], strict=True):
            assert item not in recommender.item_tokens[recommender.users[user]]


def test_what_is_left_out_leaves_the_best_of_the_others(recommender, monkeypatch):
    """Also where the search knows no more than a bound of all but the best that it was asked
    for."""
    expected = alone(recommender, k=5, exclude_history=True)

    def as_little_as_allowed(lm, prompts, tree, k):
        scores = score_all(lm, prompts, tree)
        best = scores.topk(k)
        bounds = best.values[:, -1:] - 1e-3 - 1e-6 * torch.arange(len(tree))
        return bounds.scatter(1, best.indices, best.values)

    monkeypatch.setattr(recommend, "score_top", as_little_as_allowed)
    written = recommender.recommend_to_users(list(recommender.users), 5, True)
    pd.testing.assert_frame_equal(written, expected, check_dtype=False, atol=1e-5)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_was_interrupted_goes_on(recommender, ending, monkeypatch):
    users = list(recommender.users)
    recommend_all.recommend_all(recommender, Path(f"whole{ending}"), users, 3)
    ask, asked = Recommender.recommend_to_users, []

    def interrupted(self, some, *args):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(some)
        return ask(self, some, *args)

    monkeypatch.setattr(Recommender, "recommend_to_users", interrupted)
    file = Path(f"best{ending}")
    with pytest.raises(KeyboardInterrupt) as stop:
        recommend_all.recommend_all(recommender, file, users, 3)
    assert "the same command goes on" in stop.value.__notes__[0] and not file.exists()
    with pytest.raises(UserError, match=r"parts of another call .*other k\)"):
        recommend_all.recommend_all(recommender, file, users, 4)
    asked[:] = asked[:1]
    with pytest.raises(KeyboardInterrupt):
        recommend_all.recommend_all(recommender, file, users, 3)
    monkeypatch.setattr(Recommender, "recommend_to_users", ask)
    recommend_all.recommend_all(recommender, file, users, 3)
    pd.testing.assert_frame_equal(read(file), read(Path(f"whole{ending}")))
    assert asked == [users[:7], users[14:21]]


def test_processes_share_the_users(recommender, monkeypatch):
    users = list(recommender.users)
    recommend_all.recommend_all(recommender, Path("whole.csv"), users, 3)
    ask, asked = Recommender.recommend_to_users, []
    monkeypatch.setattr(
        Recommender,
        "recommend_to_users",
        lambda self, some, *args: asked.extend(some) or ask(self, some, *args),
    )
    for process in (1, 2, 0):
        assert not Path("best.csv").exists()
        recommend_all.recommend_all(recommender, Path("best.csv"), users, 3, share=(process, 3))
    assert asked == [
        *users[7:14],
        *users[28:35],
        *users[14:21],
        *users[35:],
        *users[:7],
        *users[21:28],
    ]
    recommend_all.recommend_all(recommender, Path("best.csv"), users, 3, share=(1, 3))  # late
    assert Path("best.csv").read_text() == Path("whole.csv").read_text()
    assert not list(Path().glob("*.parts"))


@pytest.mark.parametrize("late", [1, 7])  # has a part, which is there already; has none
def test_a_late_process_leaves_alone_what_the_first_joins(recommender, monkeypatch, late):
    users, file, write = list(recommender.users), Path("best.csv"), recommend_all.recommend_all
    identity = recommend_all._identity
    for process in range(1, 6):
        write(recommender, file, users, 3, share=(process, 8))

    def joined_meanwhile(*args):  # where the late one would be at its slowest
        monkeypatch.setattr(recommend_all, "_identity", identity)
        write(recommender, file, users, 3, share=(0, 8))
        return identity(*args)

    monkeypatch.setattr(recommend_all, "_identity", joined_meanwhile)
    write(recommender, file, users, 3, share=(late, 8))
    monkeypatch.setattr(recommend_all, "_identity", identity)
    assert not file.exists()  # it had nothing to do there
    write(recommender, file, users, 3, share=(0, 8))
    assert len(read(file)) == 3 * len(users)
    assert not list(Path().glob("*.parts"))


def test_ids_may_be_numbers_and_are_no_text(recommender, ring):
    for users in ("12", "u1"):
        with pytest.raises(UserError, match=f"users='{users}' must be a list of users' ids"):
            recommender.recommend_to_users(users)
        with pytest.raises(UserError, match=f"users='{users}' must be a list of users' ids"):
            recommend_all.recommend_all(recommender, "best.csv", users)
    recommender.users |= {"12": recommender.users["u1"]}
    recommend_all.recommend_all(recommender, "best.csv", [12], 3)
    assert read(Path("best.csv"))["user"].tolist() == ["12"] * 3
    for title in (1, None):
        with pytest.raises(UserError, match=f"title {title} of the history must be a text"):
            recommender.recommend(history=[title])


def test_two_processes_of_a_launch_write_one_file(recommender):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["-m", "recbole_sdpo", *COMMAND[1:], "all", "-k", "3", "--output", "best.csv"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    pd.testing.assert_frame_equal(
        read(Path("best.csv")), alone(recommender, k=3), check_dtype=False, atol=1e-5
    )
    assert ended.stdout.strip() == "40 users, 3 titles each: best.csv"


def test_a_file_names_the_users(recommender, monkeypatch, capsys):
    Path("who").write_text("u7\n\n u3 \n")
    monkeypatch.setattr(sys, "argv", [*COMMAND, "who", "-k", "2", "--output", "best.csv"])
    program.main()
    assert capsys.readouterr().out == "2 users, 2 titles each: best.csv\n"
    assert read(Path("best.csv"))["user"].tolist() == ["u7", "u7", "u3", "u3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all"], "--users and --output go together"),
        (["all", "--output", "best.txt"], "must end in .csv or .parquet"),
        (["all", "--output", "there.csv"], "exists; remove it"),
        (["all", "--output", "nowhere/best.csv"], "its folder must exist"),
        (["all", "--output", "best.csv", "--format", "json"], "--format=json is for one user"),
        (["nobody", "--output", "best.csv"], "must be all, or a file"),
        (["twice", "--output", "best.csv"], "has 'u3' more than once"),
        (["stranger", "--output", "best.csv"], "user 'u99' is not in the data"),
        (["marked", "--output", "best.csv"], "user 'u99' is not in the data"),
        (["binary", "--output", "best.csv"], "--users='binary' must be text in UTF-8"),
        (["empty", "--output", "best.csv"], "no users"),
        (["all", "--output", "best.csv", "-k", "21"], "from 1 to 20"),
        (["all", "--output", "best.csv", "-k", "9", "--exclude_history"], "from 1 to 8"),
    ],
)
def test_what_cannot_be_written_is_an_error(recommender, monkeypatch, capsys, words, message):
    for name, text in {"there.csv": "", "twice": "u3\nu3", "stranger": "u99", "empty": ""}.items():
        Path(name).write_text(text)
    Path("marked").write_text("u3\nu99", encoding="utf-8-sig")
    Path("binary").write_bytes(b"\xff")
    monkeypatch.setattr(sys, "argv", [*COMMAND, *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert message in str(end.value.code) and not Path("best.csv").exists()


def test_who_waits_for_parts_that_are_gone_is_told(recommender):
    """Two equal calls at once, of which the other was the first."""
    with pytest.raises(UserError, match=r"best.csv.parts is gone: another call has written"):
        recommend_all._join([Path("best.csv.parts", "0.csv")], Path("best.csv"))
    assert not Path("best.csv").exists()


def test_what_another_call_has_written_meanwhile_is_not_overwritten(recommender, monkeypatch):
    ask = Recommender.recommend_to_users

    def slowly(self, *args):
        Path("best.csv").write_text("of the other")
        return ask(self, *args)

    monkeypatch.setattr(Recommender, "recommend_to_users", slowly)
    with pytest.raises(UserError, match="output='best.csv' exists"):
        recommend_all.recommend_all(recommender, Path("best.csv"), ["u1"], np.int64(3))
    assert Path("best.csv").read_text() == "of the other"


def test_one_user_who_has_met_much_is_named(recommender):
    users = list(recommender.users)
    met = {user: len(set(items)) for user, items in recommender.users.items()}
    heavy, k = max(met, key=met.get), len(recommender._first)
    with pytest.raises(
        UserError, match=f"from 1 to {k - met[heavy]}, .* recommend to user '{heavy}'"
    ):
        recommend_all.recommend_all(recommender, Path("best.csv"), users, k, exclude_history=True)


def test_a_damaged_record_is_another_call(recommender):
    folder = Path("best.csv.parts")
    folder.mkdir()
    (folder / "what.json").write_text(json.dumps({"k": 3}))
    with pytest.raises(UserError, match="remove it"):
        recommend_all.recommend_all(recommender, Path("best.csv"), ["u1"], 3)


def test_parts_that_are_somebody_elses_are_left_alone(recommender):
    folder = Path("best.csv.parts")
    folder.mkdir()
    (folder / "00000.csv").write_text("user,rank,item,title,score\nu0,1,i1,junk,0\n")
    with pytest.raises(UserError, match="best.csv.parts holds 00000.csv, and no what.json"):
        recommend_all.recommend_all(recommender, "best.csv", list(recommender.users), 3)
    (folder / "00000.csv").unlink()
    recommend_all.recommend_all(recommender, "best.csv", list(recommender.users), 3)
    assert not folder.exists()


def test_what_a_killed_call_was_writing_goes(recommender):
    folder, users = Path("best.csv.parts"), list(recommender.users)
    folder.mkdir()
    (folder / "00001.csv.4242.part").write_text("half of it")
    with pytest.raises(UserError, match="and no what.json"):
        recommend_all.recommend_all(recommender, "best.csv", users, 3)
    (folder / "00001.csv.4242.part").rename(folder / "what.json.4242.part")
    recommend_all.recommend_all(recommender, "best.csv", users, 3)
    assert not folder.exists()


def test_what_a_user_put_among_the_parts_stays(recommender, monkeypatch):
    write = recommender.recommend_to_users

    def beside(*args):
        Path("best.csv.parts", "notes.txt").write_text("mine")
        return write(*args)

    monkeypatch.setattr(recommender, "recommend_to_users", beside)
    recommend_all.recommend_all(recommender, "best.csv", list(recommender.users), 3)
    assert [path.name for path in Path("best.csv.parts").iterdir()] == ["notes.txt"]


def test_a_call_whose_parts_another_has_joined_says_so(recommender, monkeypatch):
    write = recommender.recommend_to_users

    def gone(*args):
        shutil.rmtree("best.csv.parts")
        return write(*args)

    monkeypatch.setattr(recommender, "recommend_to_users", gone)
    with pytest.raises(UserError, match="best.csv.parts is gone: another call has written"):
        recommend_all.recommend_all(recommender, "best.csv", list(recommender.users), 3)
