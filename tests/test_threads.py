"""Threads are told how to wait before OpenMP is loaded, in every way in; what a user says
counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recbole_sdpo.threads import WAITS
from tests.conftest import write_dataset

ROOT = Path(__file__).parents[1]
OWN = {"OMP_WAIT_POLICY", *WAITS}


def call(*arguments, **given):
    """What Python prints, with OpenMP saying on the way what it read."""
    kept = {key: value for key, value in os.environ.items() if key not in OWN}
    env = kept | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose"} | given
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True
    )


def found(**given):
    shows = (
        "import json, os, recbole_sdpo; print(json.dumps({key: os.environ[key] for key in "
        f"{sorted(OWN)} if key in os.environ}}))"
    )
    return json.loads(call("-c", shows, **given).stdout)


@pytest.mark.parametrize(
    "given", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}, {"KMP_BLOCKTIME": "0"}]
)
def test_what_the_user_says_is_kept(given):
    assert found(**given) == given


def test_an_experiment_and_its_runs_wait_briefly(tmp_path):
    """OpenMP itself says so: its library read the variables, and so was loaded after they were
    set."""
    data = write_dataset(
        tmp_path / "data",
        [[1 + (start + step) % 16 for step in range(6)] for start in range(16)],
        None,
    )
    settings = {"data_path": str(data), "show_progress": False}
    content = {
        "dataset": "toy",
        "candidates": ["uni2"],
        "settings": settings,
        "runs": [{"name": "Pop", "model": "Pop"}],
    }
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))
    ended = call(ROOT / "run_recbole_sdpo.py", "--experiment=try.yaml")
    assert ended.returncode == 0, ended.stdout
    (log,) = Path("saved/runs").glob("*.log")
    for said in (ended.stderr, log.read_text()):
        read = [
            line.split("=")[1].strip(" '")
            for line in said.splitlines()
            if line.strip().startswith("GOMP_SPINCOUNT =")
        ]
        assert read and set(read) == {WAITS["GOMP_SPINCOUNT"]}, said
