"""What ``experiments`` makes: it can be planned, or one sentence names the file, the run or the
key."""

from __future__ import annotations

from pathlib import Path

from tests.faults import experiments, toy
from tests.faults.judge import Wrong, ended_well
from tests.faults.trial import Trial, mendable
from tests.faults.warm import Program

LONG, SHORT = 200, 5

RAN = Path("/tmp/ran")
"""What is there if text of such a file was run."""


def attempt(trial: Trial) -> str:
    """Read one file, and plan its runs."""
    RAN.unlink(missing_ok=True)
    number = trial.draw.randrange(10**9)
    trial.what = f"experiments.broken({number})"
    settings = toy.settings("SDPO-LLM", data_path=str(trial.data))
    for key in ("eval_args", "show_progress"):  # an experiment's own
        del settings[key]
    trial.folder.joinpath("try.yaml").write_bytes(experiments.broken(number, settings))

    def read() -> None:
        from recbole_sdpo.experiment.file import Experiment
        from recbole_sdpo.experiment.plan import plan

        with mendable():
            plan(Experiment.load(Path("try.yaml")))

    well = ended_well(Program(trial.folder, read).ending())
    if RAN.exists():
        raise Wrong("code ran", trial.what)
    return "result" if well else "sentence"
