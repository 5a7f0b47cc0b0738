import sys

import pandas as pd
import pytest
from recbole.data import create_dataset

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data import atomic
from recbole_sdpo.data.atomic import write_atomic
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.errors import UserError
from tests.conftest import TINY

TITLES = {
    "a": "A\ttab, a\r\nbreak and   blanks\u2028",
    "b": '"Quoted" to the end',
    "c": 'A 12" record',
    "d": "NA",
    "e": "Übermut, 東京 – «é»",
    "f": "",
    "g": "nul\0l",
    "h": '"',
}
CLEAN = TITLES | {
    "a": "A tab, a break and blanks",
    "b": "'Quoted' to the end",
    "f": "item f",
    "g": "nul l",
    "h": "'",
}
ITEMS = pd.DataFrame({"item_id": TITLES.keys(), "title": TITLES.values()})


def events(*rows):
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


SOME = events(("u", "a", 1), ("u", "b", 2))


def through_recbole(folder, *fields):
    """Titles by item token, and each user's items in RecBole's order."""
    config = RunConfig("GRU4Rec", "shop", config_dict=TINY | {"data_path": str(folder)})
    dataset = create_dataset(config)
    titles = Catalogue.from_dataset(dataset, fields or ["title"]).titles
    users, items = (dataset.field2id_token[field] for field in (dataset.uid_field, dataset.iid_field))
    dataset._change_feat_format()  # sorts by time
    rows, sequences = dataset.inter_feat, {}
    for user, history, length, target in zip(
        rows["user_id"].tolist(), rows["item_id_list"].tolist(), rows["item_length"].tolist(), rows["item_id"].tolist(), strict=True
    ):
        sequences[users[user]] = [items[item] for item in [*history[:length], target]]
    return dict(zip(items[1:], titles[1:], strict=True)), sequences


@pytest.mark.parametrize("as_csv", [True, False])
def test_recbole_reads_the_same_events_and_titles(tmp_path, as_csv):
    # A second apart in 2024: RecBole's float32 takes them all for one instant.
    start = 1_706_700_000
    given = events(*((user, item, start + "hgfedcba".index(item)) for item in "badcfehg" for user in ("u 1", 'v"2', "東")))
    tables = [given, ITEMS]
    if as_csv:
        for number, end in enumerate(("events", "items")):
            path = tmp_path / f"{end}.csv"
            tables[number].to_csv(path, index=False, encoding="utf-8-sig")
            tables[number] = path
    write_atomic(*tables, name="shop", output=tmp_path / "data")
    titles, sequences = through_recbole(tmp_path / "data")
    assert titles == CLEAN | ({"g": "nul"} if as_csv else {})  # where pandas reads a CSV, a cell ends at a null character
    assert sequences == {user: list("hgfedcba") for user in ("u 1", 'v"2', "東")}


def test_a_tab_or_quote_cannot_shift_what_recbole_itself_reads_of_the_items(tmp_path):
    write_atomic(events(*(("u", item, 1) for item in TITLES)), ITEMS, "shop", tmp_path)
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
    dataset = create_dataset(RunConfig("GRU4Rec", "shop", config_dict=TINY | {"data_path": str(tmp_path), "load_col": load}))
    words = dataset.field2id_token["title"]
    read = {dataset.id2token("item_id", row.item_id): " ".join(words[row.title]) for row in dataset.item_feat.iloc[1:].itertuples()}
    assert read == CLEAN | {"f": ""}


@pytest.mark.parametrize(
    "times, seconds",
    [
        ((3, 1.5), ["1.5", "3.0"]),
        (("1e3", "-2"), ["-2.0", "1000.0"]),
        (("1970-01-02", "1970-01-01 00:00:01.5"), ["1.5", "86400.0"]),
        (("1970-01-01T02:00:00+02:00", "1970-01-01T00:00:01Z"), ["0.0", "1.0"]),
        (("13/01/1970", "02/01/1970"), ["86400.0", "1036800.0"]),
        (("Jan 02 1970 01:00", "Jan 01 1970 01:00"), ["3600.0", "90000.0"]),
        ((pd.Timestamp("1970-01-01 00:01"), pd.Timestamp(0)), ["0.0", "60.0"]),
    ],
)
def test_times_become_seconds_in_order(tmp_path, times, seconds):
    write_atomic(events(*(("u", "a", time) for time in times)), ITEMS, "shop", tmp_path)
    rows = (tmp_path / "shop" / "shop.inter").read_text().splitlines()
    assert rows == ["user_id:token\titem_id:token\ttimestamp:float", *(f"u\ta\t{time}" for time in seconds)]


def test_columns_may_have_other_names_and_titles_several_parts(tmp_path):
    given = SOME.set_axis(["who", "what", "when"], axis=1)
    items = pd.DataFrame({"sku": ["a", "b"], "name": ["Alien", "Brazil"], "release year": [1979, ""], "shelf": [1, 2]})
    write_atomic(given, items, "shop", tmp_path, "who", "what", "when", ["name", "release year"], "sku")
    head = (tmp_path / "shop" / "shop.item").read_text().splitlines()[0]
    assert head == "item_id:token\ttitle:token_seq\trelease year:token_seq"
    assert through_recbole(tmp_path, "title", "release year")[0] == {"a": "Alien (1979)", "b": "Brazil"}


def test_the_report_counts_what_a_user_should_know(tmp_path):
    given = events(("u", "a", "2024-01-31 10:00"), ("u", "f", "2023-12-01"), ("v", "zzz", "2024-01-30"), ("w", "zzz", "2024-01-30"))
    twice = pd.concat([ITEMS, ITEMS.head(2).assign(title="later")])
    assert write_atomic(given, twice, "shop", tmp_path) == (
        f"{tmp_path / 'shop'}: 4 events of 3 users and 3 items from 2023-12-01 to 2024-01-31; 8 items in the items file, "
        "1 without a title; 2 events of items that are not in it; 2 further rows of the same items left out"
    )
    assert "later" not in (tmp_path / "shop" / "shop.item").read_text()


def test_dates_of_which_pandas_guesses_each_by_itself_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="Could not infer format"):
        write_atomic(events(("u", "a", "02/01/24"), ("u", "b", "31/01/24")), ITEMS, "shop", tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"name": "../shop"}, r"name='../shop': valid are letters"),
        ({"name": "ml-100k"}, "ml-100k is the data that comes with RecBole"),
        ({"user": "userid"}, r"^events has no column 'userid'; did you mean 'user_id'\? Valid are user_id, item_id, timestamp.$"),
        ({"titles": "zzz"}, "^items has no column 'zzz'; valid are item_id, title.$"),
        ({"titles": ["zzz"]}, "^items has no column 'zzz'; valid are item_id, title.$"),
        ({"titles": ["title", "item_id"]}, "each needs a name of its own"),
        ({"titles": ["title", "a:b"]}, "each needs a name of its own, without ':'"),
        ({"events": SOME.head(0)}, "^events has no rows"),
        ({"items": ITEMS.head(0)}, "^items has no rows"),
        ({"events": events(("u", "a", 1), (" ", "b", 2))}, r"^events, row 3 \(the header is row 1\), column 'user_id': '' is no id"),
        ({"events": events(("u", "a", 1), ("u", None, 2))}, "row 3 .* column 'item_id': '' is no id"),
        ({"events": events(("NA", "a", 1))}, "row 2 .* column 'user_id': 'NA' is no id; valid is any text but NA"),
        ({"events": events(("u", '"a', 1))}, "row 2 .* column 'item_id': '\"a' is no id"),
        ({"items": pd.concat([ITEMS, ITEMS.head(1).assign(item_id="null")])}, "^items, row 10 .* column 'item_id': 'null' is no id"),
        ({"events": events(("u", "a", 1), ("u", "b", 2), ("u", "c", "soon"))}, "row 4 .* column 'timestamp': 'soon' is no time; valid are"),
        ({"events": events(("u", "a", "2024-01-31"), ("u", "b", "2024-02-30"), ("u", "b", "2024-02-03"))}, "row 3 .* '2024-02-30' is no"),
        ({"events": events(("u", "a", "02/01/2024"), ("u", "b", "31/01/2024"), ("u", "b", "03/01/2024"))}, "row 3 .* '31/01/2024' is no"),
        ({"events": events(("u", "a", 1), ("u", "b", float("inf")), ("u", "b", 3))}, "row 3 .* 'inf' is no time"),
        ({"events": events(("u", "a", 1), ("u", "b", None), ("u", "b", 3))}, "row 3 .* '' is no time"),
    ],
)
def test_errors_name_what_is_wrong_and_what_would_be_right(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        write_atomic(**{"events": SOME, "items": ITEMS, "name": "shop", "output": tmp_path / "data"} | changed)
    assert not (tmp_path / "data").exists()


MISSING = "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"  # for pandas


@pytest.mark.parametrize("value", MISSING.split("|"))
def test_no_id_is_accepted_that_recbole_would_take_for_missing(tmp_path, value):
    with pytest.raises(ValueError, match="is no id"):
        write_atomic(events((value, "a", 1)), ITEMS, "shop", tmp_path)


def test_nothing_is_overwritten(tmp_path):
    write_atomic(SOME, ITEMS, "shop", tmp_path)
    before = (tmp_path / "shop" / "shop.inter").read_text()
    with pytest.raises(UserError, match=r"shop.inter exists already; delete it, or choose another name"):
        write_atomic(SOME.head(1), ITEMS, "shop", tmp_path)
    assert (tmp_path / "shop" / "shop.inter").read_text() == before


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "events.csv cannot be read: .*No such file.*; it must be a CSV file in UTF-8 with a header"),
        (b"", "events.csv cannot be read: No columns"),
        (b"user_id,item_id,timestamp\n", "events.csv has no rows"),
        (b"user_id;item_id;timestamp\nu;a;1\n", "events.csv has no column 'user_id'; valid are user_id;item_id;timestamp"),
        (b"user_id,item_id,timestamp\nu,a,1\nu,a,1,2\n", "events.csv cannot be read: .*line 3"),
        (b"user_id,item_id,timestamp\nu,a,1,2\n", "events.csv cannot be read: its rows have more values than its header has names"),
        (b"user_id,item_id,timestamp\nu,\xff,1\n", "events.csv cannot be read: 'utf-8' codec"),
        (b"user_id,item_id,timestamp\nu,a\n", "events.csv, row 2 .* column 'timestamp': '' is no time"),
    ],
)
def test_a_file_that_is_no_csv_is_named(tmp_path, content, message):
    path = tmp_path / "events.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_atomic(path, ITEMS, "shop", tmp_path)


def test_the_command_writes_and_reports_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    SOME.set_axis(["who", "item_id", "when"], axis=1).to_csv("events.csv", index=False)
    ITEMS.assign(year=1979).to_csv("items.csv", index=False)
    options = "--events events.csv --items items.csv --name shop --user who --time when --title title --title year"
    monkeypatch.setattr(sys, "argv", ["atomic", *options.split()])
    atomic.main()
    assert capsys.readouterr().out.startswith("data/shop: 2 events of 1 users and 2 items from 1 to 2; 8 items in the items file, 1")
    assert "a\tA tab, a break and blanks\t1979\n" in (tmp_path / "data" / "shop" / "shop.item").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="^error: .*shop.inter exists already"):
        atomic.main()
