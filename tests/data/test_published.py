"""Published rows become RecBole's, each with its own history, target and candidates."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_sdpo.command import program
from recbole_sdpo.data.published import write_published
from recbole_sdpo.errors import UserError

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


@settings(max_examples=25)
@given(st.lists(st.tuples(published(), st.booleans(), st.booleans()), min_size=1, max_size=4))
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
    said = write(tmp_path, [row(["Z"], lists, "two")], test=[row(text, ["one", "Z"], "Z"), same])
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
    said = write(tmp_path, test=[row("A::Kirby::B", ["C", "D"], "D")], valid=[row(["A", "B"], ["C", "D"], "D")])  # fmt: skip  # noqa: E501
    assert "3 titles stand nowhere alone, only in texts cut at ::" in said
    assert said.splitlines()[1].endswith("none is a part of one: 'P', 'Q', 'Kirby'")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("A", ["C", "E"], "D"), "trueSelection 'D' is not in itemList"),
        (row("A", ["D", "E", "D"], "D"), "trueSelection 'D' is 2 times in itemList"),
        (row("A", ["C", "D", "C"], "D"), "itemList has 'C' twice"),
        (row("A", ["D"], "D"), "itemList has 'D' alone"),
        (row("A", ["C", "D"], "D"), "itemList has 2 titles, and 3 in most rows"),
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
        ("[1, 2", r"test.json is not JSON \(.*\); it must be a list of rows, or a row on each"),
        (json.dumps(GOOD) + "\nx", r"test.json, line 2, is not JSON"),
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


def test_nothing_is_overwritten_and_names_are_checked(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="lists exists already; delete it"):
        write(tmp_path)
    with pytest.raises(UserError, match="name='../x' must be of letters"):
        write(tmp_path, name="../x")
    with pytest.raises(UserError, match="none.json cannot be read: there is no such file"):
        write_published("none.json", "none.json", "none.json", "x", tmp_path)


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
