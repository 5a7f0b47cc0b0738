import numpy as np
import pytest

from recbole_sdpo.data.prompts import Templates, Units, candidate_prompts
from recbole_sdpo.errors import UserError
from recbole_sdpo.ragged import Ragged


def test_candidate_prompts_read_as_their_template():
    units = Units(
        10,
        Templates(
            "header\n", ("Seen:\n{history}Pick:\n{candidates}Next:\n", "{candidates}|{history}")
        ),
    )
    prompts = candidate_prompts(
        Ragged.from_rows([[1, 2], [3]]),
        Ragged.from_rows([[4, 5], [6, 7]]),
        np.array([5, 6]),
        np.array([1, 2]),
        units,
        np.array([0, 1]),
    )

    def read(row):
        return "".join(f"<{u}>" if u < 10 else units.pieces[u - 10] for u in prompts.trunks[row])

    assert read(0) == "Seen:\n<1><2>Pick:\n<4><5>Next:\n"
    assert read(1) == "<6><7>|<3>"
    assert prompts.before.tolist() == prompts.trunks.lengths.tolist()


def test_shipped_templates_load():
    assert Templates.load("movies").header.endswith("\n")
    assert len(Templates.load("movies").candidates) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("header: x\n", "must hold the keys"),
        (
            "header: x\ncandidates: ['a {history} only']\n",
            r"must occur once in 'a \{history\} only'",
        ),
        ("header: x\ncandidates: ['{history}{candidates}']\n", "must begin with text"),
        ("header: 5\ncandidates: ['a {history}{candidates}']\n", "must hold the keys"),
        ("header: x\ncandidates: [3]\n", "must hold the keys"),
        ("header: x\ncandidates: text\n", "must hold the keys"),
    ],
)
def test_broken_templates_are_refused(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        Templates.load(str(tmp_path / "mine.yaml"))


def test_an_unknown_domain_names_the_known():
    with pytest.raises(ValueError, match="prompt_templates='flims' must be one of .*movies"):
        Templates.load("flims")


def test_a_file_of_templates_that_is_not_there_is_said_so():
    with pytest.raises(UserError, match="prompt_templates='mine.yaml': there is no file mine.yaml"):
        Templates.load("mine.yaml")
