"""Atomic files: what is written is read, and every fault has a file, a line and a reason."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo.data.tables import read_header, read_table
from recbole_sdpo.errors import UserError

HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"


def write(tmp_path, text):
    path = tmp_path / "a.inter"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n\0"), min_size=1).filter(
    str.strip
)


@given(
    rows=st.lists(st.tuples(WORD, WORD), min_size=1, max_size=9),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, rows, end, mark):
    text = end.join(["a:token\tb:token_seq", *("\t".join(row) for row in rows)])
    path = write(tmp_path_factory.mktemp("t"), text.encode("utf-8-sig" if mark else "utf-8"))
    table = read_table(path)
    assert list(zip(table.text("a"), table.text("b"), strict=True)) == rows and list(
        table.lines
    ) == list(range(2, len(rows) + 2))
    expected = [[word for word in row[1].split(" ") if word] for row in rows]
    if not any(row[1][0] == row[1][-1] == '"' for row in rows):
        assert [words.tolist() for words in table.sequences("b", " ")] == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 is empty"),
        (HEAD, "has a header and no rows"),
        ("user_id\titem_id\nu\ti\n", "column 'user_id' must be name:type, such as user_id:token"),
        (
            "user_id:token,item_id:token\nu,i\n",
            r"separated by ',': write '\\t', or set field_separator",
        ),
        (
            "user_id:word\nu\n",
            "column 'user_id:word' must be name:type.* token, float, token_seq, float_seq",
        ),
        ("a:token\ta:float\nx\t1\n", "column 'a' is there twice"),
        ('"a:token"\tb:float\nx\t1\n', "is in quotes"),
        (HEAD + "u\ti\t1\nu\ti\n", "line 3 has 2 fields, and the header 3"),
        (HEAD + "u\ti\t1\n\nu\ti\t1\t2\n", "line 4 has 4 fields, and the header 3"),
        (HEAD + 'u\t"i\nj"\t2\n', "line 2 has 2 fields.*a quote keeps neither"),
        (HEAD + "u\ti\0\t1\n", "line 2 holds a NUL byte"),
        ((HEAD + "u\té\t1\n").encode("latin-1"), "line 2: byte 0xe9 is not utf-8; .*encoding"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path, text, words):
    with pytest.raises(UserError, match=f"a.inter.*{words}"):
        read_table(write(tmp_path, text))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("u\ti\t1\n \ti\t2\n", "line 3, column 'user_id': ' ' is no id"),
        ("u\t[PAD]\t1\n", "line 2, column 'item_id'.*padding"),
        ('u\t"i"\t1\n', "line 2, column 'item_id'.*in quotes"),
        ("u\ti\t1\nu\ti\t\n", "line 3, column 'timestamp': '' is no time"),
        (
            "u\ti\tnan\nu\ti\tNaN\n",
            r"line 2, column 'timestamp': 'nan' is no time.*\(2 such rows\)",
        ),
        ("u\ti\tinf\n", "line 2, column 'timestamp': 'inf' must be a finite number"),
        ("u\ti\t1_000\n", "line 2, column 'timestamp': '1_000' must be a number"),
        (
            "u\ti\t2024-01-31\n",
            "line 2.*'2024-01-31' must be a number; .*import makes numbers of dates",
        ),
    ],
)
def test_a_field_that_is_none_is_refused_with_its_line(tmp_path, rows, words):
    table = read_table(write(tmp_path, HEAD + rows))
    with pytest.raises(UserError, match=f"a.inter, {words}"):
        table.ids("user_id"), table.ids("item_id"), table.numbers("timestamp", needed=True)


def test_integers_keep_all_their_digits(tmp_path):
    table = read_table(
        write(tmp_path, HEAD + "".join(f"u\ti\t{2**60 + step}\n" for step in (2, 1, 3)))
    )
    assert (table.numbers("timestamp", needed=True) - 2**60).tolist() == [2, 1, 3]
    small = read_table(write(tmp_path, HEAD + "u\ti\t5\nu\ti\t-1e3\n")).numbers(
        "timestamp", needed=True
    )
    assert small.dtype == np.float64 and small.tolist() == [5, -1000]


def test_times_that_float64_cannot_tell_apart_are_refused(tmp_path):
    fine = (
        "".join(f"u\ti\t{1_700_000_000 + step / 1e6!r}\n" for step in range(50))
        + "u\ti\t1700000000.0000000\n"
    )
    assert (
        len(set(read_table(write(tmp_path, HEAD + fine)).numbers("timestamp", needed=True))) == 50
    )
    for pair in (("1700000000.1234567", "1700000000.12345671"), ("0.5", "0.50000000000000000001")):
        table = read_table(write(tmp_path, HEAD + "".join(f"u\ti\t{time}\n" for time in pair)))
        with pytest.raises(
            UserError, match="line 3, column 'timestamp'.*more digits than float64 holds"
        ):
            table.numbers("timestamp", needed=True)


def test_missing_ratings_are_told_of(tmp_path, caplog):
    table = read_table(write(tmp_path, "a:float\tb:token\n\tx\nNULL\tx\n3\tx\n"))
    assert np.isnan(table.numbers("a")).tolist() == [True, True, False]
    assert "a.inter, line 2, column 'a': 2 of 3 numbers are missing" in caplog.text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_and_separators(tmp_path, encoding):
    path = write(tmp_path, "a:token;b:token\né;x\n".encode(encoding))
    assert read_table(path, ";", encoding).text("a").tolist() == ["é"]
    for separator in ("", "::"):
        with pytest.raises(UserError, match="field_separator=.*must be one character"):
            read_table(path, separator, encoding)
    with pytest.raises(UserError, match="encoding='none' is not known"):
        read_table(path, ";", "none")
    path.write_bytes(b"a:token;b:token\nx;y\n")
    for read in (read_table, read_header):
        with pytest.raises(UserError, match="a.inter, line 1: column .* must be name:type"):
            read(path, ";", "utf-16")


def test_quotes_of_csv_are_refused_and_those_of_a_title_told_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    titles = ['"Heroes"', "Low", '"Weird Al" Yankovic', "Lodger"]
    table = read_table(
        write(tmp_path, "a:token\tb:token_seq\n" + "".join(f"i\t{title}\n" for title in titles))
    )
    assert [" ".join(words) for words in table.sequences("b", " ")] == titles
    assert "line 2, column 'b': 1 texts begin and end with a quote" in caplog.text
    with pytest.raises(UserError, match="line 3, column 'b'.*quoted as in CSV"):
        read_table(
            write(tmp_path, 'a:token\tb:token_seq\ni\tx\ni\t"The ""Gold"" Edition"\n')
        ).sequences("b", " ")
    with pytest.raises(UserError, match=r"line 2, column 'b'.*quoted as in CSV.*\(2 such rows\)"):
        read_table(write(tmp_path, 'a:token\tb:token_seq\ni\t"x"\ni\t"y"\n')).check_quotes("b")
