import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import create_dataset

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import candidate_lists, json_rows
from recbole_sdpo.data.candidate_lists import (
    PHASES,
    KnownItems,
    KnownUsers,
    Numbers,
    read_lists,
)
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from tests.conftest import TINY, write_dataset

USERS, ITEMS = [f"u{n}" for n in range(6)], [f"i{n}" for n in range(12)]

ROWS = st.lists(
    st.tuples(
        st.sampled_from(USERS),
        st.sampled_from(PHASES),
        st.permutations(ITEMS).map(lambda items: items[:4]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda row: (row[0], row[1], row[2][row[3]]),
)


def write(file, rows, phases=True):
    """(user, phase, candidates, place of the target) in the format that the name says."""
    objects = [
        {"user": user, "target": items[place], "candidates": items}
        | ({"phase": phase} if phases else {})
        for user, phase, items, place in rows
    ]
    if file.suffix == ".json":
        file.write_text(json.dumps(objects, indent=1))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(each) + "\n" for each in objects))
    else:
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            number = len(rows[0][2])
            head = ["user", "target", *(f"candidate_{n + 1}" for n in range(number))]
            writer.writerow(head + ["phase"] * phases)
            for user, phase, items, place in rows:
                writer.writerow([user, items[place], *items] + [phase] * phases)
    return file


def toy(titles=None):
    """A dataset and its catalogue, as far as the reader looks at them."""
    dataset = SimpleNamespace(
        uid_field="user",
        iid_field="item",
        field2id_token={
            "user": np.array(["[PAD]", *USERS]),
            "item": np.array(["[PAD]", *ITEMS]),
        },
    )
    titles = titles or [f"title {n}" for n in range(12)]
    return KnownUsers(dataset), KnownItems(dataset, Catalogue(("", *titles), np.array([], int)))


@pytest.mark.parametrize("end", ["csv", "json", "jsonl"])
@given(rows=ROWS, at_once=st.integers(1, 5))
def test_every_format_gives_what_was_written_however_much_is_read_at_once(
    tmp_path_factory, end, rows, at_once
):
    file = write(tmp_path_factory.mktemp("d") / f"lists.{end}", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate_lists, "ROWS_AT_ONCE", at_once)
        patch.setattr(json_rows, "BLOCK", 7)
        lists = read_lists(file, *toy())
    read = [
        (USERS[user - 1], PHASES[phase], [ITEMS[item - 1] for item in items], items.index(target))
        for user, phase, items, target in zip(
            lists.user, lists.phase, lists.items.tolist(), lists.target, strict=True
        )
    ]
    assert read == rows
    for items, target, rest in zip(lists.items, lists.target, lists.negatives, strict=True):
        assert rest.tolist() == [item for item in items if item != target]


def test_without_phases_all_are_of_the_test_and_whole_numbers_are_ids(tmp_path):
    file = tmp_path / "lists.json"
    file.write_text('[{"user": 7, "target": 1, "candidates": [2, 1, "3"]}]')
    users, items = Numbers(), Numbers()
    lists = read_lists(file, users, items)
    assert len(lists.of("test")) == 1 and not len(lists.of("valid"))
    assert list(users.of) == ["7"] and list(items.of) == ["1", "2", "3"]
    assert lists.items.tolist() == [[1, 0, 2]] and lists.items.dtype == np.int32


def test_an_item_may_be_named_by_a_title_that_it_alone_has(tmp_path):
    titles = [f"title {n}" for n in range(12)]
    row = ("u1", "test", ["title 3", "i5", "i0"], 0)
    lists = read_lists(write(tmp_path / "a.csv", [row]), *toy(titles))
    assert lists.items.tolist() == [[4, 6, 1]] and lists.target.tolist() == [4]


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([["1", "2"], ["3", "4"]], None),  # ids alone; 3 is also a title
        ([["one", "two"], ["2012", "four"]], None),  # titles alone; 2012 is a title alone
        ([["one", "2"], ["four", "1"]], None),  # neither is in doubt
        ([["1", "2"], ["3", "one"]], "is the id of one item and the title of another"),
        ([["3", "2"], ["4", "one"]], "of another; give ids alone"),
        ([["one", "2"], ["3", "4"]], "'3' is the id of one item and the title of another"),
        ([["1", "2"], ["2012", "4"]], "'2012' is a title and no item's id; give ids alone"),
        (
            [["2012", "one"], ["1", "4"]],
            "'1' is an item's id, and '2012' before it is none|'2012' is a title and no",
        ),
        ([["2012", "3"], ["one", "four"]], "give ids alone"),
    ],
)
def test_a_text_in_doubt_is_read_alike_wherever_it_stands(tmp_path, texts, at_once, message):
    dataset = SimpleNamespace(
        uid_field="user",
        iid_field="item",
        field2id_token={"user": np.array(["[PAD]", "u"]), "item": np.array(["[PAD]", *"12345"])},
    )
    titles = ("", "one", "two", "2012", "four", "3")
    coders = Numbers(), KnownItems(dataset, Catalogue(titles, np.array([], int)))
    file = tmp_path / "lists.json"
    rows = [{"user": str(n), "target": row[0], "candidates": row} for n, row in enumerate(texts)]
    file.write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate_lists, "ROWS_AT_ONCE", at_once)
        if message:
            with pytest.raises(UserError, match=message):
                read_lists(file, *coders)
            return
        items = read_lists(file, *coders).items
    title = {name: item for item, name in enumerate(titles) if item}
    ids = all(text in "12345" for row in texts for text in row)
    expected = [[int(t) if ids or t in "12345" else title[t] for t in row] for row in texts]
    assert items.tolist() == expected


def test_a_number_is_a_title_where_no_id_is_one(tmp_path):
    titles = ["Heat", "2012", "Twin", "Twin", *(f"title {n}" for n in range(8))]
    rows = [("u1", "test", ["Heat", "i2", "2012"], 2), ("u2", "test", ["i3", "2012", "i0"], 0)]
    lists = read_lists(write(tmp_path / "a.csv", rows), *toy(titles))
    assert lists.items.tolist() == [[1, 3, 2], [4, 2, 1]]


def test_an_id_that_is_the_title_of_several_others_is_no_title(tmp_path):
    titles = ["Heat", "i3", "i3", *(f"title {n}" for n in range(9))]
    ids = [("u1", "test", ["i0", "i3", "i2"], 0)]
    assert read_lists(write(tmp_path / "a.csv", ids), *toy(titles)).items.tolist() == [[1, 4, 3]]
    mixed = [("u1", "test", ["Heat", "i3", "title 2"], 0)]
    with pytest.raises(UserError, match="'i3' is the id of one item and the title of another; giv"):
        read_lists(write(tmp_path / "b.csv", mixed), *toy(titles))


def test_lists_of_ids_need_no_title_that_one_item_alone_has(tmp_path):
    lists = read_lists(write(tmp_path / "a.csv", GOOD), *toy(["twin"] * 12))
    assert lists.items.tolist() == [[2, 3, 4], [5, 6, 7]]


GOOD = [("u1", "test", ["i1", "i2", "i3"], 0), ("u2", "test", ["i4", "i5", "i6"], 2)]


def broken(change, end="csv"):
    def make(folder):
        file = write(folder / f"lists.{end}", GOOD)
        file.write_text(change(file.read_text()))
        return file

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken(lambda text: text.replace("i6,i4", "i7,i4")), "row 2: the target 'i7' must be am"),
        (broken(lambda text: text.replace("i5,i6", "i6,i6")), "row 2: the target 'i6' is among "),
        (broken(lambda text: text.replace("i2,i3", "i3,i3")), "row 1: the item 'i3' is among the "),
        (broken(lambda text: text.replace("i5,i6", "title 4,i6")), "row 2: the item 'i4' is amo"),
        (broken(lambda text: text.replace("u2", "u9")), "row 2: user 'u9' must be a user's id"),
        (broken(lambda text: text.replace("i5", "i99")), "row 2: item 'i99' must be an item's id"),
        (broken(lambda text: text.replace("i5", "twin")), "row 2: 'twin' is the title of several"),
        (broken(lambda text: text.replace("i5", "")), "row 2: 2 candidates must be 3, as in the"),
        (broken(lambda text: text.replace("u2", " ")), "row 2: user, target and candidates must "),
        (broken(lambda text: text.replace("i5,", "")), "row 2: 5 fields must be 6, as in the he"),
        (broken(lambda text: text[:-5] + "tset\n"), "row 2: phase 'tset' must be one of train, v"),
        (broken(lambda text: text + "u1,i1,i1,i4,i5,test\n"), "row 3: row 1 has the same user and"),
        (broken(lambda text: text.replace("candidate_2", "item_2")), "column 'candidate_2' is mis"),
        (broken(lambda text: text.replace("phase", "place")), "column 'place' is unknown or ther"),
        (broken(lambda text: text.replace("phase", "phase,phase", 1)), "column 'phase' is unkno"),
        (broken(lambda text: text.replace("user,", "target,")), "column 'user' is missing; the h"),
        (broken(lambda text: text.partition("\n")[0]), "is empty; it must have a row for each"),
        (broken(lambda text: ""), "is empty; it must have a row for each"),
        (broken(lambda text: text + '"'), "line 4 is not CSV: unexpected end of data"),
        (broken(lambda text: "", "json"), "is empty; it must have a row for each"),
        (broken(lambda text: "[]", "json"), "is empty; it must have a row for each"),
        (broken(lambda text: text[:-9], "json"), "row 2 is not JSON (Unterminated string"),
        (broken(lambda text: text[1:-1], "json"), "row 2 is not JSON (Expecting value); the file"),
        (broken(lambda text: text.replace('"u2"', "null"), "json"), "row 2: user, target and can"),
        (broken(lambda text: "[1]", "json"), "row 1: 1 must be an object"),
        (broken(lambda text: text.replace("target", "goal"), "json"), "row 1 has no key 'target'"),
        (broken(lambda text: text.replace('"i1"', "true"), "json"), "row 1: user, target and can"),
        (broken(lambda text: '[{"itemList": []}]', "json"), "row 1 is of a file without users, as"),
        (broken(lambda text: text + "{", "jsonl"), "row 3 is not JSON (Expecting property name"),
        (
            broken(
                lambda text: text.replace("[", '"').replace("]", '"').replace('", "', ""), "jsonl"
            ),
            "row 1 is not JSON",
        ),
        (lambda folder: folder, "must be a file of candidate lists: .csv, .json or .jsonl"),
        (lambda folder: folder / "no.csv", "no.csv cannot be read: there is no such file"),
    ],
)
def test_a_fault_is_one_sentence_with_file_and_row(tmp_path, make, message):
    titles = [f"title {n}" for n in range(10)] + ["twin", "twin"]
    with pytest.raises(UserError) as error:
        read_lists(make(tmp_path), *toy(titles))
    said = str(error.value)
    assert message in said and str(tmp_path) in said
    assert "\n" not in said and said.endswith(".")


def test_a_title_may_be_as_the_file_writes_it_where_it_is_one_items_alone(tmp_path):
    path = write_dataset(tmp_path, [[1, 2, 3, 4]], None)
    (path / "toy" / "toy.item").write_text(
        "item_id:token\tname:token_seq\tyear:token\ni1\tGodfather,  The\t1972\n"
        "i2\tThing, The\t1951\ni3\tThing, The\t1982\ni4\t\t\n"
    )
    dataset = create_dataset(
        RunConfig("GRU4Rec", "toy", config_dict=TINY | {"data_path": str(path)})
    )
    items = KnownItems(dataset, Catalogue.from_dataset(dataset, ["name", "year"]))
    names = {
        "Godfather, The": "i1",
        "the godfather (1972)": "i1",
        "Godfather, The (1972)": "i1",
        "The Thing (1951)": "i2",
        "Thing, The (1982)": "i3",
        "item i4": "i4",
        "Thing, The": None,
        "The Thing": None,
        "": None,
    }
    read = items(np.array(list(names), object))
    tokens = dataset.field2id_token["item_id"]
    assert [tokens[item] if item > 0 else None for item in read] == list(names.values())
    assert items.fault("Thing, The").startswith("'Thing, The' is the title of several items")
    assert "such as 'The Godfather (1972)'" in items.fault("The Thing")


@pytest.mark.parametrize("title", ["B3", "b3"])
def test_a_text_that_is_one_items_id_and_anothers_title_is_no_title(tmp_path, title):
    """Such as the film 187: in a file of ids it is an id, beside titles it is refused."""
    path = write_dataset(tmp_path, [[1, 2, 3, 4]], {1: "One", 2: title, 3: "Three", 4: "Four"})
    for file in (path / "toy").iterdir():
        file.write_text(re.sub(r"(^|\t)i(?=\d)", r"\1B", file.read_text(), flags=re.M))
    config = RunConfig("GRU4Rec", "toy", config_dict=TINY | {"data_path": str(path)})
    dataset = create_dataset(config)
    catalogue = Catalogue.from_dataset(dataset, ["title"])
    tokens = dataset.field2id_token["item_id"]
    ids = KnownItems(dataset, catalogue)(np.array(["B3", "B1"], object))
    assert tokens[ids].tolist() == ["B3", "B1"]
    items = KnownItems(dataset, catalogue)
    read = items(np.array(["B3", "One"], object))
    assert read[0] < 1 and tokens[read[1]] == "B1"
    assert "the id of one item and the title of another" in items.fault("B3")
