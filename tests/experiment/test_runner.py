"""A whole experiment on toy data: what is run, what is not run again, and what is left in its
folder."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.ranks import metric_of_ranks
from recbole_sdpo.experiment import runner as runner_module
from recbole_sdpo.experiment import worker
from recbole_sdpo.experiment.file import Experiment
from recbole_sdpo.experiment.plan import Run, plan
from recbole_sdpo.experiment.run import run_experiment
from recbole_sdpo.experiment.runner import Runner, _time_left
from recbole_sdpo.experiment.tune import tune
from recbole_sdpo.files import seal, sha256, write_record
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.interrupt import endings
from recbole_sdpo.result import write_result
from tests.conftest import TINY, write_dataset


def call(folder, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "recbole_sdpo", "experiment", "try.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Four rows, one of which fails as it begins, run twice."""
    folder = tmp_path_factory.mktemp("experiment")
    sequences = [
        [1 + (start + step) % 24 for step in range(12)] for start in range(24) for _ in range(2)
    ]
    titles = {i + 1: f"{'abcdef'[i % 6]}{'wxyz'[i // 6]} film" for i in range(24)}
    content = {
        "dataset": "toy",
        "seeds": [1],
        "candidates": ["uni5", "pop3"],
        "metrics": ["NDCG@5", "HR@1"],
        "settings": {key: value for key, value in TINY.items() if key != "eval_args"}
        | {
            "data_path": str(write_dataset(folder / "data", sequences, titles)),
            "cache_dir": "cache",
        },
        "runs": [
            {
                "name": "Pop",
                "model": "Pop",
                "published": {"metric": "HR@1", "value": 0.25, "source": "A paper"},
            },
            {  # at a rate of 0 no epoch is better than the start
                "name": "S-DPO",
                "settings": {"sft_epochs": 2},
                "vary": {"sdpo_learning_rate": [0.0, 0.01]},
            },
            {
                "name": "too many",
                "settings": {"sft_epochs": 2, "train_neg_sample_args": {"sample_num": 23}},
            },
        ],
    }
    (folder / "try.yaml").write_text(yaml.safe_dump(content))
    first = call(folder, "--output=report")
    again = call(folder, "--output=report")
    return folder, first, again


def test_finished_runs_are_skipped_and_failed_ones_reported(experiment):
    folder, first, again = experiment
    assert first.returncode == again.returncode == 1, first.stderr
    # the four of the table, and the SFT that three begin from
    assert "5 runs, of which 0 are done already" in first.stdout
    assert "run 1 of 5: SFT of S-DPO, sdpo_learning_rate = 0.0, seed 1" in first.stdout
    assert re.search(r"run 2 of 5: Pop, seed 1 .*min left", first.stdout)
    assert (
        "warning: too many, seed 1 failed: error: train_neg_sample_args asks for 23 negatives"
        in first.stdout
    )
    for mode in ("uni5", "pop3"):
        kept = "no epoch was better than the start, which was kept"
        assert f"warning: {mode}: {kept}: S-DPO, sdpo_learning_rate = 0.0" in first.stdout
    assert (
        "5 runs, of which 4 are done already" in again.stdout
        and "run 1 of 1: too many" in again.stdout
    )


def test_the_report_has_what_the_runs_found(experiment):
    folder, *_ = experiment
    report = folder / "report"
    names = {file.name for file in report.iterdir()}
    pictures = {
        f"{name}.{end}"
        for name in (
            "bars-uni5",
            "bars-pop3",
            "groups-uni5",
            "groups-pop3",
            "by-sdpo_learning_rate",
            "curves",
            "hardest-negative",
            "time",
        )
        for end in ("png", "svg")
    }
    texts = {"table.md", "table.csv", "table.tex", "groups.csv", "pairs.csv"}
    texts |= {"results.jsonl", "report.html"}
    assert names == texts | pictures
    lines = [json.loads(line) for line in (report / "results.jsonl").read_text().splitlines()]
    rows = ["Pop", *(f"S-DPO, sdpo_learning_rate = {rate}" for rate in (0.0, 0.01))]
    assert [line["name"] for line in lines] == rows
    table = pd.read_csv(report / "table.csv").set_index(["candidates", "model", "metric"])
    for run in (folder / "saved" / "runs").glob("*/result.json"):
        result = json.loads(run.read_text())
        settings = result["settings"]
        if result["model"] == "SDPO-LLM" and settings["objective"] != "sdpo":
            continue
        rate = settings.get("sdpo_learning_rate")
        name = "Pop" if result["model"] == "Pop" else f"S-DPO, sdpo_learning_rate = {rate}"
        ranks = pd.read_csv(run.parent / "ranks.csv")
        for mode in ("uni5", "pop3"):
            found = ranks[(ranks.candidates == mode) & (ranks.stage == list(result["stages"])[-1])]
            for metric in ("NDCG@5", "HR@1"):
                assert table.loc[(mode, name, metric), "mean"] == pytest.approx(
                    metric_of_ranks(metric, found["rank"]).mean(), rel=1e-5
                )
    groups = pd.read_csv(report / "groups.csv")
    parts = groups.assign(sum=groups["mean"] * groups["targets"])
    sums = parts.groupby(["candidates", "model", "metric"])[["sum", "targets"]].sum()
    whole = table.loc[sums.index, "mean"].to_numpy()
    np.testing.assert_allclose(sums["sum"] / sums["targets"], whole, rtol=1e-4)
    assert len(sums) == len(table)
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and "http" not in page.replace(
        "http-equiv", ""
    )
    assert "Warning: too many, seed 1 failed" in page and "not the same training targets" in page


def test_what_others_published_stands_in_the_table_of_the_first_candidates(experiment):
    folder, first, _ = experiment
    shown, other = first.stdout[first.stdout.index("| uni5") :].split("| pop3")
    assert "| HR@1 0.25 (1) |" in shown and "\n(1) A paper\n" in shown
    assert "published" not in other


def test_alignments_begin_from_the_shared_sft(experiment):
    folder, *_ = experiment
    found = [
        json.loads(file.read_text()) for file in (folder / "saved" / "runs").glob("*/result.json")
    ]
    aligned = [result for result in found if "sdpo" in result["stages"]]
    assert (
        len(aligned) == 2 and len({result["settings"]["sft_checkpoint"] for result in aligned}) == 1
    )
    (sft,) = {result["settings"]["sft_checkpoint"] for result in aligned}
    before = json.loads((folder / sft).parent.joinpath("result.json").read_text())
    for result in aligned:
        assert (
            result["stages"]["sft"]["test"] == before["test_result"]
            and result["stages"]["sft"]["targets"] == 0
        )


class Unchanged(Inputs):
    """Of runs that are pretended, and read nothing."""

    def changed(self, *_, **__):
        return None

    changed_now = changed


UNCHANGED = Unchanged(None, {}, {})


def a_run(name, identity, start=None, inputs=UNCHANGED):
    return Run(name, "SDPO-LLM", "toy", 1, {"seed": 1}, identity, start, inputs)


def finish(runner, run, result=None):
    """What a run leaves: a result, ranks, and a sealed checkpoint."""
    folder = runner.folder(run)
    (folder / "sft").mkdir(parents=True)
    (folder / "ranks.csv").write_text("user,item,rank\n")
    (folder / "sft" / "model.safetensors").write_text("weights")
    seal(folder / "sft")
    write_result(folder, result or {}, ["ranks.csv"])


class Pretended(Runner):
    """Ends runs at once; those in ``failing`` without a result."""

    def __init__(self, store, failing=(), result=None):
        super().__init__(store)
        self.failing, self.result, self.commands = failing, result, []

    def _work(self, command, log, lock):
        self.commands.append(command)
        (name,) = (
            Path(part.partition("=")[2]).stem
            for part in command
            if part.startswith("--config_files")
        )
        if name in self.failing:
            return 1
        shutil.rmtree(self.store / name, ignore_errors=True)
        finish(self, a_run("", name), self.result)
        return 0


def test_what_begins_from_a_failed_run_is_not_tried(tmp_path, capsys):
    sft, other = a_run("sft", "0"), a_run("other", "3")
    runner = Pretended(tmp_path, failing={"0"})
    failures = runner.run_all([a_run("a", "1", sft), a_run("b", "2", sft), other])
    assert [failure.run.name for failure in failures] == ["sft", "a", "b"] and len(
        runner.commands
    ) == 2
    assert "what it begins from failed" in failures[1].why
    assert Runner(tmp_path).done(other) and "run 4 of 4: other" in capsys.readouterr().out


def test_an_interrupted_run_is_resumed_and_one_that_cannot_be_begins_anew(tmp_path, capsys):
    runs = [a_run(name, name) for name in ("whole", "stillborn", "cut", "without", "unsaid")]
    for run in runs:
        (tmp_path / run.name).mkdir()
        if run.name != "unsaid":
            (tmp_path / run.name / "inputs.json").write_text("{}")
        (tmp_path / run.name / "left").write_text("")
        if run.name != "stillborn":
            (tmp_path / run.name / "state").mkdir()
            weights = tmp_path / run.name / "state" / "weights"
            weights.write_text("")
            state = {"tensors": weights.name, "sha256_of_tensors": sha256(weights)}
            write_record(tmp_path / run.name / "state" / "state.json", state)
    (tmp_path / "cut" / "state" / "state.json").write_text("{")
    (tmp_path / "without" / "state" / "weights").unlink()
    runner = Pretended(tmp_path, failing={run.name for run in runs})
    runner.run_all(runs)
    assert [
        any(part.startswith("--resume=") for part in command) for command in runner.commands
    ] == [True, False, False, False, False]
    assert [run.name for run in runs if (tmp_path / run.name).exists()] == ["whole"]
    said = capsys.readouterr().out
    assert (
        "cut, seed 1 begins anew" in said
        and f"{tmp_path}/without/state/weights is missing or damaged" in said
        and f"{tmp_path}/unsaid/inputs.json is missing" in said
    )


@pytest.mark.parametrize("file", ["result.json", "ranks.csv", "sft/model.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "edited", "missing"])
def test_what_is_damaged_is_not_done_and_run_again(tmp_path, capsys, file, harm):
    runner, sft, other = Pretended(tmp_path), a_run("sft", "0"), a_run("other", "1")
    for run in (sft, other):
        finish(runner, run)
    harmed = tmp_path / "0" / file
    content = harmed.read_bytes()
    if harm == "missing":
        harmed.unlink()
    else:
        harmed.write_bytes(
            content[: len(content) // 2] if harm == "cut" else content.replace(b"s", b"t", 1)
        )
    assert (
        runner.run_all([a_run("a", "2", sft), other]) == []
        and runner.run_all([a_run("a", "2", sft), other]) == []
    )
    again = [Path(command[-1].partition("=")[2]).stem for command in runner.commands]
    assert again == ["0", "2"], "the damaged one, and what had not run"
    assert str(harmed) in capsys.readouterr().out or (file, harm) == ("result.json", "missing")


def test_rows_that_share_an_sft_have_begun_from_the_same_weights(tmp_path, capsys):
    """An SFT that was lost and is trained again may have others, as on a GPU."""
    runner, sft = Pretended(tmp_path), a_run("sft", "0")
    aligned = a_run("a", "1", sft)
    finish(runner, sft)
    digest = sha256(tmp_path / "0" / "sft" / "model.safetensors")
    finish(runner, aligned, {"inputs": {"sft_checkpoint/model.safetensors": digest}})
    assert runner.run_all([aligned]) == [] and not runner.commands
    (tmp_path / "0" / "sft" / "model.safetensors").write_text("others")
    seal(tmp_path / "0" / "sft")
    assert not runner.done(aligned)
    assert runner.run_all([aligned]) == [] and len(runner.commands) == 1
    assert "trained again, with other weights" in capsys.readouterr().out


def test_a_finished_row_whose_sft_is_trained_again_is_run_again_with_the_others(tmp_path):
    class Otherwise(Pretended):
        """A GPU, which adds in an order of its own."""

        def _work(self, command, log, lock):
            code = super()._work(command, log, lock)
            for folder in self.store.glob("*/sft"):
                (folder / "model.safetensors").write_text("others")
                seal(folder)
            return code

    runner, sft = Otherwise(tmp_path), a_run("sft", "0")
    before, new = a_run("a", "1", sft), a_run("b", "2", sft)
    finish(runner, sft)
    digest = sha256(tmp_path / "0" / "sft" / "model.safetensors")
    finish(runner, before, {"inputs": {"sft_checkpoint/model.safetensors": digest}})
    shutil.rmtree(tmp_path / "0" / "sft")
    assert runner.run_all([before, new]) == []
    assert [Path(command[-1].partition("=")[2]).stem for command in runner.commands] == list("021")
    assert runner.done(before) and runner.done(new)


def test_a_checkpoint_from_which_nothing_begins_may_be_gone(tmp_path):
    runner, sft = Pretended(tmp_path), a_run("sft", "0")
    aligned = a_run("a", "1", sft)
    for run in (sft, aligned):
        finish(runner, run)
    shutil.rmtree(tmp_path / "0" / "sft")
    assert runner.run_all([aligned]) == [] and not runner.commands


def test_a_run_that_read_something_else_does_not_count(ring, tmp_path, capsys):
    config = RunConfig("Pop", "toy", config_dict=ring)
    inputs = Inputs.of(config)
    run, item = a_run("a", "1", inputs=inputs), tmp_path / "data" / "toy" / "toy.item"
    store = tmp_path / "runs"
    (failure,) = Pretended(
        store, result={"inputs": inputs.digests | {"data/toy.item": "another"}}
    ).run_all([run])
    assert failure.why.startswith(f"{item} changed while the experiment ran")
    assert "is run again" not in capsys.readouterr().out, "which it is not, in this call"
    runner = Pretended(store, result={"inputs": inputs.digests})
    assert not runner.done(run) and runner.run_all([run]) == [] and len(runner.commands) == 1
    item.write_text(item.read_text().replace("red", "pink"))
    (failure,) = runner.run_all([run, other := a_run("b", "2", inputs=inputs)])
    assert (
        failure.run is other
        and failure.why.startswith(f"{item} changed since the experiment began")
        and len(runner.commands) == 1
    )


RESTARTS = 6

WORKER = """
import os, pathlib, runpy, signal, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep({ending}), os._exit(3)))
runpy.run_path({file!r})["end_with_parent"]()
pathlib.Path("alive").write_text(str(os.getpid()))
time.sleep(60)
"""


class Sleeping(Runner):
    """Runs that take a minute."""

    ending = 0.3

    def _work(self, command, log, lock):
        return super()._work(
            [sys.executable, "-c", WORKER.format(file=worker.__file__, ending=self.ending)],
            log,
            lock,
        )


def begin(work):
    """``work()`` in another process; returns its id when the run that it starts is alive, and
    that run's."""
    process = os.fork()
    if not process:
        code = 70
        try:
            with endings():
                work()
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return process, int(until(lambda: Path("alive").exists() and Path("alive").read_text()))


def until(condition):
    for _ in range(500):
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def gone(process):
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_run_ends_with_its_experiment_and_holds_the_lock_until_then(tmp_path, capsys):
    parent, run = begin(lambda: Sleeping(tmp_path).run_all([a_run("a", "1")]))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    runner, began = Pretended(tmp_path), time.monotonic()
    held = not gone(run)
    assert runner.run_all([a_run("a", "1")]) == [] and gone(run), "only then is the folder free"
    assert time.monotonic() - began < 30, "it was told to end"
    assert (
        not held or "waiting for the process that is at this run already" in capsys.readouterr().out
    )


WRITER = """
import fcntl, os, pathlib, runpy, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), os._exit(3)))
runpy.run_path({file!r})["end_with_parent"]()
folder = pathlib.Path({folder!r})
try:
    fcntl.flock(alone := open({folder!r} + ".busy", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    pathlib.Path({folder!r} + ".two").touch()
time.sleep(0.3)
folder.mkdir(exist_ok=True)
(folder / "written").touch()
"""


class Writing(Runner):
    """Runs of a third of a second that say if two are in one folder."""

    def _work(self, command, log, lock):
        name = Path(log.name).stem
        code = super()._work(
            [
                sys.executable,
                "-c",
                WRITER.format(file=worker.__file__, folder=str(self.store / name)),
            ],
            log,
            lock,
        )
        if not code:
            shutil.rmtree(self.store / name)
            finish(self, a_run("", name))
        return code


def test_an_experiment_killed_at_any_instant_goes_on_alone(tmp_path):
    runs, draw = [a_run(name, name) for name in "abcdef"], np.random.default_rng(0)
    for _ in range(RESTARTS):
        parent = os.fork()
        if not parent:
            try:
                Writing(tmp_path, jobs=2).run_all(runs)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 0.7))
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    runner = Writing(tmp_path, jobs=2)
    assert (
        runner.run_all(runs) == []
        and all(map(runner.done, runs))
        and not list(tmp_path.glob("*.two"))
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_experiment_ends_its_runs_and_says_how_to_go_on(
    tmp_path, capfd, number, code
):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent, run = begin(
        lambda: Sleeping(tmp_path, jobs=2).run_all(
            [a_run("a", "1"), a_run("b", "2"), a_run("c", "3")]
        )
    )
    os.kill(parent, number)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == code and gone(run)
    said, last = capfd.readouterr()
    assert "runs that save their state and end" in said and "run 3 of 3" not in said
    assert last.endswith(
        f"stopped by {number.name}; the same command goes on from here: what is done is kept.\n"
    )


def test_two_experiments_at_one_run_do_it_once(tmp_path):
    class Slow(Pretended):
        def _work(self, command, log, lock):
            time.sleep(0.3)
            return super()._work(command, log, lock)

    runners = [Slow(tmp_path), Slow(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda runner: runner.run_all([a_run("a", "1")]), runners)) == [[], []]
    assert len(runners[0].commands + runners[1].commands) == 1


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(
        UserError, match="saved/runs must be a folder that can be written: Not a directory"
    ):
        Pretended(tmp_path / "saved" / "runs").run_all([a_run("a", "1")])


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (failure,) = Pretended(tmp_path).run_all([a_run("a", "1")])
    assert (
        "1.lock must be on a file system with locks (flock), and this one says: No locks available"
        in failure.why
    )


def test_trust_is_an_argument_and_stands_in_no_file(tmp_path):
    run, runner = a_run("a", "1"), Pretended(tmp_path)
    runner.run_all([replace(run, settings=run.settings | {"trust_remote_code": True})])
    assert (
        "--trust_remote_code=True" in runner.commands[0]
        and "trust_remote_code" not in (tmp_path / "1.yaml").read_text()
    )


def test_how_a_run_ended_is_said_as_it_was(tmp_path, monkeypatch):
    assert (
        runner_module._why(-9, "step 3", tmp_path)
        == "killed by SIGKILL, such as for want of memory, after: step 3"
    )
    assert runner_module._why(-15, "step 3", tmp_path) == "killed by SIGTERM, after: step 3"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert (
        runner_module._why(1, "step 3", tmp_path)
        == f"the disk that holds {tmp_path} is full; the last line was: step 3"
    )


@pytest.mark.parametrize(
    ("of_all", "of_sft"),
    [({}, {}), ({"popularity_discount": 1.0}, {}), ({}, {"popularity_discount": [0.5]})],
)
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
            {
                "name": "SFT",
                "settings": {"objective": "sft"},
                "tune": {"sft_learning_rate": [0.01, 0.02], **of_sft},
            },
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

    class Scored(Runner):
        def run_all(self, runs):
            for run in runs:
                value = run.settings.get(
                    "learning_rate", run.settings.get("beta", run.settings.get("sft_learning_rate"))
                )
                tried.append(value)
                self.folder(run).mkdir(parents=True)
                judged = [
                    {"valid": {"ndcg@5": score}, "test": {"ndcg@5": -score}}
                    for score in scores[value]
                ]
                stage = judged[0] | {"candidates": dict(zip(["uni5", "pop3"], judged, strict=True))}
                result = {
                    "stages": {"fit": stage},
                    "settings": {"valid_metric": "NDCG@5", "valid_metric_bigger": True},
                }
                write_result(self.folder(run), result | {"inputs": run.inputs.digests}, [])
            return []

    found, failures = tune(
        Experiment.load(tmp_path / "try.yaml"), Scored(tmp_path / "runs"), tmp_path / "out"
    )
    assert not failures and tried == [0.1, 0.3, 0.01, 0.02, 1.0, 3.0]
    assert [entry.settings for entry in found.entries()] == [
        {"learning_rate": 0.1},
        {"sft_learning_rate": 0.02, "beta": 3.0},
        {"objective": "sft"},
        {
            "objective": "sft",
            "sft_learning_rate": 0.02,
            **{key: value for key, (value,) in of_sft.items()},
        },
        {},
    ]
    sft, sdpo = (next(run for run in plan(found) if run.name == name) for name in ("SFT", "S-DPO"))
    assert sdpo.start.settings["sft_learning_rate"] == 0.02, (
        "what is aligned is the SFT that was chosen"
    )
    assert (sdpo.start.identity == sft.identity) == (not of_all and not of_sft), (
        "but that an alignment begins from one without discount"
    )
    kept = yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text())
    assert kept["GRU"]["best"] == {"learning_rate": 0.1} and len(kept["S-DPO"]["tries"]) == 2
    assert np.isclose(kept["S-DPO"]["tries"][1]["valid"], 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": {"sdpo_learning_rate": [0.1, -1.0]}}, "run 'S-DPO': sdpo_learning_rate=-1.0"),
        (
            {"tune": {"beta": [1.0, 3.0]}, "settings": {"eval_step": 0}},
            "run 'S-DPO': --tune looks at the validation set",
        ),
        (  # as many tries, of which all are one
            {"tune": {"beta": [1.0, 3.0]}, "settings": {"objective": "sft"}},
            "tune of run 'S-DPO': {'beta': 3.0} is the same run as {'beta': 1.0}",
        ),
        (  # with what the SFT would hand on
            {"settings": {"prompt_style": "candidates"}},
            "run 'S-DPO': train_neg_sample_args.sample_num=4: .* among the 4 candidates",
        ),
    ],
)
def test_all_tries_are_checked_before_the_first(ring, tmp_path, change, message):
    settings = {key: value for key, value in ring.items() if key != "eval_args"}
    settings |= {"train_neg_sample_args": {"sample_num": 4}}
    gru = {"name": "GRU", "model": "GRU4Rec", "tune": {"learning_rate": [0.1, 0.2]}}
    in_text = {"objective": "sft", "prompt_style": "candidates"}
    sft = {"name": "SFT", "settings": in_text, "tune": {"prompt_candidates": [6, 4]}}
    content = {
        "dataset": "toy",
        "candidates": ["uni5"],
        "settings": settings,
        "tries": 2,
        "runs": [gru, sft, {"name": "S-DPO"} | change],
    }
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))

    class Unwanted(Runner):
        def run_all(self, runs):
            raise AssertionError(runs)

    with pytest.raises(ValueError, match=message):
        tune(Experiment.load(tmp_path / "try.yaml"), Unwanted(tmp_path / "runs"), tmp_path / "out")


def test_what_a_row_tunes_no_argument_sets(ring, tmp_path):
    settings = {key: value for key, value in ring.items() if key != "eval_args"}
    row = {"name": "GRU", "model": "GRU4Rec", "tune": {"learning_rate": [0.1, 0.2]}}
    content = {"dataset": "toy", "candidates": ["uni5"], "settings": settings, "runs": [row]}
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"learning_rate=0.5 is for every run, and run 'GRU' tunes"):
        run_experiment(tmp_path / "try.yaml", tmp_path / "out", {"learning_rate": 0.5}, search=True)


def test_what_a_row_varies_its_sft_does_not_hand_on(ring, tmp_path):
    settings = {key: value for key, value in ring.items() if key != "eval_args"}
    content = {
        "dataset": "toy",
        "candidates": ["uni5"],
        "settings": settings | {"MAX_ITEM_LIST_LENGTH": 6},
        "tries": 2,
        "runs": [
            {
                "name": "SFT",
                "settings": {"objective": "sft"},
                "tune": {
                    "MAX_ITEM_LIST_LENGTH": [4, 6],
                    "train_neg_sample_args": [{"sample_num": 5}],
                },
            },
            {"name": "S-DPO", "vary": {"MAX_ITEM_LIST_LENGTH": [6, 8]}},
            {"name": "DPO", "settings": {"objective": "dpo"}},
            {"name": "parts", "vary": {"train_neg_sample_args.sample_num": [2, 3]}},
            {"name": "less", "vary": {"popularity_discount": [0.0, 1.0]}},
        ],
    }
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))

    class Shortest(Runner):
        def run_all(self, runs):
            for run in runs:
                valid = {"ndcg@5": 1 / run.settings["MAX_ITEM_LIST_LENGTH"]}
                stage = {"valid": valid, "candidates": {"uni5": {"valid": valid}}}
                metric = {"valid_metric": "NDCG@5", "valid_metric_bigger": True}
                result = {"stages": {"sft": stage}, "settings": metric}
                self.folder(run).mkdir(parents=True, exist_ok=True)
                write_result(self.folder(run), result | {"inputs": run.inputs.digests}, [])
            return []

    chosen, _ = tune(Experiment.load(tmp_path / "try.yaml"), Shortest(tmp_path), tmp_path / "out")
    lengths = {entry.name: entry.settings["MAX_ITEM_LIST_LENGTH"] for entry in chosen.entries()}
    assert lengths == {
        "SFT": 4,
        "S-DPO, MAX_ITEM_LIST_LENGTH = 6": 6,
        "S-DPO, MAX_ITEM_LIST_LENGTH = 8": 8,
        "DPO": 4,
        "parts, sample_num = 2": 4,
        "parts, sample_num = 3": 4,
        "less, popularity_discount = 0.0": 4,
        "less, popularity_discount = 1.0": 4,
    }
    numbers = [
        entry.settings["train_neg_sample_args"]["sample_num"]
        for entry in chosen.entries()
        if entry.name.startswith("parts")
    ]
    assert numbers == [2, 3], "although the SFT has a number of its own"


def test_the_time_that_is_left_has_no_sixtieth_minute():
    left = [SimpleNamespace(name="a"), SimpleNamespace(name="new")]
    for minutes, told in [(59.7, "1 h 59 min"), (59.9, "2 h 0 min"), (0.9, "0 h 2 min")]:
        assert _time_left(left, {"a": 60 * minutes}, 1) == f", about {told} left"
    assert _time_left(left, {"a": 3600.0}, 2) == ", about 1 h 0 min left"
    assert _time_left(left, {}, 1) == ""


@pytest.mark.parametrize(("set_by_user", "given"), [(None, "3"), ("2", "2")])
def test_a_run_gets_its_share_of_the_cores_unless_the_user_says(monkeypatch, set_by_user, given):
    """Of those that a scheduler leaves, not of the machine's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as lock:
        says = "import os, sys; sys.stdout.write(os.environ['OMP_NUM_THREADS'])"
        assert Runner(Path("saved"), 2)._work([sys.executable, "-c", says], log, lock) == 0
        log.seek(0)
        assert log.read().decode() == given
