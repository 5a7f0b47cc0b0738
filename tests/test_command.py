from pathlib import Path

import pytest

from recbole_sdpo import command


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["run_recbole_sdpo.py", *arguments])
    command.main()


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
        ("--model=", "model='' must be a name of letters"),
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


def test_one_setting_with_two_values_is_an_error(monkeypatch):
    with pytest.raises(
        SystemExit, match="error: --seed is given twice, as '1' and as '2'; give it once"
    ):
        call(monkeypatch, "--seed=1", "--seed=2")


def test_what_is_no_fault_of_the_users_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise NotImplementedError

    monkeypatch.setattr(command, "run", broken)
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
    ],
)
def test_reports_of_files_of_one_name_lie_apart(monkeypatch, file, folder):
    seen = []
    monkeypatch.setattr(
        command, "run_experiment", lambda file, output, *_: seen.append(output) or []
    )
    with pytest.raises(SystemExit):
        call(monkeypatch, f"--experiment={file}")
    assert seen == [Path(folder)]


def test_files_and_arguments_reach_the_configuration(monkeypatch, tmp_path, ring):
    import yaml

    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump(ring | {"beta": 0.1, "objective": "sft", "sft_epochs": 0})
    )
    (tmp_path / "b.yaml").write_text("beta: 0.2\n")
    seen = {}
    monkeypatch.setattr(command, "run", lambda *args: seen.update(config=args))
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
    from recbole_sdpo.config import RunConfig

    config = RunConfig(*seen["config"])
    assert config.settings.beta == 0.2 and config.settings.sft.epochs == 0
