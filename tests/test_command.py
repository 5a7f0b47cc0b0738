import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from recbole_sdpo.command import experiment, program, run, script
from recbole_sdpo.config import RunConfig
from recbole_sdpo.errors import UserError
from recbole_sdpo.settings import SETTINGS


def call(monkeypatch, *arguments):
    """The script's way."""
    monkeypatch.setattr("sys.argv", ["run_recbole_sdpo.py", *arguments])
    script.main()


@pytest.mark.parametrize("argument", ["--beta", "0.3", "beta=0.3", "--=0.3"])
def test_an_argument_that_nobody_reads_is_an_error(monkeypatch, argument):
    with pytest.raises(SystemExit, match=r"error: cannot read .*--name=value"):
        call(monkeypatch, "--model=SDPO-LLM", argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--beta=a=b", "beta='a=b' must be a number"),
        ("--run_dir=", "run_dir='' must not be blank"),
        ("--resume= ", "resume=' ' must not be blank"),
        ("--sft_checkpoint=", "sft_checkpoint='' must not be blank"),
        ("--checkpoint_dir=", "checkpoint_dir='' must be text, and not blank"),
        ("--dataset=", "--dataset= is blank; give a name, or leave it out"),
        ("--config_files= ", "--config_files=  is blank"),
        ("--experiment=", "--experiment= is blank"),
        ("--model=", "--model= is blank"),
        ("--seed=self", "seed='self' must be a whole number"),
        (
            "--config_files=none.yaml",
            "config_files='none.yaml' cannot be read: there is no such file.$",
        ),
        (
            "--sft_epochs=two",
            "sft_epochs='two' must be a whole number, 0 or more, or null for what",
        ),
        ("--popularity_discount=inf", "popularity_discount='inf' must be a number, 0 to 1000.$"),
        ("--dataset=../x", "dataset='../x' must be a name without '/'"),
    ],
)
def test_a_value_that_is_none_is_an_error_that_names_the_key(monkeypatch, argument, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        call(monkeypatch, argument)


def test_an_option_of_several_is_blank_if_one_is():
    for checkpoint in ([""], ["run", " "]):
        with pytest.raises(UserError, match="^--checkpoint=.* is blank"):
            run.refuse_blank(SimpleNamespace(checkpoint=checkpoint, k=3))
    run.refuse_blank(SimpleNamespace(checkpoint=["run"], k=3, history=None))


def test_one_setting_with_two_values_is_an_error(monkeypatch):
    with pytest.raises(
        SystemExit, match="error: --seed is given twice, as '1' and as '2'; give it once"
    ):
        call(monkeypatch, "--seed=1", "--seed=2")


def test_what_is_no_fault_of_the_users_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise NotImplementedError

    monkeypatch.setattr(run, "run", broken)
    with pytest.raises(NotImplementedError):
        call(monkeypatch)


def test_settings_are_printed(monkeypatch, capsys):
    call(monkeypatch, "--settings")
    assert "| `sft_tokens_per_batch` | `null` |" in capsys.readouterr().out


def test_a_wrong_setting_ends_in_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="error: Unknown setting 'betta'=0.3; did you mean 'beta'"):
        call(monkeypatch, "--dataset=ml-100k", "--betta=0.3")


def test_a_model_that_is_like_none_is_told_where_models_are_listed(monkeypatch):
    with pytest.raises(SystemExit, match="as listed at https://recbole.io/.*; GRU4Rec is one.$"):
        call(monkeypatch, "--model=my-favourite-model")


@pytest.mark.parametrize(
    ("wrong", "right"), [("GRU5Rec", "GRU4Rec"), ("gru4rec", "GRU4Rec"), ("SDPO-LM", "SDPO-LLM")]
)
def test_an_unknown_model_ends_in_one_line(monkeypatch, wrong, right):
    with pytest.raises(
        SystemExit,
        match=f"error: model='{wrong}' must be SDPO-LLM or a model.*; did you mean '{right}'",
    ):
        call(monkeypatch, f"--model={wrong}")


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("configs/ml-100k/gpu/compare.yaml", "saved/ml-100k/gpu/compare"),
        ("/some/where/mine.yaml", "saved/mine"),
        ("configs.yaml", "saved/configs"),
        ("mine/a.yaml", "saved/mine/a"),
        ("HERE/mine/a.yaml", "saved/mine/a"),
        ("../mine/a.yaml", "saved/a"),
        ("configs/../mine.yaml", "saved/mine"),
        (".", "saved"),  # no file, as the experiment then says
    ],
)
def test_reports_of_files_of_one_name_lie_apart(monkeypatch, file, folder):
    seen = []
    monkeypatch.setattr(
        experiment, "run_experiment", lambda file, output, *_: seen.append(output) or []
    )
    with pytest.raises(SystemExit):
        call(monkeypatch, f"--experiment={file.replace('HERE', str(Path.cwd()))}")
    assert seen == [Path(folder)]


def test_files_and_arguments_reach_the_configuration(monkeypatch, tmp_path, ring):
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump(ring | {"beta": 0.1, "objective": "sft", "sft_epochs": 0})
    )
    (tmp_path / "b.yaml").write_text("beta: 0.2\n")
    seen = {}
    monkeypatch.setattr(run, "run", lambda *args: seen.update(config=args))
    call(
        monkeypatch,
        "--dataset=toy",
        f"--config_files={tmp_path / 'a.yaml'} {tmp_path / 'b.yaml'}",
        "--sft_epochs=0",
    )
    assert seen["config"] == (
        "SDPO-LLM",
        "toy",
        [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")],
    )
    config = RunConfig(*seen["config"])
    assert config.settings.beta == 0.2 and config.settings.sft.epochs == 0


def test_a_file_may_name_the_model_and_the_dataset(monkeypatch):
    Path("a.yaml").write_text("model: Pop\ndataset: toy\n")
    Path("b.yaml").write_text("dataset: other\n")
    Path("of mine.yaml").write_text("dataset: mine\n")
    seen = []
    monkeypatch.setattr(run, "run", lambda *args: seen.append(args[:2]))
    for arguments in (
        ["--config_files=a.yaml"],
        ["--config_files=a.yaml b.yaml"],
        ["--config_files=of mine.yaml"],
        ["--config_files=" + " ".join(["a.yaml"] * 100)],
        ["--config_files=a.yaml", "--model=BPR", "--dataset=third"],
        [],
    ):
        call(monkeypatch, *arguments)
    assert seen == [
        ("Pop", "toy"),
        ("Pop", "other"),
        ("SDPO-LLM", "mine"),
        ("Pop", "toy"),
        ("BPR", "third"),
        ("SDPO-LLM", "ml-100k"),
    ]


def call_program(monkeypatch, *arguments):
    """The program's way; its exit code."""
    monkeypatch.setattr("sys.argv", ["recbole-sdpo", *arguments])
    try:
        return program.main()
    except SystemExit as ended:
        return ended.code


def test_a_run_by_the_program_is_that_of_the_script(monkeypatch, ring, caplog):
    (settings := Path("ring.yaml")).write_text(yaml.safe_dump(ring))
    given = ["--model=BPR", "--dataset=toy", f"--config_files={settings}", "--epochs=1"]
    call(monkeypatch, *given, "--run_dir=script")
    assert not call_program(monkeypatch, "run", *given, "--run_dir=program")
    assert "will not be used" not in caplog.text
    first, second = (
        json.loads(Path(folder, "result.json").read_text()) for folder in ("script", "program")
    )
    assert first["test_result"] == second["test_result"]
    assert second["command"] == ["recbole-sdpo", "run", *given, "--run_dir=program"]


def test_an_experiment_by_the_program(monkeypatch):
    seen = []
    monkeypatch.setattr(experiment, "run_experiment", lambda *args: seen.append(args) or ["one"])
    assert call_program(monkeypatch, "experiment", "my.yaml", "--jobs=2", "--seed=3") == 1
    assert seen == [
        (
            Path("my.yaml"),
            Path("saved/my"),
            {"seed": 3},
            False,
            2,
            "recbole-sdpo experiment my.yaml --jobs=2 --seed=3",
        )
    ]
    said = call_program(monkeypatch, "experiment", "my.yaml", "--dataset=ml-100k")
    assert said.startswith("error: --dataset cannot be given")


def test_the_settings_by_the_program(monkeypatch, capsys):
    assert not call_program(monkeypatch, "settings")
    assert "| `beta` |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=BPR"], "a command comes first, as in: recbole-sdpo run --model=BPR"),
        (["ruin"], "invalid choice: 'ruin'"),
        ([], "required: COMMAND"),
        (["settings", "--beta=1"], "unrecognized arguments: --beta=1"),
        (
            ["recommend", "--checkpoint=x"],
            "one of the arguments --user --history --users is required",
        ),
    ],
)
def test_what_is_no_command_shows_how_to_call_it(monkeypatch, capsys, arguments, message):
    assert call_program(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: recbole-sdpo") and message in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--user=1", "--user=2"], "--user"),
        (["--user=1", "-k", "3", "--k", "5"], "--k"),
        (["--user=1", "-k3", "-k5"], "-k"),
        (["--user=1", "--format", "json", "--format=table"], "--format"),
    ],
)
def test_an_option_is_given_once_whatever_its_name_and_form(monkeypatch, options, named):
    said = call_program(monkeypatch, "recommend", "--checkpoint=a", *options)
    assert said == f"error: {named} is given twice; give it once."


def test_the_script_has_its_options_once_too(monkeypatch):
    with pytest.raises(SystemExit, match="error: --model is given twice; give it once"):
        call(monkeypatch, "--model", "Pop", "--model", "BPR")


def test_a_word_that_no_setting_has_is_named(monkeypatch):
    said = call_program(monkeypatch, "settings", "zzz")
    assert said == "error: No setting has 'zzz' in its name or explanation."


def test_settings_with_a_word(monkeypatch, capsys):
    assert not call_program(monkeypatch, "settings", "Negatives")
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert rows and all("negatives" in row.lower() for row in rows)


def test_of_several_checkpoints_one_must_be_chosen(monkeypatch):
    said = call_program(monkeypatch, "recommend", "--user=1", "--checkpoint", "a", "b")
    assert said == "error: --checkpoint names 2 folders, a and b; give one."


@pytest.mark.parametrize("name", program.COMMANDS)
def test_the_examples_of_a_command_are_right(monkeypatch, capsys, name):
    assert call_program(monkeypatch, name, "--help") == 0
    lines = capsys.readouterr().out.replace("\\\n", " ").split("examples:")[1].splitlines()
    examples = [
        shlex.split(re.split(r" {3,}(?!-)", line.strip())[0].split("|")[0])
        for line in lines
        if line.startswith("  recbole-sdpo")
    ]
    assert len(examples) >= 2
    for program_name, command, *words in examples:
        assert (program_name, command) == ("recbole-sdpo", name)
        seen = []
        module = program.COMMANDS[name]
        monkeypatch.setattr(module, "call", lambda args, rest, seen=seen: seen.extend(rest))
        assert not call_program(monkeypatch, name, *words)
        known = {*SETTINGS, "data_path", "resume", "epochs"}
        assert {word.removeprefix("--").partition("=")[0] for word in seen} <= known


@pytest.mark.parametrize(
    "words",
    [
        ["recbole-sdpo", "settings"],
        ["run_recbole_sdpo.py", "--settings"],
        ["recbole-sdpo", "audit", "lists.jsonl"],
    ],
)
def test_nobody_need_read_on(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    rows = [{"user": user, "target": 1, "candidates": [1, 2, 3]} for user in range(5)]
    Path("lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = (tmp_path / "out").open("w")

    class Closed:
        encoding = "utf-8"
        fileno = out.fileno

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(SystemExit) as end:
        (program if words[0] == "recbole-sdpo" else script).main()
    assert end.value.code == 1


def test_a_dataset_after_a_blank_is_used_without_a_warning(monkeypatch, ring, caplog):
    """argparse takes both forms, and RecBole reads the command line once more."""
    words = ["recbole-sdpo", "run", "--model", "BPR", "--dataset", "toy", "--seed=7", "stray"]
    monkeypatch.setattr("sys.argv", words)
    assert RunConfig("BPR", "toy", config_dict=ring)["seed"] == 7
    assert "[stray] will not be used" in caplog.text  # and nothing else


def test_the_page_of_installing_names_all_commands():
    page = (Path(__file__).parents[1] / "docs" / "install.md").read_text()
    listed = re.search(r"Its commands are (.*);", page)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(program.COMMANDS)
