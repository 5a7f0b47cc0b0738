"""What ``checkpoints`` makes: it recommends, or one sentence says why not; nothing of it runs."""

from __future__ import annotations

from tests.faults import checkpoints, kills
from tests.faults.judge import ended_well
from tests.faults.trial import Trial, recommend
from tests.faults.warm import Program

LONG, SHORT = 200, 5


def attempt(trial: Trial) -> str:
    """Change one thing in a checkpoint, and have it recommend, or align from it."""
    variant = trial.draw.choice(["scratch", "lora"])
    _, settings = kills.settings_of(trial, variant)
    kills.alone(trial, variant)
    stage = trial.draw.choice(["sdpo", "sdpo", "sft"])
    source = trial.folder.parent / "shared" / f"alone-{variant}" / "run" / stage
    files = {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    what, changed = checkpoints.tampered(trial.draw, files, trial.marker)
    trial.what = f"{stage} of {variant}: {what}"
    for name, content in changed.items():
        file = trial.folder / "checkpoint" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if stage == "sft":
        ending = trial.run(settings | {"sft_checkpoint": "checkpoint"})
    else:
        arguments = ["--checkpoint=checkpoint", "--user=u1", "-k=5", "--format=json"]
        ending = Program(trial.folder, recommend, arguments).ending()
    return "result" if ended_well(ending) else "sentence"
