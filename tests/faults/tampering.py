"""A file was cut, flipped, zeroed, lost or replaced: the right result, or a sentence that names
it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults import crashes, kills, oracle
from tests.faults.judge import Wrong, ended_well, last_line
from tests.faults.trial import Trial, mendable, recommend
from tests.faults.warm import Program

LONG, SHORT = 200, 5


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) or 1)]


def _flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) or 1)
    return (
        data[:place]
        + bytes([byte ^ 1 << draw.randrange(8) for byte in data[place : place + 1]])
        + data[place + 1 :]
    )


def _zero(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(data) or 1)
    end = min(len(data), begin + draw.choice([4, 100, 4096]))
    return data[:begin] + bytes(end - begin) + data[end:]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "flipped": _flip,
    "zeroed": _zero,
    "emptied": lambda data, draw: b"",
    "lengthened": lambda data, draw: data + draw.choice([b"\n", b"x", b"\0" * 100, data]),
    "replaced": lambda data, draw: draw.choice(
        [b"null", b"[]", b"{}", b'"text"', b"\xff\xfe\x00", b"<html></html>\n"]
    ),
}


def damage(file: Path, draw: random.Random) -> str:
    """Do something to the file; returns what."""
    sort = draw.choice(
        [
            "cut",
            "cut",
            "flipped",
            "flipped",
            "zeroed",
            "zeroed",
            "emptied",
            "lengthened",
            "replaced",
            "lost",
            "a folder",
        ]
    )
    if sort in DAMAGE:
        file.write_bytes(DAMAGE[sort](file.read_bytes(), draw))
    else:
        file.unlink()
        if sort == "a folder":
            file.mkdir()
    return sort


def attempt(trial: Trial) -> str:
    """One file, of one way to read it."""
    reader = trial.draw.choice(
        [going_on, going_on, a_checkpoint, a_recommendation, a_cache, a_result, a_conversion]
    )
    return "result" if reader(trial) else "sentence"


def _damage_one(trial: Trial, where: Path, *patterns: str) -> list[str]:
    """Damage a file of these patterns; returns the words by which an error may name it."""
    files = sorted(
        {file for pattern in patterns for file in where.rglob(pattern) if file.is_file()}
    )
    file = trial.draw.choice(files)
    sort = damage(file, trial.draw)
    trial.what += f"{file.relative_to(trial.folder)} {sort}"
    return [file.name, *(file.parent.name for _ in range(1) if sort in ("lost", "a folder"))]


def going_on(trial: Trial) -> bool:
    """A run is resumed."""
    variant = trial.draw.choice(["scratch", "lora", "more candidates", "fixed negatives"])
    share = trial.draw.choice([0.45, 0.8])
    model, settings = kills.settings_of(trial, variant)
    left, _ = kills.alone(trial, variant)

    def make(folder: Path) -> None:
        at = int(share * len(crashes.moments(trial, variant)))
        trial.start(
            settings, model=model, folder=folder, first=crashes.Writes(folder, at).watch
        ).ending()

    interrupted = trial.shared(f"interrupted-{variant}-{share}", make)
    for part in ("run", "cache"):
        if (interrupted / part).exists():
            shutil.copytree(interrupted / part, trial.folder / part)
    trial.what = f"resume of {variant}: "
    names = _damage_one(trial, trial.folder / "run", "*")
    del settings["run_dir"]
    ending = trial.run(settings | {"resume": "run"})
    well = ended_well(ending, names)
    if well and "steps.csv is not there; the run goes on without" not in ending.err:
        oracle.check_alike(trial.folder / "run", left)
    return well


def a_checkpoint(trial: Trial) -> bool:
    """An alignment begins from an SFT checkpoint."""
    variant = trial.draw.choice(["scratch", "lora"])
    model, settings = kills.settings_of(trial, variant)
    kills.alone(trial, variant)
    sft = trial.folder.parent / "shared" / f"alone-{variant}" / "run" / "sft"
    settings["sft_checkpoint"] = "sft"

    def make(folder: Path) -> None:
        shutil.copytree(sft, folder / "sft")
        if not ended_well(trial.run(settings, folder=folder)):
            raise Wrong("dead", "an alignment does not begin from an SFT checkpoint")

    left = oracle.remains(trial.shared(f"aligned-{variant}", make) / "run")
    shutil.copytree(sft, trial.folder / "sft")
    trial.what = f"sft_checkpoint of {variant}: "
    names = _damage_one(trial, trial.folder / "sft", "*")
    well = ended_well(trial.run(settings), names)
    if well:
        oracle.check_alike(trial.folder / "run", left)
    return well


def a_recommendation(trial: Trial) -> bool:
    """A checkpoint recommends."""
    variant = trial.draw.choice(["scratch", "lora"])
    kills.alone(trial, variant)
    run = trial.folder.parent / "shared" / f"alone-{variant}" / "run"
    arguments = ["--checkpoint=run/sdpo", "--user=u1", "-k=5", "--format=json"]

    def make(folder: Path) -> None:
        shutil.copytree(run, folder / "run")
        ending = Program(folder, recommend, arguments).ending()
        if not ended_well(ending):
            raise Wrong("dead", f"no checkpoint recommends: {last_line(ending.err)}")
        (folder / "said").write_text(ending.out)

    said = (trial.shared(f"recommended-{variant}", make) / "said").read_text()
    shutil.copytree(run, trial.folder / "run")
    trial.what = f"recommend of {variant}: "
    names = _damage_one(trial, trial.folder / "run" / "sdpo", "*")
    ending = Program(trial.folder, recommend, arguments).ending()
    well = ended_well(ending, names)
    if well and ending.out != said:
        raise Wrong(
            "wrong result", f"it recommends {ending.out[:200]!r} in place of {said[:200]!r}"
        )
    return well


def a_cache(trial: Trial) -> bool:
    """A run finds what an earlier one asked the reference."""
    left, _ = kills.alone(trial, "fixed negatives")
    model, settings = kills.settings_of(trial, "fixed negatives")
    shutil.copytree(
        trial.folder.parent / "shared" / "alone-fixed negatives" / "cache", trial.folder / "cache"
    )
    trial.what = "cache_dir: "
    names = _damage_one(trial, trial.folder / "cache", "*")
    well = ended_well(trial.run(settings, model=model), [*names, "cache_dir"])
    if well:
        oracle.check_alike(trial.folder / "run", left)
    return well


def a_result(trial: Trial) -> bool:
    """A result is read again."""
    variant = trial.draw.choice(["scratch", "BPR"])
    kills.alone(trial, variant)
    shutil.copytree(
        trial.folder.parent / "shared" / f"alone-{variant}" / "run", trial.folder / "run"
    )
    trial.what = f"result of {variant}: "
    before = oracle.remains(trial.folder / "run")
    names = _damage_one(trial, trial.folder / "run", "result.json", "ranks.csv")

    def read() -> None:
        from recbole_sdpo.result import read_result

        with mendable():
            read_result(Path("run"))

    well = ended_well(Program(trial.folder, read).ending(), names)
    if well:
        oracle.check_alike(trial.folder / "run", before)
    return well


def a_conversion(trial: Trial) -> bool:
    """A GGUF file's converted weights are found in the cache."""
    _, settings = kills.settings_of(trial, "lora")
    source = trial.backbone

    def make(folder: Path) -> None:
        def write() -> None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from tests.lm.test_backbone import write_gguf

            write_gguf(
                folder / "toy.gguf",
                AutoModelForCausalLM.from_pretrained(source),
                AutoTokenizer.from_pretrained(source),
            )

        ending = Program(folder, write).ending()
        if ending.code:
            raise RuntimeError(ending.err)

    settings |= {"backbone": str(trial.shared("gguf", make) / "toy.gguf"), "cache_dir": "cache"}

    def run_alone(folder: Path) -> None:
        ending = trial.run(settings, folder=folder)
        if not ended_well(ending):
            raise Wrong("dead", f"no run begins from a GGUF file: {last_line(ending.err)}")

    alone = trial.shared("from-gguf", run_alone)
    shutil.copytree(alone / "cache", trial.folder / "cache")
    trial.what = "converted GGUF: "
    names = _damage_one(trial, trial.folder / "cache", "*")
    well = ended_well(trial.run(settings), [*names, "toy.gguf", "cache_dir"])
    if well:
        oracle.check_alike(trial.folder / "run", oracle.remains(alone / "run"))
    return well
