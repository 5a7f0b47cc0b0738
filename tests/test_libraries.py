"""A library that is missing or too old is named in one sentence, in every way in, before it is
imported."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from recbole_sdpo.libraries import IMPORTED, OLDEST, RECBOLE, Unfit, check_libraries

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Has the versions that are looked up be these, or their newest."""
    versions = dict.fromkeys([*OLDEST, *IMPORTED], "99.0") | {"recbole": RECBOLE}

    def version(name):
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return versions


@pytest.mark.parametrize("version", ["2.5.1+cu124", "1.13", "2.5.0a0+git1"])
def test_a_library_that_is_too_old(installed, version):
    installed["torch"] = version
    said = (
        f"recbole-sdpo needs torch 2.11 or later, and {version} is installed: pip install "
        "'torch>=2.11'"
    )
    with pytest.raises(Unfit, match=f"^{re.escape(said)}$"):
        check_libraries()


def test_a_library_that_is_missing(installed):
    installed["peft"] = None
    with pytest.raises(
        Unfit, match="needs peft 0.21 or later, which is not installed: pip install 'peft>=0.21'$"
    ):
        check_libraries()


@pytest.mark.parametrize(
    ("version", "found"), [(None, "which is not installed"), ("1.2.0", "and 1.2.0 is installed")]
)
def test_recbole_itself(installed, version, found):
    installed["recbole"] = version
    with pytest.raises(
        Unfit,
        match=f"^recbole-sdpo needs recbole 1.2.1, {found}: pip install --no-deps recbole==1.2.1$",
    ):
        check_libraries()


def test_what_recbole_imports(installed):
    installed |= {"thop": None, "tqdm": None, "pandas": "0.1"}
    with pytest.raises(
        Unfit, match="needs thop tqdm, which is not installed: pip install thop tqdm$"
    ):
        check_libraries()


def test_a_python_that_is_too_old(installed, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(sys, "version", "3.9.18 (main)")
    with pytest.raises(
        Unfit,
        match="^recbole-sdpo needs Python 3.10 or later, and this is 3.9.18: start it with "
        "another one$",
    ):
        check_libraries()


@pytest.mark.parametrize("version", ["2.11", "2.11.0+cu130", "3.0", "2.11.0rc1"])
def test_what_serves(installed, version):
    installed["torch"] = version
    check_libraries()


def test_setup_asks_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = dict(
        re.match(r"([\w-]+)(?:[>=]=([\d.]+))?(?:$|[;<])", each).groups("")
        for each in project["dependencies"]
    )
    del asked["setuptools"]
    assert asked == OLDEST | {"recbole": RECBOLE} | {
        "pyyaml" if name == "PyYAML" else name: "" for name in IMPORTED
    }


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "recbole_sdpo"],
        [str(ROOT / "run_recbole_sdpo.py")],
        ["-m", "recbole_sdpo", "settings"],
    ],
)
def test_a_program_ends_with_the_sentence(start, tmp_path):
    old = tmp_path / "transformers-4.57.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run([sys.executable, *start], env=env, capture_output=True, text=True)
    said = (
        "error: recbole-sdpo needs transformers 5.0 or later, and 4.57.0 is installed: pip "
        "install 'transformers>=5.0'\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", said)
