"""A short version of each kind, with one seed: make faults is the long one, with a fresh seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kinds import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """All are made in one process of their own, so that what takes time is imported once."""
    report = tmp_path_factory.mktemp("faults") / "report.json"
    command = [sys.executable, "-m", "tests.faults", "--short", "--seed=1", f"--output={report}"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert report.is_file(), ended.stderr
    return json.loads(report.read_text(encoding="utf-8"))["verdicts"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_outcome_is_right(kind, verdicts):
    mine = [verdict for verdict in verdicts if verdict["kind"] == kind]
    wrong = [
        f"{verdict['number']} {verdict['sort']}: {verdict['what']}\n{verdict['why']}"
        for verdict in mine
        if verdict["sort"] != "right"
    ]
    assert len(mine) == KINDS[kind].SHORT
    assert not wrong, "\n".join(wrong)
