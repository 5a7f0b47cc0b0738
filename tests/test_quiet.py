"""What a run prints is its own: no library greets the user with warnings that nobody can do
anything about."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import write_dataset
from tests.test_paper import SMALL, TITLES, save_backbone, sequences


def test_a_run_that_has_nothing_to_say_says_nothing(tmp_path):
    """With an adapter over four bits, which takes every library that there is; errors alone are
    logged."""
    given = {key: value for key, value in SMALL.items() if key != "max_new_tokens"} | {
        "data_path": str(write_dataset(tmp_path / "data", sequences(), TITLES)),
        "backbone": save_backbone(tmp_path / "backbone", "llama2-7b"),
        "quantization": "nf4",
        "train_neg_sample_args": {"sample_num": 3},
        "state": "error",
    }
    command = [
        sys.executable,
        "-m",
        "recbole_sdpo",
        "run",
        "--dataset=toy",
        *(f"--{key}={value}" for key, value in given.items()),
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.stdout + ended.stderr == "" and ended.returncode == 0
    assert Path("run/result.json").is_file()
