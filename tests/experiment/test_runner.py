"""A whole experiment on toy data: what is run, what is not run again, and what is left in its folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from recbole_sdpo.evaluator.ranks import metric_of_ranks
from recbole_sdpo.experiment.plan import Experiment, Run, plan
from recbole_sdpo.experiment.runner import Runner
from recbole_sdpo.experiment.tune import tune
from tests.conftest import TINY, write_dataset


def call(folder, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "recbole_sdpo", "--experiment=try.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Four rows, one of which fails as it begins, run twice."""
    folder = tmp_path_factory.mktemp("experiment")
    sequences = [[1 + (start + step) % 24 for step in range(12)] for start in range(24) for _ in range(2)]
    titles = {i + 1: f"{'abcdef'[i % 6]}{'wxyz'[i // 6]} film" for i in range(24)}
    content = {
        "dataset": "toy",
        "seeds": [1],
        "candidates": ["uni5", "pop3"],
        "metrics": ["NDCG@5", "HR@1"],
        "settings": {key: value for key, value in TINY.items() if key != "eval_args"}
        | {"data_path": str(write_dataset(folder / "data", sequences, titles)), "cache_dir": "cache"},
        "runs": [
            {"name": "Pop", "model": "Pop"},
            {"name": "S-DPO", "settings": {"sft_epochs": 2}, "vary": {"beta": [0.5, 2.0]}},
            {"name": "too many", "settings": {"sft_epochs": 2, "train_neg_sample_args": {"sample_num": 23}}},
        ],
    }
    (folder / "try.yaml").write_text(yaml.safe_dump(content))
    first = call(folder, "--output=report")
    again = call(folder, "--output=report")
    return folder, first, again


def test_finished_runs_are_skipped_and_failed_ones_reported(experiment):
    folder, first, again = experiment
    assert first.returncode == again.returncode == 1, first.stderr
    assert "5 runs, of which 0 are done already" in first.stdout  # the four of the table, and the SFT that three begin from
    assert "run 1 of 5: SFT of S-DPO, beta = 0.5, seed 1" in first.stdout
    assert re.search(r"run 2 of 5: Pop, seed 1 .*min left", first.stdout)
    assert "warning: too many, seed 1 failed: error: train_neg_sample_args asks for 23 negatives" in first.stdout
    assert "5 runs, of which 4 are done already" in again.stdout and "run 1 of 1: too many" in again.stdout


def test_the_report_has_what_the_runs_found(experiment):
    folder, *_ = experiment
    report = folder / "report"
    names = {file.name for file in report.iterdir()}
    pictures = {f"{name}.{end}" for name in ("bars-uni5", "bars-pop3", "by-beta", "curves", "hardest-negative") for end in ("png", "svg")}
    assert names == {"table.md", "table.csv", "table.tex", "results.jsonl", "report.html"} | pictures
    lines = [json.loads(line) for line in (report / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["Pop", "S-DPO, beta = 0.5", "S-DPO, beta = 2.0"]
    table = pd.read_csv(report / "table.csv").set_index(["candidates", "model", "metric"])
    for run in (folder / "saved" / "runs").glob("*/result.json"):
        result = json.loads(run.read_text())
        settings = result["settings"]
        if result["model"] == "SDPO-LLM" and settings["objective"] != "sdpo":
            continue
        name = "Pop" if result["model"] == "Pop" else f"S-DPO, beta = {settings['beta']}"
        ranks = pd.read_csv(run.parent / "ranks.csv")
        for mode in ("uni5", "pop3"):
            found = ranks[(ranks.candidates == mode) & (ranks.stage == list(result["stages"])[-1])]
            for metric in ("NDCG@5", "HR@1"):
                assert table.loc[(mode, name, metric), "mean"] == pytest.approx(metric_of_ranks(metric, found["rank"]).mean(), rel=1e-5)
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http" not in page.replace("http-equiv", "")
    assert "Warning: too many, seed 1 failed" in page and "not the same training targets" in page


def test_alignments_begin_from_the_shared_sft(experiment):
    folder, *_ = experiment
    found = [json.loads(file.read_text()) for file in (folder / "saved" / "runs").glob("*/result.json")]
    aligned = [result for result in found if "sdpo" in result["stages"]]
    assert len(aligned) == 2 and len({result["settings"]["sft_checkpoint"] for result in aligned}) == 1
    (sft,) = {result["settings"]["sft_checkpoint"] for result in aligned}
    before = json.loads((folder / sft).parent.joinpath("result.json").read_text())
    for result in aligned:
        assert result["stages"]["sft"]["test"] == before["test_result"] and result["stages"]["sft"]["targets"] == 0


def a_run(name, identity, start=None):
    return Run(name, "SDPO-LLM", "toy", 1, {"seed": 1}, identity, start)


def test_what_begins_from_a_failed_run_is_not_tried(tmp_path, monkeypatch, capsys):
    sft, other = a_run("sft", "0"), a_run("other", "3")
    runs = [a_run("a", "1", sft), a_run("b", "2", sft), other]
    started = []

    def fail(command, **_):
        started.append(command)
        name = Path(command[-1].removeprefix("--config_files=")).stem
        if name == "3":
            (tmp_path / name).mkdir()
            (tmp_path / name / "result.json").write_text("{}")
        return subprocess.CompletedProcess(command, int(name == "0"))

    monkeypatch.setattr(subprocess, "run", fail)
    failures = Runner(tmp_path).run_all(runs)
    assert [failure.run.name for failure in failures] == ["sft", "a", "b"] and len(started) == 2
    assert "what it begins from failed" in failures[1].why
    assert Runner(tmp_path).done(other) and "run 4 of 4: other" in capsys.readouterr().out


def test_an_interrupted_run_is_resumed_and_a_stillborn_one_begun_anew(tmp_path, monkeypatch):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("")
    (tmp_path / "1" / "state").mkdir()
    (tmp_path / "1" / "state" / "state.json").write_text("{}")
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 1))
    Runner(tmp_path).run_all([a_run("a", "1"), a_run("b", "2")])
    assert f"--resume={tmp_path / '1'}" in commands[0] and not any("resume" in part for part in commands[1])
    assert (tmp_path / "1" / "left").exists() and not (tmp_path / "2").exists()


@pytest.mark.parametrize(("of_all", "of_sft"), [({}, {}), ({"popularity_discount": 1.0}, {}), ({}, {"popularity_discount": [0.5]})])
def test_tuning_takes_the_best_on_the_validation_set(ring, tmp_path, of_all, of_sft):
    content = {
        "dataset": "toy",
        "candidates": ["uni5", "pop3"],
        "settings": {key: value for key, value in ring.items() if key != "eval_args"} | of_all,
        "tries": 2,
        "runs": [
            {"name": "GRU", "model": "GRU4Rec", "tune": {"learning_rate": [0.1, 0.2, 0.3, 0.4]}},
            {"name": "S-DPO", "tune": {"beta": [1.0, 3.0]}},
            {"name": "SFT, not tuned", "settings": {"objective": "sft"}},
            {"name": "SFT", "settings": {"objective": "sft"}, "tune": {"sft_learning_rate": [0.01, 0.02], **of_sft}},
            {"name": "Pop", "model": "Pop"},
        ],
    }
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))
    scores = {
        0.1: (0.5, 0.4),
        0.3: (0.4, 0.3),
        1.0: (0.3, 0.0),
        3.0: (0.2, 0.4),
        0.01: (0.1, 0.1),
        0.02: (0.2, 0.2),
    }  # with either candidate set
    tried = []

    class Pretended(Runner):
        def run_all(self, runs):
            for run in runs:
                value = run.settings.get("learning_rate", run.settings.get("beta", run.settings.get("sft_learning_rate")))
                tried.append(value)
                self.folder(run).mkdir(parents=True)
                judged = [{"valid": {"ndcg@5": score}, "test": {"ndcg@5": -score}} for score in scores[value]]
                stage = judged[0] | {"candidates": dict(zip(["uni5", "pop3"], judged, strict=True))}
                result = {"stages": {"fit": stage}, "settings": {"valid_metric": "NDCG@5", "valid_metric_bigger": True}}
                (self.folder(run) / "result.json").write_text(json.dumps(result))
            return []

    found, failures = tune(Experiment.load(tmp_path / "try.yaml"), Pretended(tmp_path / "runs"), tmp_path / "out")
    assert not failures and tried == [0.1, 0.3, 0.01, 0.02, 1.0, 3.0]
    assert [entry.settings for entry in found.entries()] == [
        {"learning_rate": 0.1},
        {"sft_learning_rate": 0.02, "beta": 3.0},
        {"objective": "sft"},
        {"objective": "sft", "sft_learning_rate": 0.02, **{key: value for key, (value,) in of_sft.items()}},
        {},
    ]
    sft, sdpo = (next(run for run in plan(found) if run.name == name) for name in ("SFT", "S-DPO"))
    assert sdpo.start.settings["sft_learning_rate"] == 0.02, "what is aligned is the SFT that was chosen"
    assert (sdpo.start.identity == sft.identity) == (not of_all and not of_sft), "but that an alignment begins from one without discount"
    kept = yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text())
    assert kept["GRU"]["best"] == {"learning_rate": 0.1} and len(kept["S-DPO"]["tries"]) == 2
    assert np.isclose(kept["S-DPO"]["tries"][1]["valid"], 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": {"sdpo_learning_rate": [0.1, -1.0]}}, "run 'S-DPO': sdpo_learning_rate=-1.0"),
        ({"tune": {"beta": [1.0, 3.0]}, "settings": {"eval_step": 0}}, "run 'S-DPO': --tune looks at the validation set"),
    ],
)
def test_all_tries_are_checked_before_the_first(ring, tmp_path, change, message):
    settings = {key: value for key, value in ring.items() if key != "eval_args"}
    gru = {"name": "GRU", "model": "GRU4Rec", "tune": {"learning_rate": [0.1, 0.2]}}
    content = {"dataset": "toy", "candidates": ["uni5"], "settings": settings, "tries": 2, "runs": [gru, {"name": "S-DPO"} | change]}
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))

    class Unwanted(Runner):
        def run_all(self, runs):
            raise AssertionError(runs)

    with pytest.raises(ValueError, match=message):
        tune(Experiment.load(tmp_path / "try.yaml"), Unwanted(tmp_path / "runs"), tmp_path / "out")
