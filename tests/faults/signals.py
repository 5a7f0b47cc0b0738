"""SIGTERM or Ctrl-C: one sentence, the usual exit code, and the run goes on to the same bits."""

from __future__ import annotations

import signal

from tests.faults import kills, oracle
from tests.faults.judge import ended_well, interrupted_well
from tests.faults.trial import Trial

LONG, SHORT = 60, 4


def attempt(trial: Trial) -> str:
    """Send one at a random moment; once in four times, a second one soon after."""
    draw = trial.draw
    variant = draw.choice([*kills.VARIANTS])
    number = draw.choice([signal.SIGTERM, signal.SIGINT])
    left, seconds = kills.alone(trial, variant)
    moment, again = draw.uniform(0, seconds), draw.random() < 0.25
    trial.what = f"{variant}, {number.name} after {moment:.3f} s{' and again' if again else ''}"
    model, settings = kills.settings_of(trial, variant)
    program = trial.start(settings, model=model)
    begun = False
    if not program.ended(moment):
        begun = (trial.folder / "run").exists()
        program.send(number)
        if again and not program.ended(0.02):
            program.send(number)
    ending = program.ending()
    if ending.code in (-number, 128 + number) and not begun and "Traceback" not in ending.err:
        pass  # it had not begun to listen, and there is nothing to say
    elif ending.code == 0:
        ended_well(ending)
    else:
        interrupted_well(ending, number)
    kills.go_on(trial, variant)
    oracle.check_alike(trial.folder / "run", left)
    oracle.check_cleared(trial.folder / "run")
    return "sentence" if ending.code else "result"
