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


def test_settings_are_printed(monkeypatch, capsys):
    call(monkeypatch, "--settings")
    assert "| `sft_tokens_per_batch` | `1024` |" in capsys.readouterr().out


def test_a_wrong_setting_ends_in_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="error: Unknown setting 'betta'=0.3; did you mean 'beta'"):
        call(monkeypatch, "--dataset=ml-100k", "--betta=0.3")


@pytest.mark.parametrize(("wrong", "right"), [("GRU5Rec", "GRU4Rec"), ("gru4rec", "GRU4Rec"), ("SDPO-LM", "SDPO-LLM")])
def test_an_unknown_model_ends_in_one_line(monkeypatch, wrong, right):
    with pytest.raises(SystemExit, match=f"error: model='{wrong}' cannot be found; did you mean '{right}'"):
        call(monkeypatch, f"--model={wrong}")


@pytest.mark.parametrize(
    ("file", "folder"), [("configs/ml-100k/gpu/compare.yaml", "saved/ml-100k/gpu/compare"), ("/some/where/mine.yaml", "saved/mine")]
)
def test_reports_of_files_of_one_name_lie_apart(monkeypatch, file, folder):
    seen = []
    monkeypatch.setattr(command, "run_experiment", lambda file, output, *_: seen.append(output) or [])
    with pytest.raises(SystemExit):
        call(monkeypatch, f"--experiment={file}")
    assert seen == [Path(folder)]


def test_files_and_arguments_reach_the_configuration(monkeypatch, tmp_path, ring):
    import yaml

    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ring | {"beta": 0.1, "objective": "sft", "sft_epochs": 0}))
    (tmp_path / "b.yaml").write_text("beta: 0.2\n")
    seen = {}
    monkeypatch.setattr(command, "run", lambda *args: seen.update(config=args))
    call(monkeypatch, "--dataset=toy", f"--config_files={tmp_path / 'a.yaml'} {tmp_path / 'b.yaml'}", "--sft_epochs=0")
    assert seen["config"] == ("SDPO-LLM", "toy", [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    from recbole_sdpo.config import RunConfig

    config = RunConfig(*seen["config"])
    assert config.settings.beta == 0.2 and config.settings.sft.epochs == 0
