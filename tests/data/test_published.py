"""Published rows become RecBole's, each with its own history, target and candidates."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from recbole.data import data_preparation

from recbole_sdpo.command import program
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import json_rows
from recbole_sdpo.data.candidate_lists import Numbers, read_lists
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.data.prompts import history_windows
from recbole_sdpo.data.published import write_published
from recbole_sdpo.data.sequences import histories, training_sequences
from recbole_sdpo.errors import UserError
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.quick_start import run
from recbole_sdpo.values import read_yaml
from tests.conftest import TINY

PHASES = ("train", "valid", "test")


def row(history, candidates, target):
    return {"historyList": history, "itemList": candidates, "trueSelection": target}


GOOD = row("P::Q", ["C", "D", "E"], "D")


def write(folder, train=(GOOD,), valid=(GOOD,), test=(GOOD,), name="lists"):
    paths = []
    for phase, rows in zip(PHASES, (train, valid, test), strict=True):
        paths.append(folder / f"{phase}.json")
        text = rows if isinstance(rows, str) else json.dumps(rows)
        paths[-1].write_text(text, encoding="utf-8")
    return write_published(*paths, name, folder / "data")


def read(folder, phase="test"):
    """What the written files say, in titles: by user the history, the candidates, the target."""
    folder = folder / "data" / "lists"
    _, *items = (folder / "lists.item").read_text(encoding="utf-8").splitlines()
    title = dict(line.split("\t") for line in items)
    assert len(set(title.values())) == len(title)
    lists = {}
    for line in (folder / "candidates.jsonl").read_text().splitlines():
        one = json.loads(line)
        lists[one["user"]] = one
    asked = {}
    for line in (folder / f"lists.{phase}.inter").read_text().splitlines()[1:]:
        user, history, target = line.split("\t")
        candidates = []
        if user in lists:
            assert (lists[user]["target"], lists[user]["phase"]) == (target, phase)
            candidates = [title[item] for item in lists[user]["candidates"]]
        asked[user] = row([title[item] for item in history.split(" ")], candidates, title[target])
    return asked


TITLES = ["Tyler, The Creator", "Re::Zero", "a: b", "12", "NA", "東京", "x|y", "it's", "B", "C"]


@st.composite
def published(draw):
    candidates = draw(st.permutations(TITLES))[: draw(st.integers(2, 6))]
    return row(
        draw(st.lists(st.sampled_from(TITLES), min_size=1, max_size=10)),
        candidates,
        draw(st.sampled_from(candidates)),
    )


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    st.lists(st.tuples(published(), st.booleans(), st.booleans()), min_size=1, max_size=4)
)
def test_every_row_keeps_its_history_candidates_and_target(drawn):
    size = len(drawn[0][0]["itemList"])
    drawn = [one for one in drawn if len(one[0]["itemList"]) == size]
    rows = [
        row("::".join(r["historyList"]) if joined else r["historyList"] + [""] * padded,
            r["itemList"], r["trueSelection"])
        for r, joined, padded in drawn
    ]  # fmt: skip
    # that each title stands alone somewhere tells where Re::Zero is one title
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder, [row(["B"], TITLES, "C")], "\n".join(map(json.dumps, rows)), rows)
        for phase in ("valid", "test"):
            assert read(folder, phase) == {
                f"{phase}-{number}": asked for number, (asked, *_) in enumerate(drawn, 1)
            }


@pytest.mark.parametrize(
    ("known", "text", "titles"),
    [
        (["A::B"], "A::B::C", ["A::B", "C"]),
        (["A::B", "B"], "X::A::B", ["X", "A::B"]),
        (["A::B", "A", "B"], "A::B", None),
        (["A::B", "B::C"], "A::B::C", None),
        (["A ::  B"], "A::B::C", ["A :: B", "C"]),
        ([], "A::::B::", ["A", "B"]),
        (["C::"], "A::C::", ["A", "C::"]),
    ],
)
def test_a_title_that_holds_the_separator_is_known_by_lists_or_the_row_is_named(
    tmp_path, known, text, titles
):
    lists = ["one", "two", *known]
    same = row(["Z"], ["one", "two", "Z"], "Z")
    said = write(
        tmp_path, [row(["Z"], lists, "two")], test=[row(text, ["one", "two", "Z"], "Z"), same]
    )
    if titles is None:
        assert list(read(tmp_path)) == ["test-2"]
        assert "test.json, row 1: historyList holds " in said
        assert "which may be one title or several; left out (1 row)" in said
    else:
        history = read(tmp_path)["test-1"]["historyList"]
        assert [title.replace(" :: ", "::") for title in history] == [
            title.replace(" :: ", "::") for title in titles
        ]


def test_titles_that_stand_nowhere_alone_are_counted(tmp_path):
    said = write(tmp_path, test=[row("A::Kirby::B", ["C", "D", "E"], "D")], valid=[row(["A", "B"], ["C", "D", "E"], "D")])  # fmt: skip  # noqa: E501
    assert "3 titles stand nowhere alone, only in texts cut at ::" in said
    assert said.splitlines()[1].endswith("none is a part of one: 'P', 'Q', 'Kirby'")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("A", ["C", "E"], "D"), "trueSelection 'D' is not in itemList"),
        (row("A", ["D", "E", "D"], "D"), "trueSelection 'D' is 2 times in itemList"),
        (row("A", ["C", "D", "C"], "D"), "itemList has 'C' twice"),
        (row("A", ["D"], "D"), "itemList has 'D' alone"),
        (row("A", ["C", "D"], "D"), "itemList has 2 titles, and most of the test have 3"),
        (row("::", ["C", "D", "E"], "D"), "historyList has no title"),
        (row("A", ["C", "D", "E"], " "), "trueSelection has no title"),
    ],
)
def test_rows_that_cannot_be_used_are_named_and_counted(tmp_path, bad, why):
    rows = [GOOD, bad, GOOD, bad]
    said = write(tmp_path, train=rows, test=rows)
    assert list(read(tmp_path)) == ["test-1", "test-3"]
    assert f"{tmp_path / 'test.json'}, row 2: {why}; left out, like 4 (2 rows)" in said
    assert "2 for the test" in said
    # what is wrong with a list alone is no reason not to train on its history and target
    train = read(tmp_path, "train")
    if "itemList" in why:
        assert "trained on, but without its list, like 4 (2 rows)" in said
        assert train["train-2"] == row(["A"], [], "D")
    else:
        assert list(train) == ["train-1", "train-3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it must hold a row or more"),
        ("[]", "is empty; it must hold a row or more"),
        (
            "[" + ", ".join([json.dumps(GOOD)] * 2),
            r"test.json, row 3 is not JSON \(the list does not end\)",
        ),
        (json.dumps(GOOD) + "\nx", "test.json, row 2 is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "test.json, row 1 must be an object with the keys historyList, itemList, true"),
        ('{"a": 1}', "row 1 has no 'historyList'; it must have historyList, .*, not a"),
        (json.dumps([GOOD, GOOD | {"itemList": [1, 2]}]), "row 2: 'itemList' must be a list of"),
        (json.dumps([GOOD | {"historyList": None}]), "row 1: 'historyList' must be a list of"),
        (json.dumps([GOOD | {"trueSelection": ["D"]}]), "row 1: 'trueSelection' must be a title"),
        (json.dumps([row("\ud800", ["C", "D"], "D")]), "half of a character, which no file can"),
        (
            json.dumps([row("A", ["C", "E"], "D")]),
            "'D' is not in itemList; left out .*; no row of this file can be used",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as raised:
        write(tmp_path, test=content)
    assert not (tmp_path / "data" / "lists").exists() and "\n" not in str(raised.value)


def test_memory_does_not_grow_with_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK", 10_000)
    peaks = []
    for number in (200, 1000):
        bad = GOOD | {"itemList": ["C", "D", "C"]}
        rows = [bad if n % 2 else GOOD for n in range(number)]
        files = [tmp_path / f"{number}-{phase}.json" for phase in PHASES]
        for file in files:
            file.write_text(json.dumps(rows))
        tracemalloc.start()
        said = write_published(*files, str(number), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert f"({number // 2:,} rows)" in said and "like 4, 6, 8, 10, 12, 14, 16, 18" in said
    assert peaks[1] < 1.5 * peaks[0]


def test_a_pipe_which_cannot_be_read_again_is_refused(tmp_path):
    pipes = [tmp_path / f"{phase}.pipe" for phase in PHASES]
    for pipe in pipes:
        os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe must be a file, not a pipe, for it is read again"):
        write_published(*pipes, "x", tmp_path)


def test_a_file_is_of_one_phase(tmp_path):
    write(tmp_path)
    train, valid = tmp_path / "train.json", tmp_path / "valid.json"
    with pytest.raises(UserError, match="lists_test=.*' is the file of lists_train; each"):
        write_published(train, valid, tmp_path / "." / "train.json", "x", tmp_path)


def test_an_audit_reads_the_lists_that_an_import_makes(tmp_path, monkeypatch, capsys):
    others = [f"Re::{n}" for n in range(9)]  # of which an audit would make two titles each
    rows = [
        row("A::B", "::".join(["C", title, "D"]) if n % 2 else ["C", title, "D"], title)
        for n, title in enumerate(others)
    ]
    broken = [
        *rows,
        row("A", ["A", "B", "E"], "B"),
        row("A", ["C", "E"], "D"),
        row("A", ["C", "D"], "D"),
    ]
    said = write(tmp_path, broken, broken, broken)
    lists = read_lists(tmp_path / "data" / "lists" / "candidates.jsonl", Numbers(), Numbers())
    options = [str(tmp_path / "test.json"), *(f"--{p}={tmp_path / p}.json" for p in PHASES[:2])]
    monkeypatch.setattr("sys.argv", ["recbole-sdpo", "audit", *options])
    program.main()
    out = capsys.readouterr().out
    assert said.splitlines()[1:-1] == out.splitlines()[:6]  # the same rows are left out
    number = len(lists.of("valid")) + len(lists.of("train"))
    assert f"{len(lists.of('test'))} lists of 3 candidates; guessers learned from {number}" in out
    assert len(lists.of("test")) == 10 and number == 20 and "| popularity" in out


def test_nothing_is_overwritten_and_names_are_checked(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="lists exists already; delete it"):
        write(tmp_path)
    with pytest.raises(UserError, match="name='../x' must be of letters"):
        write(tmp_path, name="../x")
    with pytest.raises(UserError, match="none.json cannot be read: there is no such file"):
        write_published("none.json", "some.json", "more.json", "x", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--events is missing; give events and items (or --lists_train, --lists_valid and"),
        (["--events=e.csv"], "--items is missing; give events and items"),
        (["--lists_train=a"], "--lists_valid is missing; give lists_train and lists_valid and"),
        (
            ["--lists_train=a", "--lists_valid=a", "--lists_test=a", "--title=t"],
            "--title is for CSV files; leave it out with --lists_train.",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["recbole-sdpo", "import", "--name=x", *options])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert message in f"{ended.value} {capsys.readouterr().err}"


UNMET = "Stranger, The"
"""A candidate of all rows that stands in no history."""


def persons(first, number, longest=4):
    """Rows of persons, each with every event asked for after at most ``longest`` others."""
    rows = []
    for person in range(first, first + number):
        items = [f"title {(3 * person + step) % 30}" for step in range(8)]
        for place in range(2, 8):
            others = [f"title {(3 * person + 11 + n) % 30}" for n in range(2)] + [UNMET]
            shown = items[max(0, place - longest) : place]
            candidates = [*others[:1], items[place], *others[1:]]
            joined = "::".join(shown) if person % 2 else shown
            rows.append(row(joined, candidates, items[place]))
    return rows


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """The three files, and the settings that came with the data made of them."""
    monkeypatch.chdir(tmp_path)
    parts = dict(zip(PHASES, (persons(0, 9), persons(9, 3), persons(12, 4)), strict=True))
    for phase, rows in parts.items():
        Path(f"{phase}.json").write_text(json.dumps(rows))
    options = [f"--lists_{phase}={phase}.json" for phase in PHASES]
    monkeypatch.setattr("sys.argv", ["recbole-sdpo", "import", "--name=lists", *options])
    program.main()
    monkeypatch.setattr("sys.argv", ["pytest"])
    tiny = {key: value for key, value in TINY.items() if key != "MAX_ITEM_LIST_LENGTH"}
    return parts, tiny | read_yaml(Path("data/lists/lists.yaml"))


def plain(phase, rows):
    """What the JSON says: by user the history and the target."""
    split = [r["historyList"] for r in rows]
    split = [text.split("::") if isinstance(text, str) else text for text in split]
    return {
        f"{phase}-{number}": (shown, r["trueSelection"])
        for number, (shown, r) in enumerate(zip(split, rows, strict=True), 1)
    }


def prepared(model, settings):
    config = RunConfig(model, "lists", config_dict=settings)
    dataset = create_dataset(config)
    titles = Catalogue.from_dataset(dataset, ["title"], settings["title_article_first"]).titles
    parts = [loader._dataset for loader in data_preparation(config, dataset)]
    return config, np.array(titles), dataset.field2id_token["user_id"], parts


@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec"])
def test_sequential_models_meet_the_rows_of_the_files(lists, model):
    given, settings = lists
    config, titles, users, parts = prepared(model, settings)
    assert UNMET in titles  # as it is written, and an item to rank
    for phase, part in zip(PHASES, parts, strict=True):
        rows = part.inter_feat
        met = {
            users[user]: (titles[past].tolist(), titles[target])
            for user, past, target in zip(
                rows["user_id"], histories(rows, config), rows["item_id"], strict=True
            )
        }
        assert met == plain(phase, given[phase])


@pytest.mark.parametrize("targets", ["all", "last"])
def test_each_row_of_training_is_one_prompt_with_its_history(lists, targets):
    given, settings = lists
    config, titles, users, parts = prepared("SDPO-LLM", settings | {"train_targets": targets})
    model = SDPOLLM(config, parts[0])
    prompts = history_windows(training_sequences(parts[0]), model.window, len(titles))
    asked = {}
    for tree, before, target, user in zip(
        prompts.tree, prompts.before, prompts.target, prompts.user, strict=True
    ):
        header, *shown = prompts.trunks[tree][:before]
        assert header == len(titles) and users[user] not in asked
        asked[users[user]] = (titles[shown].tolist(), titles[target])
    assert asked == plain("train", given["train"])
    assert model.targets_per_epoch(parts[0]) == len(given["train"])


def test_models_of_each_kind_run_on_the_same_rows(lists):
    given, settings = lists
    digests, expected = [], plain("test", given["test"])
    for model in ("Pop", "BPR", "SASRec", "SDPO-LLM"):
        more = {"epochs": 1, "sft_epochs": 1, "sdpo_epochs": 0, "run_dir": f"saved/{model}"}
        result = run(model, "lists", config_dict=settings | more, saved=False)
        digests.append(result["candidates_sha256"])
        ranks = pd.read_csv(f"saved/{model}/ranks.csv", dtype=str).query("stage != 'sdpo'")
        items = pd.read_csv("data/lists/lists.item", sep="\t", dtype=str)
        title = items.set_index("item_id:token")["title:token_seq"]
        asked = dict(zip(ranks["user"], title[ranks["item"]], strict=True))
        assert asked == {user: target for user, (_, target) in expected.items()}
        # popularity is that of the rows of training, whatever the model learns besides
        train = [{*shown, target} for shown, target in plain("train", given["train"]).values()]
        assert [int(met) for met in ranks["met"]] == [
            sum(asked[user] in row for row in train) for user in ranks["user"]
        ]
    assert digests == digests[:1] * 4


def test_a_sequential_model_with_a_vector_for_each_user_is_refused(lists):
    settings = lists[1]
    with pytest.raises(UserError, match=r"model='Caser' learns a vector for each user \(user_em"):
        run("Caser", "lists", config_dict=settings | {"epochs": 1}, saved=False)
    with pytest.raises(UserError, match=r"'FPMC' learns a vector .*, such as SASRec or GRU4Rec"):
        run("FPMC", "lists", config_dict=settings | {"epochs": 1}, saved=False)
