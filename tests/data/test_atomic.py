import gzip
import re
import sys
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.data import create_dataset

from recbole_sdpo.command import program
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.atomic import write_atomic
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.json_rows import json_rows
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


@pytest.fixture(autouse=True)
def _strict():
    """A warning that no test expects fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def events(*rows):
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


SOME = events(("u", "a", 1), ("u", "b", 2))


def through_recbole(folder, *fields):
    """Titles by item token, and each user's items in RecBole's order."""
    config = RunConfig("GRU4Rec", "shop", config_dict=TINY | {"data_path": str(folder)})
    dataset = create_dataset(config)
    titles = Catalogue.from_dataset(dataset, fields or ["title"]).titles
    users, items = (
        dataset.field2id_token[field] for field in (dataset.uid_field, dataset.iid_field)
    )
    dataset._change_feat_format()  # sorts by time
    rows, sequences = dataset.inter_feat, {}
    for user, history, length, target in zip(
        rows["user_id"].tolist(),
        rows["item_id_list"].tolist(),
        rows["item_length"].tolist(),
        rows["item_id"].tolist(),
        strict=True,
    ):
        sequences[users[user]] = [items[item] for item in [*history[:length], target]]
    return dict(zip(items[1:], titles[1:], strict=True)), sequences


def write_csv(
    table: pd.DataFrame, path: Path, separator: str = ",", encoding: str = "utf-8"
) -> None:
    """As pandas does, but a null character, too, which Python 3.10 cannot write."""
    text = (
        table.replace("\0", "\ue000", regex=True)
        .to_csv(index=False, sep=separator)
        .replace("\ue000", "\0")
    )
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as stream:
        stream.write(text.encode(encoding))


@pytest.mark.parametrize("as_csv", [True, False])
def test_recbole_reads_the_same_events_and_titles(tmp_path, as_csv):
    # A second apart in 2024: RecBole's float32 takes them all for one instant.
    start = 1_706_700_000
    given = events(
        *(
            (user, item, start + "hgfedcba".index(item))
            for item in "badcfehg"
            for user in ("u 1", 'v"2', "東")
        )
    )
    tables = [given, ITEMS]
    if as_csv:
        for number, end in enumerate(("events", "items")):
            path = tmp_path / f"{end}.csv"
            write_csv(tables[number], path, encoding="utf-8-sig")
            tables[number] = path
    write_atomic(*tables, name="shop", output=tmp_path / "data")
    titles, sequences = through_recbole(tmp_path / "data")
    assert titles == CLEAN
    assert sequences == {user: list("hgfedcba") for user in ("u 1", 'v"2', "東")}


def test_a_tab_or_quote_cannot_shift_what_recbole_itself_reads_of_the_items(tmp_path):
    write_atomic(events(*(("u", item, 1) for item in TITLES)), ITEMS, "shop", tmp_path)
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
    dataset = create_dataset(
        RunConfig(
            "GRU4Rec", "shop", config_dict=TINY | {"data_path": str(tmp_path), "load_col": load}
        )
    )
    words = dataset.field2id_token["title"]
    read = {
        dataset.id2token("item_id", row.item_id): " ".join(words[row.title])
        for row in dataset.item_feat.iloc[1:].itertuples()
    }
    assert read == CLEAN | {"f": ""}


@pytest.mark.parametrize(
    "times, seconds",
    [
        ((3, 1.5), ["1.5", "3.0"]),
        (("1e3", "-2"), ["-2.0", "1000.0"]),
        (("1970-01-03", "1970-01-02 00:00:01.5"), ["86401.5", "172800.0"]),
        (("1970-01-02T02:00:00+02:00", "1970-01-02T00:00:01Z"), ["86400.0", "86401.0"]),
        (("13/01/1970", "02/01/1970"), ["86400.0", "1036800.0"]),
        (("Jan 03 1970 01:00", "Jan 02 1970 01:00"), ["90000.0", "176400.0"]),
        ((pd.Timestamp("1970-01-02 00:01"), pd.Timestamp("1970-01-02")), ["86400.0", "86460.0"]),
        (("2/1/1970 3:04:05 PM", "13/1/1970 1:00:00 AM"), ["140645.0", "1040400.0"]),
        (("1970-01-02 3:04 PM", "1970-01-02 11:04 AM"), ["126240.0", "140640.0"]),
        (("1970/01/02 3:04 PM", "1970/01/02 11:04 AM"), ["126240.0", "140640.0"]),
    ],
)
def test_times_become_seconds_in_order(tmp_path, times, seconds):
    write_atomic(events(*(("u", "a", time) for time in times)), ITEMS, "shop", tmp_path)
    rows = (tmp_path / "shop" / "shop.inter").read_text().splitlines()
    assert rows == [
        "user_id:token\titem_id:token\ttimestamp:float",
        *(f"u\ta\t{time}" for time in seconds),
    ]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("2024-01-02T03:04:05.123456788Z", "2024-01-02T03:04:05.123456789Z"),
        ("1234567890123456789.25", "1234567890123456789.5"),
        ("123456789012345678901", "123456789012345678902"),
    ],
)
def test_times_that_are_one_number_of_64_bits_keep_their_order(tmp_path, earlier, later):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are long past 2100
        write_atomic(events(("u", "b", later), ("u", "a", earlier)), ITEMS, "shop", tmp_path)
    _, *rows = (tmp_path / "shop" / "shop.inter").read_text().splitlines()
    (_, first, time), (_, second, same) = (row.split("\t") for row in rows)
    assert (first, second) == ("a", "b") and float(time) == float(same)


def test_a_time_that_stands_for_never_is_told_as_a_number(tmp_path):
    """It is beyond the dates that pandas knows, or may be."""
    given = events(("u", "a", "1577836800.5"), ("u", "b", "99999999999"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = str(write_atomic(given, ITEMS, "shop", tmp_path))
    assert "2020-01-01" in told and "1e+11" in told


def test_columns_may_have_other_names_and_titles_several_parts(tmp_path):
    given = SOME.set_axis(["who", "what", "when"], axis=1)
    items = pd.DataFrame(
        {
            "sku": ["a", "b"],
            "name": ["Alien", "Brazil"],
            "release year": [1979, ""],
            "shelf": [1, 2],
        }
    )
    write_atomic(
        given, items, "shop", tmp_path, "who", "what", "when", ["name", "release year"], "sku"
    )
    head = (tmp_path / "shop" / "shop.item").read_text().splitlines()[0]
    assert head == "item_id:token\ttitle:token_seq\trelease year:token_seq"
    assert through_recbole(tmp_path, "title", "release year")[0] == {
        "a": "Alien (1979)",
        "b": "Brazil",
    }


def test_the_report_counts_what_a_user_should_know(tmp_path):
    given = events(
        ("u", "a", "2024-01-31 10:00"),
        ("u", "f", "2023-12-01"),
        ("v", "zzz", "2024-01-30"),
        ("w", "zzz", "2024-01-30"),
    )
    twice = pd.concat([ITEMS, ITEMS.head(2).assign(title="later")])
    assert write_atomic(given, twice, "shop", tmp_path) == (
        f"{tmp_path / 'shop'}: 4 events of 3 users and 3 items from 2023-12-01 to 2024-01-31; 8 "
        "items in the items file, "
        "1 without a title; 2 events of items that are not in it; 2 further rows of the same "
        "items left out"
    )
    assert "later" not in (tmp_path / "shop" / "shop.item").read_text()


@pytest.mark.parametrize(
    "times, row",
    [
        ((1_700_000_000, 0, 1_700_000_001), 3),
        ((1_700_000_000, 1_700_000_001, 5e9), 4),
        ((-1.0, 1_700_000_000_000, 1_700_000_000_001), 2),
        (("2024-01-31", "9999-12-31"), None),  # pandas 2 has no such date
        (("1900-01-01", "2024-01-31"), 2),
        ((0, 1, 5000), None),  # a count
    ],
)
def test_times_that_may_stand_for_none_are_warned_of(tmp_path, times, row):
    given = events(*(("u", "a", time) for time in times))
    if "9999-12-31" in times:
        with pytest.raises(UserError, match="'9999-12-31' is no time"):
            write_atomic(given, ITEMS, "shop", tmp_path)
    elif row is None:
        # pytest makes warnings errors: see the fixture below
        write_atomic(given, ITEMS, "shop", tmp_path)
    else:
        with pytest.warns(
            UserWarning,
            match=f"^events, row {row}, .* 0 further times are not between 1970-01-02 and 2100",
        ) as warned:
            write_atomic(given, ITEMS, "shop", tmp_path)
        assert warned[0].filename == __file__  # the line that called


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"name": "../shop"}, r"name='../shop' must be of letters"),
        ({"name": "ml-100k"}, "ml-100k is the data that comes with RecBole"),
        (
            {"user": "userid"},
            r"^user='userid' must be a column of events, which has user_id, item_id, timestamp; "
            r"did you mean 'user_id'\?$",
        ),
        *(
            (
                {"titles": titles},
                "^title='zzz' must be a column of items, which has item_id, title; name one of "
                "them.$",
            )
            for titles in ("zzz", ["zzz"])
        ),
        (
            {"item_key": "titel"},
            r"^item_key='titel' must be a column of items, .*; did you mean 'title'\?$",
        ),
        ({"titles": ["title", "item_id"]}, "each needs a name of its own"),
        ({"titles": ["title", "a:b"]}, "each needs a name of its own, without ':'"),
        ({"events": SOME.head(0)}, "^events has no rows"),
        ({"items": ITEMS.head(0)}, "^items has no rows"),
        (
            {"events": events(("u", "a", 1), (" ", "b", 2))},
            r"^events, row 3 \(the header is row 1, .*\), column 'user_id': '' is no id",
        ),
        (
            {"events": events(("u", "a", 1), ("u", None, 2))},
            "row 3 .* column 'item_id': '' is no id",
        ),
        (
            {"events": events(("NA", "a", 1))},
            "row 2 .* column 'user_id': 'NA' is no id; it must be text other than NA",
        ),
        ({"events": events(("u", '"a', 1))}, "row 2 .* column 'item_id': '\"a' is no id"),
        ({"events": events(("u", "[PAD]", 1))}, r"row 2 .* column 'item_id': '\[PAD\]' is no id"),
        (
            {"items": pd.concat([ITEMS, ITEMS.head(1).assign(item_id="null")])},
            "^items, row 10 .* column 'item_id': 'null' is no id",
        ),
        (
            {"events": events(("u", "a", 1), ("u", "b", 2), ("u", "c", "2024-01-31 18:05:00"))},
            "row 4 .* column 'timestamp': '2024-01-31 18:05:00' is no time",
        ),
        (
            {"events": events(("u", "a", 1), ("u", "b", 2), ("u", "c", "soon"))},
            "row 4 .* column 'timestamp': 'soon' is no time; it must be a number, or a date",
        ),
        (
            {
                "events": events(
                    ("u", "a", "2024-01-31"), ("u", "b", "2024-02-30"), ("u", "b", "2024-02-03")
                )
            },
            "row 3 .* '2024-02-30' is no",
        ),
        (
            {
                "events": events(
                    ("u", "a", "02/01/2024"), ("u", "b", "31/13/2024"), ("u", "b", "03/01/2024")
                )
            },
            "row 3 .* '31/13/2024' is no",
        ),
        (
            {"events": events(("u", "a", "01/01/2024"), ("u", "b", "02/01/2024"))},
            "row 3 .* '02/01/2024' may have the day or the month first",
        ),
        # pandas guesses each
        (
            {"events": events(("u", "a", "02/01/24"), ("u", "b", "31/01/24"))},
            "row 2 .* '02/01/24' is no time",
        ),
        (
            {"events": events(("u", "a", "18:05"), ("u", "b", "9:30 pm"))},
            "row 2 .* '18:05' has no date; it must be one",
        ),
        (
            {"events": events(("u", "a", "2024-01-31"), ("u", "b", "Today"))},
            "row 3 .* 'Today' has no date",
        ),
        *(
            (
                {"events": events(("u", "a", utc), ("u", "b", zoned))},
                "row 3 .* names a time zone; write the hours from UTC, as in",
            )
            for utc, zoned in (
                ("2024-01-31 18:05 UTC", "2024-01-31 18:05:00 PST"),
                ("2024-01-31 18:05 UTC", "2024-01-31 18:05:00PST"),
                ("2024-01-31 06:05 PM GMT", "2024-01-31 06:05 PM CET"),
                ("Wed Jan 31 18:05:00 GMT 2024", "Wed Jan 31 18:05:00 PST 2024"),
            )
        ),
        (
            {
                "events": events(
                    ("u", "a", 1_700_000_000), ("u", "b", 5), ("u", "b", 1_600_000_000_000)
                )
            },
            "row 2 .* '1700000000' looks like seconds, and '1600000000000' in row 4 like "
            "milliseconds; all must be of one unit",
        ),
        (
            {"events": events(("u", "a", 1e18), ("u", "b", 1e15))},
            "row 3 .* looks like microseconds, and .* in row 2 like nanoseconds",
        ),
        (
            {
                "events": events(
                    ("u", "a", "2024-01-31"),
                    ("u", "b", "2024-01-31 18:05"),
                    ("u", "b", "2024-01-31T18:05+02:00"),
                )
            },
            r"row 4 .* has a time zone, and '2024-01-31 18:05' in row 3 has none",
        ),
        (
            {"events": SOME.assign(user_id=[True, False])},
            "^events, row 2 .* column 'user_id': True must be a text, a number or a date",
        ),
        (
            {"events": SOME.assign(user_id=[["u"], "v"])},
            r"row 2 .* column 'user_id': \['u'\] must be a text",
        ),
        (
            {"events": SOME.assign(timestamp=pd.to_timedelta([1, 2]))},
            "row 2 .* column 'timestamp': Timedelta.* must be a text",
        ),
        ({"events": SOME.assign(user_id=[1.0, None])}, "row 3 .* column 'user_id': '' is no id"),
        (
            {"events": SOME.assign(user_id=[1, 2.0**53])},
            "row 3 .* is a number without its last digits; ids must be text or whole",
        ),
        (
            {"events": SOME.assign(user_id=["1.23E+12", "u"])},
            "row 2 .* '1.23E\\+12' is a number without its last digits",
        ),
        (
            {"items": ITEMS.assign(title="half \ud83c")},
            r"^items, row 2 .* column 'title': 'half \\ud83c' holds half of a character",
        ),
        ({"events": SOME.assign(user_id="\udc00")}, "^events, row 2 .* holds half of a character"),
        (
            {"events": pd.concat([SOME, SOME[["user_id"]]], axis=1)},
            "^events has 2 columns 'user_id'; each must have a name of its own",
        ),
        (
            {"events": SOME.set_index("user_id")},
            r"^user='user_id' must be a column of events, .*; it is in the index, so call "
            r"reset_index\(\) first",
        ),
        (
            {"events": SOME.set_axis(pd.MultiIndex.from_product([["a"], SOME]), axis=1)},
            "^user='user_id' must be a column of events",
        ),
        (
            {"events": [1, 2]},
            "^events is a list; it must be a pandas.DataFrame or the path of a CSV file",
        ),
        ({"titles": []}, "each needs a name of its own"),
        ({"separator": ";;", "events": Path("e.csv")}, "separator=';;' must be one character"),
        ({"name": "a/b"}, "name='a/b' must be of letters"),
        ({"name": None}, "name=None must be of letters"),
        (
            {"events": events(("u", "a", 1), ("u", "b", float("inf")), ("u", "b", 3))},
            "row 3 .* 'inf' is no time",
        ),
        (
            {"events": events(("u", "a", 1), ("u", "b", None), ("u", "b", 3))},
            "row 3 .* '' is no time",
        ),
    ],
)
def test_errors_name_what_is_wrong_and_what_would_be_right(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        write_atomic(
            **{"events": SOME, "items": ITEMS, "name": "shop", "output": tmp_path / "data"}
            | changed
        )
    assert not (tmp_path / "data").exists()


# for pandas
MISSING = (
    "#N/A|#N/A "
    "N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
)


@pytest.mark.parametrize("value", MISSING.split("|"))
def test_no_id_is_accepted_that_recbole_would_take_for_missing(tmp_path, value):
    with pytest.raises(ValueError, match="is no id"):
        write_atomic(events((value, "a", 1)), ITEMS, "shop", tmp_path)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_quote_that_is_a_letter_swallows_no_rows(tmp_path, separator):
    text = '1,"Heroes\n2,Brazil\n3,"Low\n4,"Heroes" (Live)\n5,7" Single\n'.replace(",", separator)
    (tmp_path / "items.csv").write_text(f"item_id{separator}title\n{text}")
    tables = events(("u", "1", 1), ("u", "2", 2)), tmp_path / "items.csv"
    if separator == ",":
        with pytest.raises(UserError, match="a quote in line 2 or below opens a field, and ano"):
            write_atomic(*tables, "shop", tmp_path)
        return
    write_atomic(*tables, "shop", tmp_path)
    titles = (tmp_path / "shop" / "shop.item").read_text().splitlines()[1:]
    assert titles == ["1\t'Heroes", "2\tBrazil", "3\t'Low", "4\t'Heroes' (Live)", '5\t7" Single']


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # R's write.table
        ('"item_id"\t"title"\n"1"\t"Toy Story"\n"2"\t"He said \\"hi\\" twice"\n', True),
        ('item_id\ttitle\n1\tToy Story\n2\t"He said\nhi\ttwice"\n', False),
        # MySQL
        ('item_id,title,text\n1,Toy Story,"a, b\nc"\n2,"He said \\"hi\\" twice",x\n', True),
        (
            'item_id,title,text\n1,Toy Story,"a, b\nc"\n2,"He said ""hi"" twice","'
            + 140_000 * "x"
            + '"\n',
            True,
        ),
    ],
)
def test_a_file_that_is_quoted_is_read_as_such(tmp_path, text, said):
    (tmp_path / "items.csv").write_text(text)
    write_atomic(events(("u", "1", 1), ("u", "2", 2)), tmp_path / "items.csv", "shop", tmp_path)
    _, first, second = (tmp_path / "shop" / "shop.item").read_text().splitlines()
    assert first == "1\tToy Story"
    assert second.replace('"', "") == "2\tHe said hi twice" and second.count('"') == 2 * said


@pytest.mark.parametrize(
    ("rows", "titles"),
    [
        (
            '1,"The \\"Best\\" one"\n2,"C:\\\\"\n3,"AC\\\\DC"\n',
            ['The "Best" one', "C:\\", "AC\\DC"],
        ),
        ('1,"a \\"b\\" , c"\n2,x\n3,y\n', ['a "b" , c', "x", "y"]),
        ('1,"Toy Story" \n2, Heat\n3,"a ""b""" \n', ["Toy Story", "Heat", 'a "b"']),
        (
            '1\t"Best" Movie\n2\tfoo\u2028bar\n3\tx\x85y\x0cz\n',
            ["'Best' Movie", "foo bar", "x y z"],
        ),
        ('1\t"Toy Story"\n2\t"He said \\"hi\\""\n3\tx\n', ["Toy Story", 'He said "hi"', "x"]),
    ],
)
def test_quotes_as_others_write_them(tmp_path, rows, titles):
    separator = "\t" if "\t" in rows else ","
    (tmp_path / "items.csv").write_text(f"item_id{separator}title\n{rows}", encoding="utf-8")
    seen = events(("u", "1", 1), ("u", "2", 2), ("u", "3", 3))
    write_atomic(seen, tmp_path / "items.csv", "shop", tmp_path)
    lines = (tmp_path / "shop" / "shop.item").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == [f"{number}\t{title}" for number, title in enumerate(titles, 1)]


@pytest.mark.parametrize("title", ['"The "Best" Movie"', '"12" Vinyl"', '"Heroes'])
def test_a_quote_that_would_be_lost_is_refused(tmp_path, title):
    (tmp_path / "items.csv").write_text(f"item_id,title\n1,Brazil\n2,{title}\n")
    with pytest.raises(UserError, match="a quote in line 3 or below opens a field"):
        write_atomic(events(("u", "1", 1), ("u", "2", 2)), tmp_path / "items.csv", "x", tmp_path)


def test_a_quote_far_away_swallows_no_rows(tmp_path):
    rows = [f"{n},title {n} {20 * 'x'}" for n in range(9_000)]
    rows[10], rows[8_000] = '10,"Heroes', '8000,"Low'
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *rows]))
    with pytest.raises(UserError, match="a quote in line 12 or below opens a field"):
        write_atomic(events(("u", "1", 1), ("u", "2", 2)), tmp_path / "items.csv", "x", tmp_path)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_quoted_field_may_hold_the_separator_and_lines(tmp_path, separator):
    table = pd.DataFrame({"item_id": ["1", "2"], "title": [f'A "{separator}\nb', "B"]})
    write_csv(table, tmp_path / "items.csv", separator)
    write_atomic(events(("u", "1", 1), ("u", "2", 2)), tmp_path / "items.csv", "shop", tmp_path)
    comma = separator.strip()
    assert f'1\tA "{comma} b\n' in (tmp_path / "shop" / "shop.item").read_text()


def test_nothing_beside_a_dataset_is_touched(tmp_path):
    for name in ("shop.old", "shop.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    write_atomic(SOME, ITEMS, "shop", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"shop", "shop.old", "shop.part"}
    assert all((tmp_path / f"shop.{end}" / "notes.txt").is_file() for end in ("old", "part"))


def test_nothing_is_overwritten(tmp_path):
    write_atomic(SOME, ITEMS, "shop", tmp_path)
    before = (tmp_path / "shop" / "shop.inter").read_text()
    with pytest.raises(
        UserError, match=r"shop.inter exists already; delete it, or choose another name"
    ):
        write_atomic(SOME.head(1), ITEMS, "shop", tmp_path)
    assert (tmp_path / "shop" / "shop.inter").read_text() == before


@pytest.mark.parametrize(
    "content, message",
    [
        (
            None,
            "^events='.*events.csv' cannot be read: there is no such file; it must be a CSV file "
            "in UTF-8 with a header.$",
        ),
        (b"", "events.csv' cannot be read: No columns"),
        (b"user_id,item_id,timestamp\n", "events.csv has no rows"),
        (
            b"user_id;item_id;time\nu;a;1\n",
            "^time='timestamp' must be a column of .*events.csv, which has user_id, item_id, time; "
            "did you mean 'time'",
        ),
        (
            b"user_id item_id timestamp\nu a 1\n",
            "which has user_id item_id timestamp \\(with separator=','; give the file's\\);",
        ),
        (b"user_id,item_id,timestamp\nu,a,1\nu,a,1,2\n", "events.csv' cannot be read: .*line 3"),
        (
            b"user_id,item_id,timestamp\nu,a,1,2\n",
            "events.csv' cannot be read: its rows have more values than its header has names",
        ),
        (
            b"user_id,item_id,timestamp\nu,\xff,1\n",
            "events.csv' cannot be read: line 2 is not in utf-8; encoding must be that of the "
            "file, such as cp1252",
        ),
        (b"x" * 200_000, "events.csv' cannot be read: field larger than field limit"),
        (
            b"user_id,item_id,timestamp\nu,a\n",
            "events.csv, row 2 .* column 'timestamp': '' is no time",
        ),
    ],
)
def test_a_file_that_is_no_csv_is_named(tmp_path, content, message):
    path = tmp_path / "events.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_atomic(path, ITEMS, "shop", tmp_path)


@pytest.mark.parametrize("end", ["gz", "bz2", "xz", "zip", "tar", "zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_named(tmp_path, monkeypatch, end):
    """Nor is one that nothing here unpacks."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / f"events.csv.{end}"
    path.write_text("user_id,item_id,timestamp\nu,a,1\n")
    with pytest.raises(UserError, match="^events='.*' cannot be read") as of_table:
        write_atomic(path, ITEMS, "shop", tmp_path)
    with pytest.raises(UserError, match=f"events.csv.{end} cannot be read") as of_rows:
        list(json_rows(path))
    assert "\n" not in f"{of_table.value}{of_rows.value}"


def test_the_command_writes_and_reports_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    write_csv(SOME.set_axis(["who", "item_id", "when"], axis=1), tmp_path / "events.csv")
    write_csv(ITEMS.assign(year=1979), tmp_path / "items.csv")
    options = (
        "--events events.csv --items items.csv --name shop --user who --time when --title title "
        "--title year --output=~/data"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["recbole-sdpo", "import", *options.split()])
    program.main()
    assert capsys.readouterr().out.startswith(
        f"{tmp_path}/data/shop: 2 events of 1 users and 2 items from 1 to 2; "
        "8 items in the items file, 1"
    )
    assert "a\tA tab, a break and blanks\t1979\n" in (
        tmp_path / "data" / "shop" / "shop.item"
    ).read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="^error: .*shop.inter exists already"):
        program.main()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-32"])
@pytest.mark.parametrize("end", ["csv", "csv.gz"])
def test_files_of_other_separators_and_encodings(tmp_path, separator, encoding, end):
    items = ITEMS[~ITEMS["item_id"].isin(["a", "e"])].assign(
        title=lambda table: table["title"] + " é;,|"
    )
    given_events = SOME.assign(item_id="b")
    for name, table in (("events", given_events), ("items", items)):
        write_csv(table, tmp_path / f"{name}.{end}", separator, encoding)
    given = {"encoding": encoding} if encoding in ("cp1252", "utf-32") else {}
    tables = tmp_path / f"events.{end}", tmp_path / f"items.{end}"
    write_atomic(*tables, "shop", tmp_path, **given)
    write_atomic(
        *tables,
        "same",
        tmp_path,
        separator=r"\t" if separator == "\t" else separator,
        encoding=encoding,
    )
    write_atomic(given_events, items, "frames", tmp_path)
    for suffix in ("inter", "item"):
        texts = {
            (tmp_path / name / f"{name}.{suffix}").read_text(encoding="utf-8")
            for name in ("shop", "same", "frames")
        }
        assert len(texts) == 1


@pytest.mark.parametrize("kind", ["float", "object", "Float64", "Int64", "category", "text"])
def test_whole_numbers_are_written_without_a_point(tmp_path, kind):
    years = pd.Series([1995, 2001, None], dtype="float")
    ids = pd.Series([1, 2, 3], dtype="float")
    if kind == "text":  # as pandas writes such a column into a CSV
        years, ids = pd.Series(["1995.0", "2001.0", ""]), pd.Series(["1.0", "2.0", "3.0"])
    elif kind != "float":
        years, ids = years.astype(kind), ids.astype(kind)
    items = pd.DataFrame({"item_id": ids, "title": ["2.0", "Windows 3.0", "C"], "year": years})
    write_atomic(
        pd.DataFrame({"user_id": ids, "item_id": [1, 2, 3], "timestamp": 1}),
        items,
        "shop",
        tmp_path,
        titles=["title", "year"],
    )
    rows = (tmp_path / "shop" / "shop.item").read_text().splitlines()
    assert rows[1:] == ["1\t2.0\t1995", "2\tWindows 3.0\t2001", "3\tC\t"]
    assert [
        row.split("\t")[:2]
        for row in (tmp_path / "shop" / "shop.inter").read_text().splitlines()[1:]
    ] == [[n, n] for n in "123"]


def test_ids_and_times_of_nineteen_digits_keep_them_all(tmp_path):
    first = 1_700_000_000_000_000_001
    given = events(
        (2**63, 2**64 + 1, first + 2), (2**63 + 1, "a", first + 1), (2**53 + 1, "b", first)
    )
    items = pd.DataFrame({"item_id": [2**64 + 1], "title": ["A"]})
    write_atomic(given, items, "shop", tmp_path)
    rows = (tmp_path / "shop" / "shop.inter").read_text().splitlines()[1:]
    assert rows == [
        f"{2**53 + 1}\tb\t{first}",
        f"{2**63 + 1}\ta\t{first + 1}",
        f"{2**63}\t{2**64 + 1}\t{first + 2}",
    ]


def test_what_stands_in_the_middle_of_a_text_cannot_hide(tmp_path):
    """A byte order mark where two files were joined, and a null character, at which pandas ends
    a cell."""
    (tmp_path / "events.csv").write_text(
        "user_id,item_id,timestamp\nu,a,1\n\ufeffu,b\0,2\n", encoding="utf-8"
    )
    write_atomic(tmp_path / "events.csv", ITEMS, "shop", tmp_path)
    assert [row[:3] for row in (tmp_path / "shop" / "shop.inter").read_text().splitlines()[1:]] == [
        "u\ta",
        "u\tb",
    ]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("end", ["inter", "item"])
def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch, there, end):
    folder = tmp_path / "data" / "shop"
    if there:
        folder.mkdir(parents=True)
        (folder / "mine.csv").write_text("kept")
    before = pd.DataFrame.to_csv

    def full(frame, path, **options):
        before(frame.head(1), path, **options)
        if f".{end}" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return before(frame, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(SOME, ITEMS, "shop", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == (
        ["shop", "mine.csv"] if there else []
    )
    monkeypatch.setattr(pd.DataFrame, "to_csv", before)
    write_atomic(SOME, ITEMS, "shop", tmp_path / "data")
    assert {path.name for path in folder.iterdir()} == {
        "shop.inter",
        "shop.item",
        *(["mine.csv"] if there else []),
    }


CELLS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=False),
    st.none(),
    st.sampled_from(
        ["NA", '"', "a\tb", "x\ny", "\u2028", "\ufeff", "1.0", "2024-01-31", "null", "''"]
    ),
)
NAMES = st.one_of(
    st.integers(0, 9), st.text("ab \t\"'é\0,;|", max_size=3), st.sampled_from(["NA", 1.0, 2.5])
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    events=st.lists(st.tuples(NAMES, NAMES, st.integers(0, 5000)), min_size=1, max_size=12),
    items=st.lists(st.tuples(NAMES, CELLS), min_size=1, max_size=8),
    as_csv=st.booleans(),
)
def test_any_frame_is_written_as_it_is_read_or_refused_in_one_sentence(events, items, as_csv):
    events = [*events, ("two", "x", 1), ("two", "y", 2)]  # there must be two items
    warnings.filterwarnings("ignore", ".* events are there twice")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tables = (
            pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"]),
            pd.DataFrame(items, columns=["item_id", "title"]),
        )
        if as_csv:
            for name, table in zip(("events", "items"), tables, strict=True):
                write_csv(table, folder / f"{name}.csv")
            tables = folder / "events.csv", folder / "items.csv"
        try:
            write_atomic(*tables, name="shop", output=folder / "data")
        except UserError as error:
            assert re.fullmatch(r"[^\n]+\.", str(error))
            assert not (folder / "data").exists()
            return
        read = {end: _plain(folder / "data" / "shop" / f"shop.{end}") for end in ("inter", "item")}
        if not as_csv:
            in_time = sorted(events, key=lambda event: event[2])
            assert [row[:2] for row in read["inter"]] == [
                [_cell(user), _cell(item)] for user, item, _ in in_time
            ]
        titles, sequences = through_recbole(folder / "data")
        for item, title in read["item"]:
            shown = title or f"item {item}"
            # an article is moved to the front
            assert titles.get(item, shown) == shown or "," in title
        for user in {row[0] for row in read["inter"]}:
            mine = [row[1] for row in read["inter"] if row[0] == user]
            assert sequences.get(user, mine) == mine


def _plain(path):
    """An independent reading of an atomic file: no quoting, tabs and line feeds are all there
    is."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]


def _cell(value):
    text = (
        ""
        if value is None or value != value
        else str(int(value))
        if isinstance(value, float) and value == int(value)
        else str(value)
    )
    return " ".join(text.replace("\0", " ").replace("\ufeff", " ").split())


def test_events_that_are_there_twice_are_warned_of(tmp_path):
    rows = events(("u", "a", "1"), ("u", "b", "2"), ("u", "a", "1"))
    items = pd.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]})
    with pytest.warns(
        UserWarning, match="1 of 3 events are there twice, with one user, item and"
    ) as warned:
        write_atomic(rows, items, "shop", tmp_path)
    assert warned[0].filename == __file__  # the line that called


def test_a_title_that_no_model_reads_is_refused_as_it_comes_in(tmp_path):
    items = pd.DataFrame({"item_id": ["a", "b"], "title": ["A", "y" * 2001]})
    with pytest.raises(UserError, match="item 'b' of items has a title of 2,001 characters, 'yyy"):
        write_atomic(events(("u", "a", "1"), ("u", "b", "2")), items, "shop", tmp_path)
    assert list(tmp_path.iterdir()) == []
