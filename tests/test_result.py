import pytest

from recbole_sdpo.errors import UserError
from recbole_sdpo.result import read_result, write_result


def test_a_result_is_what_the_run_wrote_or_an_error_that_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"result.json does not exist: the run has not ended"):
        read_result(tmp_path)
    (tmp_path / "ranks.csv").write_text("user,item,rank\n")
    assert write_result(tmp_path, {"a": (1, 2.5)}, ["ranks.csv"]) == read_result(tmp_path)
    assert read_result(tmp_path)["a"] == [1, 2.5]
    (tmp_path / "ranks.csv").write_text("user,item,rank\n1,1,1\n")
    with pytest.raises(UserError, match=r"ranks.csv is damaged"):
        read_result(tmp_path)
    (tmp_path / "ranks.csv").unlink()
    with pytest.raises(UserError, match=r"ranks.csv is missing"):
        read_result(tmp_path)
    file = tmp_path / "result.json"
    for content in (file.read_text().replace("2.5", "3.5"), file.read_text()[:20], "[]", ""):
        file.write_text(content)
        with pytest.raises(UserError, match=r"result.json is damaged"):
            read_result(tmp_path)
