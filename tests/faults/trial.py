"""One trial: its own folder, its own random numbers, and the ways into the program."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.faults import toy
from tests.faults.judge import Wrong
from tests.faults.warm import Ending, Program

WAYS = ("arguments", "file", "dictionary")
"""How settings reach a run: on the command line, in a YAML file, or from Python."""


class Trial:
    """A trial of one kind; all that it draws follows from the seed, its kind and its number.

    Args:
        work: the folder of all trials; what several of them need is made there once.

    Attributes:
        folder: of this trial alone.
        draw: its random numbers.
        what: what it tries, in a few words, for the report.
    """

    def __init__(self, work: Path, seed: int, kind: str, number: int) -> None:
        self._shared = work / "shared"
        self.folder = work / f"{kind}-{number}"
        self.draw = random.Random(f"{seed} {kind} {number}")
        self.number, self.what = number, ""

    @property
    def marker(self) -> Path:
        """A file that is there if text was run as code."""
        return self.folder / "marker"

    @property
    def evil(self) -> str:
        """An expression that makes :attr:`marker`."""
        return f"__import__('pathlib').Path('{self.marker}').touch()"

    def shared(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that ``make`` fills, once for all trials. Nobody may change what is in it."""
        self._shared.mkdir(parents=True, exist_ok=True)
        folder, part = self._shared / name, self._shared / f"{name}.{os.getpid()}.part"
        with (self._shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                make(part)
                part.rename(folder)
        return folder

    @property
    def data(self) -> Path:
        """The ``data_path`` of the toy dataset; shared."""
        return self.shared("data", toy.write)

    @property
    def backbone(self) -> Path:
        """The folder of the toy backbone; shared."""
        return self.shared(
            "backbone", lambda folder: Program(folder, lambda: toy.backbone(folder)).ending()
        )

    def start(
        self,
        settings: Mapping[str, Any],
        way: str = "file",
        model: str = "SDPO-LLM",
        folder: Path | None = None,
        call: Callable[[], object] | None = None,
        **how: Any,
    ) -> Program:
        """Begin a run.

        Args:
            settings: all of them but model and dataset.
            way: one of ``WAYS``.
            folder: its working directory; this trial's by default.
            call: in place of the command.
            how: further arguments of :class:`Program`.
        """
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        dataset = settings.get("dataset", "toy")
        settings = {key: value for key, value in settings.items() if key != "dataset"}
        if way == "dictionary":
            return Program(folder, lambda: from_python(model, dataset, settings), **how)
        arguments = [f"--model={model}", f"--dataset={dataset}"]
        if way == "arguments":
            arguments += [f"--{key}={value}" for key, value in settings.items()]
        else:
            number = len(list(folder.glob("settings-*.yaml")))
            file = folder / f"settings-{number}.yaml"
            file.write_text(yaml.safe_dump(settings), encoding="utf-8")
            arguments.append(f"--config_files={file.name}")
        return Program(folder, call or command, arguments, **how)

    def run(
        self, settings: Mapping[str, Any], way: str = "file", model: str = "SDPO-LLM", **how: Any
    ) -> Ending:
        """A run, from its beginning to its end."""
        return self.start(settings, way, model, **how).ending()

    def check_marker(self) -> None:
        """Fail if text was run as code."""
        if self.marker.exists():
            raise Wrong("code ran", self.what)

    def clean(self) -> None:
        """Remove the trial's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def command() -> None:
    """The script, by its command line."""
    from recbole_sdpo.command.script import main

    main()


def recommend() -> None:
    """The program that recommends, by its command line."""
    from recbole_sdpo.command.program import main

    sys.argv.insert(1, "recommend")
    main()


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """Print what a user can mend as the command does."""
    from recbole_sdpo.errors import UserError

    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")


def result_of(run_dir: Path) -> dict[str, Any]:
    """What ``result.json`` holds."""
    return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))


def from_python(model: str, dataset: str, settings: Mapping[str, Any]) -> None:
    """The program, by its function."""
    from recbole_sdpo.quick_start import run

    with mendable():
        run(model, dataset, config_dict=dict(settings))
