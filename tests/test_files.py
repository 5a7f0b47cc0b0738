"""Files and folders are whole or not there, whoever dies; and damage is seen."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from recbole_sdpo import files
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import config_file

DIES = """
import os, sys
from pathlib import Path
from recbole_sdpo import files
left = [int(sys.argv[1])]
def mortal(name):
    act = getattr(os, name)
    def acts(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            os._exit(99)
        return act(*args, **more)
    setattr(os, name, acts)
for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
    mortal(name)
folder = Path(sys.argv[2])
files.write_text(folder / "text", "new")
with files.whole_folder(folder / "many") as part:
    (part / "a").write_text("new a")
    (part / "b").write_text("new b")
    files.seal(part)
"""


def test_whenever_a_process_dies_the_old_or_the_new_is_there(tmp_path):
    seen = set()
    for moment in range(100):
        folder = tmp_path / str(moment)
        (folder / "many").mkdir(parents=True)
        (folder / "text").write_text("old")
        (folder / "many" / "a").write_text("old a")
        code = subprocess.run(
            [sys.executable, "-S", "-c", _without_package(), str(moment), str(folder)], check=False
        ).returncode
        files.settle(folder / "many")
        files.remove_parts(folder, ["many"])
        text, many = (
            (folder / "text").read_text(),
            {file.name: file.read_text() for file in (folder / "many").iterdir()},
        )
        many.pop(files.SUMS, None)
        assert text in ("old", "new") and many in ({"a": "old a"}, {"a": "new a", "b": "new b"})
        assert sorted(file.name for file in folder.iterdir()) == ["many", "text"]
        seen.add((text, len(many)))
        if code == 0:
            break
        assert code == 99
    assert moment > 8 and seen == {("old", 1), ("new", 1), ("new", 2)}


def _without_package():
    """The program, without the seconds that importing the package takes."""
    source = "import sys, types\nsys.path[:0] = " + repr([path for path in sys.path if path])
    source += (
        "\npackage = types.ModuleType('recbole_sdpo'); package.__path__ = ["
        + repr(os.path.dirname(files.__file__))
        + "]"
    )
    return source + "\nsys.modules['recbole_sdpo'] = package\n" + DIES


def test_permissions_are_those_of_the_umask_whatever_writes(tmp_path):
    before = os.umask(0o027)
    try:
        with files.whole_file(tmp_path / "one") as part:
            save_file({"a": torch.zeros(2)}, part)  # for its owner alone
        with files.whole_folder(tmp_path / "many") as part:
            save_file({"a": torch.zeros(2)}, part / "inside")
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("one", "many", "many/inside")
    ]
    assert modes == [0o640, 0o750, 0o640]


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space")],
)
def test_an_error_of_the_disk_names_the_file_and_leaves_the_old_one(tmp_path, error):
    (tmp_path / "it").write_text("old")
    with pytest.raises(OSError) as raised, files.whole_file(tmp_path / "it") as part:
        part.write_text("half")
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "it")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_record_is_read_as_it_was_written_or_not_at_all(tmp_path):
    file = tmp_path / "record.json"
    record = files.write_record(file, {"a": [1, 0.1, float("-inf")], 2: None})
    assert files.read_record(file) == record
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert files.read_record(file) in (None, record)  # a blank between two parts may be another
        file.write_bytes(content[:place])
        assert files.read_record(file) is None
    file.write_text(json.dumps(["a", "list"]))
    assert files.read_record(file) is None


def test_a_seal_names_what_is_not_as_it_was(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(UserError, match="SHA256SUMS is missing"):
        files.check_seal(tmp_path)
    files.seal(tmp_path)
    files.check_seal(tmp_path)
    # as sha256sum writes and reads them
    lines = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in "ab"]
    assert (tmp_path / files.SUMS).read_text() == "".join(lines)
    (tmp_path / "b").write_text("c")
    with pytest.raises(UserError, match="b is damaged"):
        files.check_seal(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="b is missing"):
        files.check_seal(tmp_path)
    (tmp_path / files.SUMS).write_text("")
    with pytest.raises(UserError, match="a is not listed"):
        files.check_seal(tmp_path)


def test_what_was_being_replaced_goes_back_to_its_place(tmp_path):
    theirs = ("config", "config.old", "notes.old", "film.part", "1.2.part")  # a user's
    for name in ("sft.old", "sft.part", "sdpo.old", "sdpo", *theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "result.json.123.part").write_text("half")
    files.remove_parts(tmp_path, ["sft", "sdpo"])
    assert {folder.name: (folder / "weights").read_text() for folder in tmp_path.iterdir()} == {
        "sft": "sft.old",
        "sdpo": "sdpo",
        **{name: name for name in theirs},
    }


def test_a_config_that_is_not_here_is_the_one_of_the_package(tmp_path):
    name = "configs/ml-100k/compare.yaml"
    brought = config_file(name)
    assert brought.is_file() and brought.samefile(Path(__file__).parents[1] / name)
    assert (
        config_file("configs/none.yaml") == Path("configs/none.yaml")
        and config_file("ml-100k/compare.yaml").parts[0] == "ml-100k"
    )
    (tmp_path / name).parent.mkdir(parents=True)
    # the working directory, of which it is taken if it is there
    (tmp_path / name).write_text("a: 1\n")
    assert config_file(name) == Path(name) and config_file(tmp_path / name) == tmp_path / name
