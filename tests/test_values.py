"""What is read is data: nothing in it runs."""

import re
import warnings

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_sdpo.checks.recbole_rules import PROPERTIES
from recbole_sdpo.errors import UserError
from recbole_sdpo.values import Loader, check_values, read_arguments, read_yaml, value

CODE = "__import__('pathlib').Path('pwned').touch()"

DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc'\"\\ ]"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc'", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(DATA.filter(lambda data: not isinstance(data, str)))
def test_what_python_writes_is_read_back(data):
    assert value(repr(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        *(
            CODE,
            f"[{CODE}]",
            f"lambda: {CODE}",
            "self",
            "param",
            "value",
            "config_dict",
            "2**9",
            "0123",
            "none",
            "yes",
            "",
            " ",
        ),
        *(
            "{[1]: 2}",
            "{1, 2}",
            "...",
            "b'x'",
            "1j",
            "1e999",
            "\0",
            "\udcff",
            "[" * 9999,
            "-" * 99999 + "1",
            "9" * 9999,
        ),
    ],
)
def test_any_other_text_stays_text(text, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value(text) == text
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("None", None),
        ("1e-3", 0.001),
    ],
)
def test_yamls_words_are_read_as_pythons(text, read):
    assert value(text) is read or value(text) == read


def test_text_within_a_list_or_dictionary_is_not_read_again():
    assert value(repr([CODE, {"a": ["1", "self"]}])) == [CODE, {"a": ["1", "self"]}]
    assert check_values({"a": [{"b": CODE}]}) == {"a": [{"b": CODE}]}


def test_arguments_may_hold_an_equals_sign_and_come_once():
    settings, rest = read_arguments(["--a=x=y", "--b=[1, 2]", "--b=[1, 2]", "c=1", "--d", "--=e"])
    assert settings == {"a": "x=y", "b": [1, 2]} and rest == ["c=1", "--d", "--=e"]
    with pytest.raises(UserError, match="--a is given twice, as '1' and as '2'; give it once"):
        read_arguments(["--a=1", "--a=2"])
    with pytest.raises(UserError, match="a must be text that UTF-8 can hold"):
        read_arguments(["--a=\udcff"])


LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (LOOP, "a must not hold more than 100,000 values, nor itself"),
        (float("nan"), "a must be a finite number, not nan"),
        ([1, [float("inf")]], "a must be a finite number, not inf"),
        (2**63, "a must not be a number of more than 64 bits"),
        ([10**9999], "a must not be a number of more than 64 bits"),
        ({"b": {None: 1}}, "a must hold no key but text and whole numbers"),
        ([b"x"], "a must be text, a number, .* not bytes"),
        ("x\0", "a must be text that UTF-8 can hold, without NUL"),
    ],
)
def test_what_is_no_data_is_refused_by_its_key(wrong, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check_values({"a": wrong})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no settings"),
        (b"# nothing\n", "holds no settings"),
        (b"- a\n", "settings must be a dictionary"),
        (b"a: [1\nb: 2\n", "is not YAML, line 2"),
        (b"a: 1\nb: 2\na: 3\n", "is not YAML, line 3: the key 'a' is there twice"),
        (b"a: \xe9\n", "must be text in UTF-8.* at byte 3"),
        (b"a: \x07\n", "is not YAML"),
        (b"1: 2\n", "the key 1 must be text"),
        (b"? [a]\n: 2\n", "is not YAML, line 1: found unhashable key"),
        (b"a: 2020-13-01\n", "is not YAML"),
        (b"a: 2020-12-01\n", "a must be text, a number, .* not date"),
        (b"a: .inf\n", "a must be a finite number"),
        (b"a: &a [*a]\n", "a must not hold more than 100,000 values, nor itself"),
        (b"a: " + b"[" * 3000, "is not YAML"),
        (b"a: !!bool x\n", "is not YAML"),
        (
            b"a: !!python/object/apply:os.system ['touch pwned']\n",
            "is not YAML, line 1: could not determine a constructor",
        ),
        (b"a: !!python/name:os.system\n", "is not YAML, line 1: could not determine a constructor"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"a.yaml:? {message}") as error:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(error.value) and not (tmp_path / "pwned").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    faults = {
        tmp_path: "it is a folder",
        tmp_path / "none.yaml": "there is no such file",
        tmp_path / ("a" * 300): "too long",
        "\0": "null",
    }
    for file, why in faults.items():
        for name in ("", "base='a.yaml'"):
            with pytest.raises(UserError) as error:
                read_yaml(file, name)
            assert str(error.value).startswith(f"{name or file} cannot be read: ")
            assert why in str(error.value)


def test_recboles_own_files_are_read_as_recbole_reads_them():
    class Theirs(yaml.FullLoader):
        pass

    source = (PROPERTIES.parent / "config" / "configurator.py").read_text(encoding="utf-8")
    pattern = source[source.index('"""^(?:') + 3 : source.index('|NAN))$"""') + 7]

    Theirs.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(pattern.replace("\\\\", "\\"), re.X),
        list("-+0123456789."),
    )
    files = [file for file in PROPERTIES.rglob("*.yaml") if "hyper" not in str(file)]
    assert len(files) > 90
    for file in files:
        content = file.read_text(encoding="utf-8")
        assert yaml.load(content, Loader) == yaml.load(content, Theirs), file


@pytest.mark.parametrize("text", ["010", "-017", "1:30", "1:30.5", "+0_7"])
def test_numbers_of_other_bases_are_refused_in_files(tmp_path, text):
    """YAML 1.1 has 8 for 010, and 90 for 1:30."""
    file = tmp_path / "x.yaml"
    file.write_text(f"seed: {text}\n")
    with pytest.raises(UserError, match=re.escape(f"line 1: {text} is a number of another base")):
        read_yaml(file)
    file.write_text(f"seed: '{text}'\nother: 10\nzero: 0\nhalf: 0.5\n")
    assert read_yaml(file) == {"seed": text, "other": 10, "zero": 0, "half": 0.5}
