"""A run's folder: what is in it, whose it is, and what can be done with one that was left."""

import copy
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from recbole_sdpo import compat, quick_start
from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.result import read_result
from recbole_sdpo.trainer import checkpoint, folder, sdpo_trainer, state, step_file
from recbole_sdpo.trainer.stage import Stage
from recbole_sdpo.trainer.step_file import StepFile

SMALL = {
    "sft_epochs": 2,
    "sdpo_epochs": 1,
    "max_train_targets": 60,
    "save_minutes": 0.0,
    "more_candidates": ["pop5"],
    "stopping_step": 9,
}


class Killed(Exception):
    pass


def run(settings, model="SDPO-LLM", **more):
    return quick_start.run(model, "toy", config_dict=settings | more)


def killed(monkeypatch, settings, where, name, calls=0, **more):
    """Begin a run that dies as ``where.name`` is called, after so many calls that work."""
    left, act = [calls], getattr(where, name)

    def dies(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return act(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dies)
        with pytest.raises(Killed):
            run(settings, **more)


@pytest.mark.parametrize(
    ("device", "offload", "launched", "backend"),
    [
        ("cuda", True, True, {"backend": "cuda:nccl,cpu:gloo"}),
        ("cuda", False, True, {}),
        ("cuda", True, False, {}),
        ("cpu", True, True, {}),  # accelerate has gloo there, and takes no other name
    ],
)
def test_what_the_host_holds_of_a_gpus_model_is_summed_by_gloo(
    monkeypatch, device, offload, launched, backend
):
    class Config(dict):
        settings = SimpleNamespace(offload=offload)

    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(quick_start, "PartialState", lambda **kwargs: kwargs)
    joined = quick_start._process_group(Config(device=torch.device(device)))
    # NCCL's ten minutes are less than the state of a large model takes to write.
    waits = {"timeout": timedelta(hours=1)} if launched else {}
    assert joined == {"cpu": device == "cpu", **waits, **backend}


def weights(folder):
    return {
        file.parent.name: file.read_bytes() for file in Path(folder).glob("s*/model.safetensors")
    }


def test_baselines_that_begin_in_one_second_test_their_own_weights(ring, monkeypatch):
    """The second one trains and writes between the first one's training and its test."""
    alone = run(ring, "BPR", epochs=3, run_dir="alone")
    for module in ("recbole.trainer.trainer", "recbole_sdpo.trainer.folder"):
        monkeypatch.setattr(f"{module}.get_local_time", lambda: "now")
    load, others = compat.load_best, []

    def meanwhile(trainer):
        if not others:
            others.append(None)
            others.append(run(ring, "BPR", epochs=1, seed=7))
        load(trainer)

    monkeypatch.setattr(compat, "load_best", meanwhile)
    assert (
        run(ring, "BPR", epochs=3)["stages"]["fit"]["candidates"]
        == alone["stages"]["fit"]["candidates"]
    )
    assert {folder.name for folder in Path("saved").iterdir()} == {"BPR-toy-now", "BPR-toy-now-2"}
    assert all(len(list(folder.glob("*.pth"))) == 1 for folder in Path("saved").iterdir())


@pytest.mark.parametrize("model", ["SDPO-LLM", "GRU4Rec"])
def test_what_a_run_that_has_ended_leaves(ring, tmp_path, model):
    before = os.umask(0o027)
    try:
        result = run(ring | (SMALL if model == "SDPO-LLM" else {"epochs": 2}), model, run_dir="run")
    finally:
        os.umask(before)
    theirs = {file.name for file in Path("run").glob("*.pth")}
    assert len(theirs) == (model == "GRU4Rec")
    own = {"sft", "sdpo", "steps.csv"} if model == "SDPO-LLM" else theirs
    assert {file.name for file in Path("run").iterdir()} == {
        "result.json",
        "ranks.csv",
        "run.log",
        "tensorboard",
        "inputs.json",
    } | own
    # nothing lies beside it
    assert {file.name for file in Path().iterdir()} - {"data", "run"} <= {".cache"}
    assert read_result(Path("run")) == result and set(result["files"]) == {"ranks.csv"} | (
        {"steps.csv"} & own
    )
    modes = {oct(file.stat().st_mode & 0o777) for file in Path("run").rglob("*")}
    assert modes == {"0o640", "0o750"}
    for file in theirs:
        # as data, without unpickling
        assert set(torch.load(f"run/{file}")) == {"state_dict", "other_parameter"}
    for again in (
        {"run_dir": "run"},
        {"resume": "run"} if model == "SDPO-LLM" else {"run_dir": "run"},
    ):
        with pytest.raises(UserError, match="that has ended|that run has ended"):
            run(ring | SMALL if model == "SDPO-LLM" else ring, model, **again)


@pytest.mark.parametrize("state", ["info", "error"])
def test_warnings_from_before_there_is_a_log_are_in_it(ring, state):
    """The check of settings warns before the run has a folder."""
    given = ring | SMALL | {"epochs": 7, "state": state}
    warned = "WARNING  epochs=7 has no effect on SDPO-LLM"
    for name in ("a", "b"):  # the first one of a process, and one that meets its handlers
        run(given, run_dir=name)
        assert Path(name, "run.log").read_text().count(warned) == (state == "info")
    assert not [each for each in getLogger().handlers if isinstance(each, compat.EarlyRecords)]


def test_whoever_runs_a_model_has_the_root_logger_back_as_it_was(ring):
    root = getLogger()
    before = list(root.handlers), root.level
    run(ring, "Pop", run_dir="a", state="error")
    assert (list(root.handlers), root.level) == before
    root.handlers, handlers = [], root.handlers  # nobody listens: the run has a screen of its own
    try:
        run(ring, "Pop", run_dir="b", state="info")
        assert root.handlers == []
    finally:
        root.handlers = handlers


def test_early_warnings_are_printed_where_nobody_listens(capsys):
    root = getLogger()
    before, root.handlers = root.handlers, []
    try:
        with compat.early_records() as early:
            getLogger("x").warning("mind this")
        assert root.handlers == []
    finally:
        root.handlers = before
    assert [record.message for record in early.records if record.getMessage()] == ["mind this"]
    assert capsys.readouterr().err == "mind this\n"


def test_each_run_of_a_process_has_a_log_of_its_own(ring):
    for name, level in (("quiet", "error"), ("a", "info"), ("b", "info")):
        run(ring, "Pop", run_dir=name, state=level)
    counts = [Path(name, "run.log").read_text().count("test uni5") for name in ("quiet", "a", "b")]
    assert counts == [0, 1, 1]
    assert list(Path("a/tensorboard").iterdir()) and list(Path("b/tensorboard").iterdir())
    assert not set(Path("a/tensorboard").iterdir()) & set(Path("b/tensorboard").iterdir())


def test_a_run_that_died_before_its_first_state_is_in_nobodys_way(ring, monkeypatch):
    whole = run(ring | SMALL, run_dir="whole")
    killed(monkeypatch, ring | SMALL, sdpo_trainer, "save_state", run_dir="cut")
    assert not Path("cut/sft").exists()
    shutil.copytree("cut", "copy")
    for again in ({"run_dir": "cut"}, {"resume": "copy"}):
        assert run(ring | SMALL, **again)["test_result"] == whole["test_result"]
    assert weights("cut") == weights("copy") == weights("whole")


def test_what_is_not_a_runs_folder_is_not_begun_in(ring):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("")
    with pytest.raises(UserError, match="resume='mine' holds no state/state.json"):
        run(ring | SMALL, resume="mine")
    Path("mine/sft").mkdir()
    with pytest.raises(UserError, match="run_dir='mine' holds a run already"):
        run(ring | SMALL, run_dir="mine")
    with pytest.raises(UserError, match="resume='mine' holds no .*give sft_checkpoint='mine/sft'"):
        run(ring | SMALL, resume="mine")


def test_what_a_killed_run_had_begun_is_waited_for(tmp_path):
    """A process that prepares batches has inherited the lock, and ends a little later."""
    (tmp_path / "run.log").touch()
    code = (
        "import fcntl, sys, time; log = open(sys.argv[1]); fcntl.flock(log, 2); "
        "print(flush=True); time.sleep(1)"
    )
    orphan = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run.log"], stdout=subprocess.PIPE
    )
    orphan.stdout.readline()
    with folder.alone_in(tmp_path):
        assert orphan.wait(0.5) == 0


def test_two_runs_are_never_in_one_folder(ring, monkeypatch):
    monkeypatch.setattr(folder, "ORPHANS_S", 0.2)
    Path("run").mkdir()
    with open("run/run.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run is at work in 'run'"):
            run(ring | SMALL, run_dir="run")
    run(ring, "Pop", run_dir="run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from tests.conftest import TINY, write_dataset

    folder = tmp_path_factory.mktemp("whole")
    sequences = [[1 + (start + step) % 24 for step in range(10)] for start in range(24)]
    data = write_dataset(
        folder / "data",
        sequences,
        {item: f"{'abcdef'[item % 6]}{'wxyz'[item // 7]} film" for item in range(1, 25)},
    )
    settings = (
        TINY
        | SMALL
        | {
            "data_path": str(data),
            "scratch_dropout": 0.1,
            "sft_learning_rate": 0.01,
            "sft_tokens_per_batch": 300,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytest"])
        patch.chdir(folder)
        return settings, run(settings, run_dir="whole"), folder / "whole"


PLACES = {
    "between sdpo's checkpoint and its state": (sdpo_trainer, "save_state", 7),
    "while a checkpoint is written": (checkpoint, "seal", 1),
    "at a step of sft": (Stage, "_step", 1),
    "before the test of sft": (quick_start, "_test", 0),
    "before the last test": (quick_start, "_test", 1),
    "before the result": (quick_start, "write_result", 0),
}


@pytest.mark.parametrize(
    ("place", "peft"), [*((place, "none") for place in PLACES), ("at a step of sft", "lora")]
)
def test_wherever_a_run_dies_it_goes_on_to_the_same_bits(whole, monkeypatch, place, peft):
    settings, result, folder = whole
    if peft == "lora":
        settings = settings | {"peft": "lora", "fixed_negatives": True}
        result, folder = run(settings, run_dir="whole"), Path("whole")
    killed(monkeypatch, settings, *PLACES[place], run_dir="cut")
    again = run(settings, resume="cut")
    assert weights("cut") == weights(folder)
    for file in ("ranks.csv", "steps.csv"):
        assert Path("cut", file).read_bytes() == (folder / file).read_bytes()
    for stage, values in again["stages"].items():
        times = {"wall_s": 0, "train_s": 0}
        assert values | times == result["stages"][stage] | times


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_finished_alignment_with_more_candidates_goes_on(whole, monkeypatch, peft):
    settings = whole[0] | {"peft": peft}
    killed(monkeypatch, settings, quick_start, "_test", 1, run_dir="cut")
    assert run(settings, resume="cut")["stages"]["sdpo"]["candidates"]["pop5"]


@pytest.mark.parametrize(
    "file", ["state/state.json", "selection/sdpo-pop5.safetensors", "sft/model.safetensors"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "lost"])
def test_damage_is_seen_and_named(whole, monkeypatch, file, damage):
    killed(monkeypatch, whole[0], quick_start, "_test", 1, run_dir="cut")
    path = Path("cut", file)
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]
            if damage == "flipped"
            else content[:-9]
        )
    lost_state = (
        "holds no state/state.json"
        if file == "state/state.json" and damage == "lost"
        else path.name
    )
    with pytest.raises(UserError, match=lost_state):
        run(whole[0], resume="cut")


@pytest.mark.parametrize("damage", ["flipped", "cut", "lost"])
def test_damaged_tensors_of_a_state_are_seen(whole, monkeypatch, damage):
    killed(monkeypatch, whole[0], Stage, "_step", 1, run_dir="cut")
    (path,) = Path("cut/state").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(
        content[:-1] + bytes([content[-1] ^ 1]) if damage == "flipped" else content[:-9]
    )
    if damage == "lost":
        path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing or damaged"):
        run(whole[0], resume="cut")


def test_a_damaged_checkpoint_is_not_trained_from(whole, tmp_path):
    shutil.copytree(whole[2] / "sft", "sft")
    file = Path("sft/model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"sft/model.safetensors is damaged"):
        run(whole[0], sft_checkpoint="sft")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "full"),
    ],
)
def test_a_full_disk_leaves_the_state_of_before_and_says_how_to_go_on(whole, monkeypatch, error):
    save, left = state.save_file, [2]

    def full(tensors, file):
        left[0] -= 1
        save(tensors, file)
        if left[0] < 0:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(OSError) as raised:
            run(whole[0], run_dir="cut")
    assert raised.value.errno == errno.ENOSPC and "cut/state" in raised.value.filename
    assert raised.value.__notes__ == ["go on with resume='cut'"]
    assert len(list(Path("cut/state").iterdir())) == 2
    run(whole[0], resume="cut")
    assert weights("cut") == weights(whole[2])


def test_a_run_goes_on_with_its_best_weights_alone(ring, monkeypatch):
    """Its first epoch is the best one; without its checkpoint there is nothing to go on from."""
    scores = iter([0.9, *[0.1] * 99])
    monkeypatch.setattr(
        sdpo_trainer.SDPOTrainer, "_valid_epoch", lambda *_: (next(scores), {"ndcg@5": 0.5})
    )
    settings = ring | {
        "objective": "sft",
        "sft_epochs": 4,
        "max_train_targets": 60,
        "stopping_step": 9,
        "eval_args": {"mode": "uni5"},
    }
    killed(monkeypatch, settings, Stage, "run_epoch", calls=3, run_dir="run")
    os.rename("run/sft", "run/sft.old")  # as where it dies between the two renames
    shutil.copytree("run", "without")
    shutil.rmtree("without/sft.old")
    before = Path("run/sft.old/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="without/sft"):
        run(settings, resume="without")
    run(settings, resume="run")
    assert weights("run") == {"sft": before}


def test_an_older_checkpoint_has_no_seal_and_is_warned_of(ring, caplog):
    settings = ring | {"objective": "sft", "sft_epochs": 1, "max_train_targets": 60}
    run(settings, run_dir="old")
    Path("old/sft/SHA256SUMS").unlink()
    run(settings | {"sft_checkpoint": "old"}, run_dir="new")
    assert "checkpoint 'old/sft' has no SHA256SUMS" in caplog.text and weights("new") == weights(
        "old"
    )


def test_rows_of_steps_stay_byte_for_byte(tmp_path, caplog):
    steps, path = StepFile(tmp_path, None), tmp_path / "steps.csv"
    for step in range(3):
        steps.write("sft", step, step, {"loss": 0.1 + step})
    mark, content = steps.mark(), path.read_bytes()
    steps.write("sft", 3, 3, {"loss": 1.0})
    path.write_bytes(path.read_bytes() + b"sft,4")  # cut short as the run died
    again = StepFile(tmp_path, mark)
    assert path.read_bytes() == content and again.mark() == mark
    for damaged in (b"", content[:-1], content.replace(b"2.1", b"2.2"), content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"steps.csv is damaged.*put it back, or delete it to go on"
        ):
            StepFile(tmp_path, mark)
    path.unlink()
    again = StepFile(tmp_path, mark)
    assert "steps.csv is not there; the run goes on without" in caplog.text
    again.write("sft", 3, 3, {"loss": 1.0})
    assert pd.read_csv(path)["step"].tolist() == [3]


def test_a_file_of_an_older_version_keeps_its_columns(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(step_file, "HEAD", b"stage,step,targets,loss\n")
        mark = StepFile(tmp_path, None).mark()
    StepFile(tmp_path, mark).write("sdpo", 0, 0, {"loss": 0.5, "kl": 0.1})
    rows = pd.read_csv(tmp_path / "steps.csv").to_dict("records")
    assert rows == [{"stage": "sdpo", "step": 0, "targets": 0, "loss": 0.5}]


def test_the_curves_can_be_read(whole):
    steps = pd.read_csv(whole[2] / "steps.csv")
    assert (
        set(steps.stage) == {"sft", "sdpo"}
        and json.loads((whole[2] / "result.json").read_text())["files"]["steps.csv"]
    )


def test_a_baseline_that_begins_again_leaves_one_file_of_weights(ring):
    """RecBole names it by the time, so that one that was killed had another name."""
    Path("again").mkdir()
    Path("again/run.log").touch()
    Path("again/BPR-Jan-01-2026_00-00-00.pth").touch()
    run(ring, "BPR", run_dir="again", epochs=1)
    (weights,) = Path("again").glob("*.pth")
    assert weights.stat().st_size > 0


@pytest.mark.parametrize(
    "name",
    [
        "selection",
        "state",
        "ranks.csv",
        "steps.csv",
        "inputs.json",
        "sft.old",
        "sdpo.part",
        "a.pth",
    ],
)
def test_what_a_run_would_write_over_stays_a_users(ring, name):
    Path("mine", name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"run_dir='mine' holds {name}, which no run has put there"):
        run(ring, run_dir="mine")
    assert [path.name for path in Path("mine").iterdir()] == [name]


def test_a_run_goes_on_in_its_own_folder_alone(ring, tmp_path, monkeypatch):
    killed(monkeypatch, ring | SMALL, Stage, "_step", 1, run_dir="cut")
    with pytest.raises(UserError, match="run_dir='other' is another folder than resume='cut'"):
        run(ring | SMALL, resume="cut", run_dir="other")
    with pytest.raises(UserError, match="that run had sft_checkpoint=None .now 'cut'."):
        run(ring | SMALL, resume="cut", sft_checkpoint="cut")
    assert run(ring | SMALL, resume="cut", run_dir=str(tmp_path / "cut"))["test_result"]


def test_a_checkpoint_of_a_run_that_was_interrupted_is_named(ring, monkeypatch, caplog):
    killed(monkeypatch, ring | SMALL, Stage, "run_epoch", 1, run_dir="cut")
    said = "checkpoint 'cut/sft' is of a run that was interrupted"
    caplog.clear()
    run(ring | SMALL, sft_checkpoint="cut", run_dir="from")
    assert said in caplog.text
    caplog.clear()
    run(ring | SMALL, sft_checkpoint="from", run_dir="again")
    assert "interrupted" not in caplog.text
    Path("cut/state/state.json").write_text("{")  # it says nothing; the weights are whole
    caplog.clear()
    run(ring | SMALL, sft_checkpoint="cut", run_dir="once-more")
    assert said in caplog.text


def test_an_sft_that_had_other_targets_is_warned_of(ring, caplog):
    """Those of this run's test may be among them."""
    split = {"split": {"RS": [0.96, 0.02, 0.02]}, "group_by": "none"}
    whole = {"eval_args": ring["eval_args"] | split}
    sft = ring | SMALL | {"objective": "sft", "more_candidates": []}
    run(sft | whole, run_dir="all")
    run(sft, run_dir="own")
    run(sft, sft_checkpoint="all", run_dir="heir")
    run(sft, sft_checkpoint="heir/sft", run_dir="heirs-heir")
    starts = [("all", True), ("own", False), ("heir", True), ("heirs-heir", True)]
    for start, warned in starts:
        caplog.clear()
        run(sft, sft_checkpoint=start, run_dir=f"from-{start}", sft_learning_rate=0.5)
        assert ("was trained on other events than this run" in caplog.text) is warned
        assert (
            "sft_learning_rate=0.5 has no effect with sft_checkpoint, whose SFT had" in caplog.text
        )


def test_who_gives_one_part_of_a_dictionary_keeps_those_given_before(ring, tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("eval_args: {split: {RS: [0.6, 0.2, 0.2]}}\ntrain_neg_sample_args: {alpha: 2.0}\n")
    b.write_text("train_neg_sample_args: {distribution: popularity}\n")
    config = RunConfig("SDPO-LLM", "toy", [str(a), str(b)], ring | {"eval_args": {"mode": "pop3"}})
    assert config["eval_args"]["split"] == {"RS": [0.6, 0.2, 0.2]}
    assert config["eval_args"]["mode"] == {"valid": "pop3", "test": "pop3"}
    args = config["train_neg_sample_args"]
    assert (args["distribution"], args["alpha"]) == ("popularity", 2.0)
    b.write_text("config_files: a.yaml\n")
    with pytest.raises(UserError, match="must not name config_files"):
        RunConfig("SDPO-LLM", "toy", [str(b)], ring)
    with pytest.raises(UserError, match="'config_file'='a.yaml'; did you mean 'config_files'"):
        RunConfig("SDPO-LLM", "toy", config_dict=ring | {"config_file": "a.yaml"})


@pytest.mark.parametrize("model", ["SDPO-LLM", "BPR", "FM"])
def test_the_callers_dictionary_stays_as_it_is(ring, model):
    """RecBole completes it in place, and the next run would take that for given."""
    own = {"train_neg_sample_args": {"sample_num": 1}, "eval_args": {"mode": "uni5"}}
    settings = ring | own
    before = copy.deepcopy(settings)
    RunConfig(model, "toy", config_dict=settings)
    assert settings == before


def test_a_data_path_counts_for_recboles_own_example_too(tmp_path):
    assert "dataset_example" in RunConfig("Pop", "ml-100k")["data_path"]
    with pytest.raises(UserError, match=f"there is no file {tmp_path}/ml-100k/ml-100k.inter"):
        RunConfig("Pop", "ml-100k", config_dict={"data_path": str(tmp_path)})


def test_targets_that_repeat_the_history_are_warned_of(ring, caplog):
    said = "of the test targets are items that their user has met before"
    run(ring, "Pop", run_dir="a")
    assert said not in caplog.text
    file = Path(ring["data_path"], "toy", "toy.inter")
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *(row for row in rows for _ in "12")]) + "\n")
    run(ring, "Pop", run_dir="b")
    assert f"100% {said}" in caplog.text
    for exclude in (True, False):
        caplog.clear()
        run(ring, "Pop", run_dir=f"c-{exclude}", candidates_exclude_history=exclude)
        assert (said in caplog.text) is exclude
