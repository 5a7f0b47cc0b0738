import gzip
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from recbole_sdpo.data import json_rows as module
from recbole_sdpo.data.json_rows import json_rows
from recbole_sdpo.errors import UserError

ROWS = st.lists(
    st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.lists(st.integers()), max_size=3),
    max_size=5,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 5)


@hypothesis.settings(
    max_examples=20, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(ROWS, st.sampled_from(["", " ", "\n", " \n\n "]), st.integers(0, 1000))
def test_a_list_and_lines_give_their_rows_and_no_part_of_them_passes(tmp_path, rows, space, cut):
    between, file = f"{space},{space}", tmp_path / "rows"
    texts = [json.dumps(row) for row in rows]
    whole = f"{space}[{space}{between.join(texts)}{space}]{space}"
    file.write_text(whole)
    assert list(json_rows(file)) == rows == json.loads(whole)
    file.write_text("\n".join([space, *texts, space]))
    assert list(json_rows(file)) == rows
    file.write_text(whole[: min(cut, len(whole.rstrip()) - 1)])
    if file.read_text().strip():
        with pytest.raises(UserError, match="is not JSON"):
            list(json_rows(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{},,{}]", "row 2 is not JSON (Expecting value)"),
        ("[{},{},]", "row 3 is not JSON (Expecting value)"),
        ("[{} {}]", "row 2 is not JSON (no comma before it)"),
        ("[{}", "row 2 is not JSON (the list does not end)"),
        ("[{}] {}", "row 2 is not JSON (the list has ended before it)"),
        ("[]]", "row 1 is not JSON (the list has ended before it)"),
        ("{}, {}", "row 2 is not JSON (Expecting value)"),
        ("user,target", "row 1 is not JSON (Expecting value); the file must be a list of rows, or"),
        ("[" * 100_000, "row 1 is not JSON (maximum recursion depth"),
        ("{}\n\x80", "cannot be read: invalid start byte; it must be text in UTF-8."),
    ],
)
def test_a_fault_names_the_row(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(module, "BLOCK", 2**20 if len(text) > 99 else 2)
    (tmp_path / "rows").write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as raised:
        list(json_rows(tmp_path / "rows"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_row_without_an_end_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_ROW", 20)
    (tmp_path / "rows").write_text('["' + "a" * 1000)
    with (tmp_path / "rows").open() as stream:
        with pytest.raises(module._NotJSON):
            list(module._values(module._Window(stream)))
        assert stream.tell() < 50


def test_files_may_be_packed_and_of_other_encodings(tmp_path):
    rows = [{"title": "東京"}, {"title": "é"}]
    text = json.dumps(rows, ensure_ascii=False)
    for encoding, given in (("utf-8-sig", None), ("utf-16", None), ("gb18030", "gb18030")):
        file = tmp_path / f"{encoding}.json.gz"
        file.write_bytes(gzip.compress(text.encode(encoding)))
        assert list(json_rows(file, given)) == rows
