"""The columns that settings ask for: each fault has a setting, a column, a file and what must
be."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config
from recbole.data.dataset import Dataset

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.tables import TYPES, read_header, read_table
from recbole_sdpo.errors import UserError
from tests.conftest import TINY

HEAD = "user_id:token\titem_id:token\ttimestamp:float"
IDS = ["user_id", "item_id", "timestamp"]
SPLIT = {"benchmark_filename": ["a", "b", "c"]}
LABELED = {"metrics": ["AUC"], "valid_metric": "AUC", "eval_args": {"mode": "labeled"}}
RANDOM = {"eval_args": {"order": "RO", "mode": "uni5"}}


def fault(path, model, own_config=False, **change):
    """The words with which a configuration is refused, or "" if it is not; RecBole's own is, as
    the data are loaded."""
    given = TINY | {"data_path": str(path), "train_neg_sample_args": {"sample_num": 1}} | change
    if "threshold" in given or given.get("eval_args", {}).get("mode") == "labeled":
        given.pop("train_neg_sample_args")
    try:
        if own_config:
            Dataset(Config(model, "toy", config_dict=given))
        else:
            RunConfig(model, "toy", config_dict=given)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def write(path, suffix, head, rows=None):
    """A file of 5 rows that fit the header, or of ``rows``."""
    folder = path / "toy"
    folder.mkdir(exist_ok=True)
    width = head.count("\t") + 1
    rows = ["\t".join([str(row)] * width) for row in range(1, 6)] if rows is None else rows
    (folder / f"toy.{suffix}").write_text("\n".join([head, *rows]) + "\n")


@pytest.fixture
def data(rated) -> Path:
    return Path(rated["data_path"])


def loading(*fields, **others):
    return {"load_col": {"inter": [*IDS, *fields], **others}}


OF_INTER = "which must be loaded from .*toy.inter: add it to load_col.inter"


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        (
            "BPR",
            {"TIME_FIELD": "when"},
            "TIME_FIELD='when' must be a column of type float of .*toy.inter, whose .*number them "
            "in",
        ),
        (
            "BPR",
            {"TIME_FIELD": "user"},
            "TIME_FIELD='user' must be a column of type float of .*toy.inter",
        ),
        (
            "BPR",
            {"ITEM_ID_FIELD": "class"},
            "ITEM_ID_FIELD='class' must be a column of type token of .*toy.inter, whose columns "
            "are user",
        ),
        (
            "BPR",
            {"USER_ID_FIELD": "rating", "RATING_FIELD": "x"},
            "USER_ID_FIELD='rating' must .* token of .*toy.inter, .*rating:float",
        ),
        (
            "BPR",
            {"load_col": {"inter": ["user_id"]}},
            "ITEM_ID_FIELD='item_id' must be loaded from .*toy.inter: add it to load_col.inter",
        ),
        (
            "BPR",
            {"load_col": {"inter": IDS[:2]}},
            "TIME_FIELD='timestamp' must be loaded from .*toy.inter: add it to load_col.inter",
        ),
        (
            "BPR",
            {"load_col": {"item": "*"}},
            "USER_ID_FIELD='user_id' must be loaded from .*toy.inter: add it to load_col.inter",
        ),
        (
            "BPR",
            {"load_col": None, "unload_col": {"inter": ["timestamp"]}},
            "TIME_FIELD.*toy.inter: leave it out of unload_col.inter",
        ),
        (
            "BPR",
            loading(item=["class"]),
            "ITEM_ID_FIELD='item_id' must be loaded from .*toy.item: add it to load_col.item",
        ),
        (
            "BPR",
            loading("ratin"),
            "load_col.inter names 'ratin', which must be a column of .*toy.inter; it has user_id, "
            ".*rating",
        ),
        (
            "BPR",
            loading(item=["item_id", "clas"]),
            "load_col.item names 'clas', which must be a column of .*toy.item; it has .*class",
        ),
        (
            "BPR",
            loading() | {"unload_col": {"inter": ["rating"]}},
            "load_col and unload_col both name columns of .*toy.inter; .* must",
        ),
        (
            "BPR",
            {"val_interval": {"rating": "[3,inf)"}},
            f"val_interval names 'rating', {OF_INTER}",
        ),
        (
            "BPR",
            {"val_interval": {"class": ["1"]}},
            "names 'class', which must be loaded from .*toy.item: add it to load_col.item",
        ),
        (
            "BPR",
            {"val_interval": {"ratin": "[3,inf)"}},
            "'ratin', which must be a column; .*inter has .*rating; .*item has .*class",
        ),
        (
            "BPR",
            loading("rating") | {"val_interval": {"rating": ["3"]}},
            "'rating', which must be .* of type token of .*toy.inter",
        ),
        (
            "BPR",
            loading("rating") | {"alias_of_item_id": ["rating"]},
            "alias_of_item_id names 'rating', .* type token or token_seq of",
        ),
        (
            "BPR",
            loading("rating") | {"seq_len": {"rating": 3}},
            "seq_len names 'rating', which must be .* token_seq or float_seq of .*toy",
        ),
        (
            "BPR",
            {"normalize_field": ["item_id"]},
            "normalize_field names 'item_id', which must be .* float or float_seq of .*toy.inter",
        ),
        (
            "BPR",
            {"numerical_features": ["nothing"]},
            "numerical_features names 'nothing', which must be a column; .*toy.inter",
        ),
        (
            "BPR",
            loading("rating") | {"discretization": {"rating": {"method": "LD"}}},
            "'rating', which numerical_features must name, too",
        ),
        (
            "BPR",
            {"discretization": {"timestamp": {"method": "LD"}}},
            "discretization=.* must not name TIME_FIELD='timestamp'",
        ),
        (
            "BPR",
            {"alias_of_user_id": ["item_id"]},
            "alias_of_user_id and alias_of_item_id must not share 'item_id'",
        ),
        (
            "BPR",
            loading("rating") | {"preload_weight": {"item_id": "rating"}},
            "preload_weight=.* must not name ITEM_ID_FIELD='item_id'",
        ),
        (
            "BPR",
            {"unused_col": {"user": ["age"]}},
            "unused_col names the user file, which must be there",
        ),
        (
            "BPR",
            {"unused_col": {"item": ["class"]}},
            "unused_col names the item file, which must be there, and one of load_col",
        ),
        (
            "BPR",
            {"unused_col": {"inter": ["item_id"]}},
            "unused_col.inter must not name ITEM_ID_FIELD='item_id'",
        ),
        ("BPR", {"additional_feat_suffix": "item"}, "additional_feat_suffix=.* must not name item"),
        (
            "BPR",
            {"additional_feat_suffix": "ent"},
            "additional_feat_suffix=.*: there is no file .*toy.ent, which must be there",
        ),
        (
            "BPR",
            SPLIT,
            "benchmark_filename=.*: there is no file .*toy.a.inter, which must be there; the "
            "folder holds toy.inter",
        ),
        (
            "BPR",
            {"eval_args": {"split": {"TS": [8, 1, 1]}, "order": "RO", "mode": "uni5"}},
            "is by time, so eval_args.order='RO' must be",
        ),
        (
            "FM",
            LABELED,
            "LABEL_FIELD='label' must be .* float of .*toy.inter, .*labeled needs a "
            "label.*threshold={'rating': 4}",
        ),
        (
            "FM",
            LABELED | {"LABEL_FIELD": "user"},
            "LABEL_FIELD='user' must be a column of type float of .*toy.inter",
        ),
        ("FM", LABELED | {"threshold": {"rating": 3}}, f"threshold names 'rating', {OF_INTER}"),
        (
            "FM",
            LABELED | {"threshold": {"class": 3}},
            "threshold names 'class', which must be a column; .*inter has [^/]*$",
        ),
        (
            "FM",
            LABELED | {"threshold": {"timestamp": 3}},
            "threshold=.* must not name TIME_FIELD='timestamp'",
        ),
    ],
)
@pytest.mark.parametrize("own_config", [False, True])
def test_setting_column_and_file_are_named(data, model, change, words, own_config):
    # RecBole's own, which is met as the data are loaded, and by default knows no time
    if own_config:
        loaded = {"load_col": None} if any(key.endswith("_FIELD") for key in change) else loading()
        ordered = {"order": "TO", "split": {"LS": "valid_and_test"}} | change.get(
            "eval_args", {"mode": "uni5"}
        )
        change = loaded | change | {"eval_args": ordered}
    assert re.search(words, fault(data, model, own_config, **change))


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("BPR", {}),
        ("BPR", {"load_col": None}),
        ("BPR", {"load_col": {"inter": "*", "item": "*"}, "unload_col": {"item": ["class"]}}),
        (
            "BPR",
            loading("rating", item=["item_id", "class"])
            | {"val_interval": {"rating": "[3,inf)", "class": ["1"]}},
        ),
        ("FM", LABELED | loading("rating") | {"threshold": {"rating": 3}}),
        ("FM", LABELED | loading("rating") | {"LABEL_FIELD": "rating", "RATING_FIELD": "rating"}),
        (
            "BPR",
            loading(item=["item_id", "class"])
            | {"unused_col": {"item": ["class"], "inter": ["timestamp"]}},
        ),
    ],
)
def test_what_is_there_is_not_refused(data, model, change):
    assert fault(data, model, **change) == ""


def test_no_time_is_needed_where_nothing_goes_by_it(tmp_path):
    write(tmp_path, "inter", "user_id:token\titem_id:token")
    assert fault(tmp_path, "BPR", **RANDOM) == ""
    assert "TIME_FIELD='timestamp' must be" in fault(tmp_path, "BPR")
    assert "load_col.inter names 'timestamp'" in fault(
        tmp_path, "BPR", **RANDOM, load_col={"inter": IDS}
    )
    for part in "abc":
        write(tmp_path, f"{part}.inter", "user_id:token\titem_id_list:token_seq\titem_id:token")
    past = {"load_col": {"inter": ["user_id", "item_id_list", "item_id"]}}
    assert (
        fault(tmp_path, "BPR", **SPLIT)
        == fault(tmp_path, "SASRec", **SPLIT, **past, train_neg_sample_args=None)
        == ""
    )


@pytest.mark.parametrize("part", "abc")
@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            "user_id:token\titem_id:token\tx:float",
            "'item_id_list', must be a column of type token_seq of .*toy.{}.inter",
        ),
        (
            "user_id:token\titem_id_list:token_seq",
            "ITEM_ID_FIELD='item_id' must be a column of type token of .*toy.{}.inter",
        ),
        (
            "user_id:token\titem_id_list:token\titem_id:token\tx:float",
            "'item_id_list', must be .* token_seq of .*toy.{}.inter",
        ),
        (
            "user_id:token\titem_id_list:token_seq\titem_id:token\tx:token",
            "must have the columns of .*toy.a.inter, .*'x' differs",
        ),
        (
            "user_id:token\titem_id_list:token_seq\titem_id:token",
            "must have the columns of .*toy.a.inter, .*'x' differs",
        ),
        ("user_id", "toy.{}.inter, line 1: column 'user_id' must be name:type"),
    ],
)
def test_each_of_the_files_that_are_split_is_looked_at(tmp_path, part, head, words):
    for other in "abc":
        write(
            tmp_path,
            f"{other}.inter",
            "user_id:token\titem_id_list:token_seq\titem_id:token\tx:float",
        )
    change = SPLIT | {"load_col": {"inter": "*"}}
    assert fault(tmp_path, "SDPO-LLM", **change) == ""
    write(tmp_path, f"{part}.inter", head)
    assert re.search(words.format(part), fault(tmp_path, "SDPO-LLM", **change))


def test_files_of_users_items_and_more_are_looked_at_if_they_are_loaded(tmp_path):
    write(tmp_path, "inter", HEAD)
    for suffix, change in (
        ("user", {}),
        ("item", {}),
        ("ent", {"additional_feat_suffix": ["ent"]}),
    ):
        write(tmp_path, suffix, "no header")
        assert fault(tmp_path, "BPR", **change) == ""
        load = loading(**{suffix: ["x"]}) | change
        assert f"toy.{suffix}, line 1: column 'no header' must be name:type" in fault(
            tmp_path, "BPR", **load
        )
        write(tmp_path, suffix, "user_id:float\titem_id:float\tx:float")
        words = fault(tmp_path, "BPR", **loading(**{suffix: "*"}), **change)
        assert (f"_ID_FIELD='{suffix}_id' must be a column of type token of" in words) == (
            suffix != "ent"
        )
        (tmp_path / "toy" / f"toy.{suffix}").unlink()
    write(tmp_path, "ent", "id:token\tvector:float_seq")
    ent = loading(ent=["id"]) | {
        "additional_feat_suffix": ["ent"],
        "preload_weight": {"id": "vector"},
    }
    assert "preload_weight names 'vector', which must be loaded from" in fault(
        tmp_path, "BPR", **ent
    )
    ent["load_col"]["ent"] = ["id", "vector"]
    assert fault(tmp_path, "BPR", **ent) == ""
    write(tmp_path, "more", "other:token")
    ent["load_col"]["more"], ent["preload_weight"] = ["other"], {"other": "vector"}
    ent["additional_feat_suffix"] = ["ent", "more"]
    assert "'other' and 'vector' must be columns of one file" in fault(tmp_path, "BPR", **ent)


FIELD = st.text(
    st.characters(codec="utf-8", exclude_characters='\t\r\n\0:"\ufeff'), min_size=1
).filter(str.strip)


@given(
    fields=st.dictionaries(FIELD, st.sampled_from(TYPES), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_header_is_what_the_reader_of_files_takes_it_for(tmp_path_factory, fields, end, encoding):
    path = tmp_path_factory.mktemp("h") / "toy.inter"
    rows = ["\t".join(map(":".join, fields.items())), "\t".join(["1"] * len(fields))]
    path.write_bytes((end.join(rows) + end).encode(encoding))
    assert read_header(path, "\t", encoding) == read_table(path, "\t", encoding).types == fields


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\n",
        b"user_id",
        b"a:token,b:token",
        b"a:token\ta:float",
        b"a\0:token",
        b"\xe9:token",
        b'"a:token"',
    ],
)
def test_faults_of_a_header_have_the_words_of_the_reader_of_files(tmp_path, head):
    (path := tmp_path / "a.inter").write_bytes(head + b"\nx\n")
    with pytest.raises(UserError) as whole:
        read_table(path)
    with pytest.raises(UserError) as first:
        read_header(path)
    assert str(first.value) == str(whole.value) and f"{path}, line 1" in str(first.value)


def test_no_more_than_the_header_is_read(tmp_path):
    (path := tmp_path / "a.inter").write_bytes(b"a:token\n" + b"x\n" * 100_000 + b"\xff\n")
    assert read_header(path) == {"a": "token"}
    with pytest.raises(UserError, match="a.inter, line 100002: byte 0xff is not utf-8"):
        read_table(path)
