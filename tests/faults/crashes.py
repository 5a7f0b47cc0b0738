"""A run ends as it changes the disk, with or without power, and goes on to the same bits."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import kills
from tests.faults.judge import ended_well
from tests.faults.trial import Trial, command

LONG, SHORT = 300, 4

CRASH = 9
"""The exit code of a program that ended so."""


class Writes:
    """Counts what changes the disk below ``folder``, and ends the process at one of these.

    Opening a file for writing, a flush, a rename, a removal, a new folder: each counts, just before
    it happens. Without power, files that were never flushed lose their end.

    Args:
        at: the one to end at, from 0; None for none.
        power: draws what is lost with the power; None where it stays.
    """

    def __init__(self, folder: Path, at: int | None, power: random.Random | None = None) -> None:
        self.folder, self.at, self.power = folder, at, power
        self.seen: list[str] = []
        self._safe: dict[
            Path, int
        ] = {}  # bytes that outlast the power, of each file that was written

    def watch(self) -> None:
        """Begin to count."""
        sys.addaudithook(self._hook)
        flush = os.fsync

        def fsync(handle: Any) -> None:
            path = Path(
                os.readlink(
                    f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}"
                )
            )
            self._count("fsync", path)
            flush(handle)
            if path in self._safe:
                self._safe[path] = path.stat().st_size

        os.fsync = fsync
        import safetensors.torch

        save = safetensors.torch.serialize_file

        def serialize_file(
            tensors: Any, filename: Any, *others: Any, **more: Any
        ) -> None:  # written by Rust, which no hook sees
            self._writes(Path(filename).absolute())
            save(tensors, filename, *others, **more)

        safetensors.torch.serialize_file = serialize_file

    def _hook(self, event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            if isinstance(path, str | bytes | os.PathLike) and (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                self._writes(_path(path))
        elif event == "os.rename":
            old, new = _path(args[0], args[2]), _path(args[1], args[3])
            self._count("rename", new)
            for path in [path for path in self._safe if path == old or old in path.parents]:
                self._safe[new / path.relative_to(old)] = self._safe.pop(path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            path = _path(args[0], args[-1])
            self._count(event.removeprefix("os."), path)
            if event == "os.remove":
                self._safe.pop(path, None)

    def _writes(self, path: Path) -> None:
        if self._counts(path):
            self._count("open", path)
            self._safe.setdefault(path, path.stat().st_size if path.exists() else 0)

    def _counts(self, path: Path) -> bool:
        return self.folder in path.parents and path.relative_to(self.folder).parts[0] in (
            "run",
            "cache",
            "saved",
        )

    def _count(self, what: str, path: Path) -> None:
        if not self._counts(path):
            return
        if len(self.seen) == self.at:
            for file, size in self._safe.items() if self.power else ():
                if file.is_file() and self.power.random() < 0.5:
                    os.truncate(
                        file,
                        self.power.randint(min(size, file.stat().st_size), file.stat().st_size),
                    )
            os._exit(CRASH)
        self.seen.append(f"{what} {path.relative_to(self.folder)}")


def _path(path: Any, folder: int = -1) -> Path:
    """The absolute path, which may be given from an open folder on."""
    where = (
        os.readlink(f"/proc/self/fd/{folder}")
        if isinstance(folder, int) and folder >= 0
        else os.getcwd()
    )
    return Path(where, os.fsdecode(path))


def moments(trial: Trial, variant: str) -> list[str]:
    """What a run of the variant does to the disk, in its order."""
    model, settings = kills.settings_of(trial, variant)

    def make(folder: Path) -> None:
        writes = Writes(folder, None)

        def first() -> None:
            writes.watch()

        def note() -> None:
            command()
            (folder / "moments.json").write_text(json.dumps(writes.seen))

        ended_well(
            trial.start(settings, model=model, folder=folder, first=first, call=note).ending()
        )

    return json.loads((trial.shared(f"moments-{variant}", make) / "moments.json").read_text())


def attempt(trial: Trial) -> None:
    """End a run at one of its moments; sometimes end the one that goes on, too."""
    draw = trial.draw
    variant = draw.choice([*kills.VARIANTS])
    all_of_them = moments(trial, variant)
    places = [draw.randrange(len(all_of_them)) for _ in range(draw.choice([1, 1, 1, 2]))]
    power = draw.choice([None, random.Random(draw.random())])
    shown = " and ".join(f"at {place}, before {all_of_them[place]}" for place in places)
    trial.what = f"{variant}, ended {shown}{', without power' if power else ''}"
    left = iter(places)

    def first() -> Callable[[], object]:
        return Writes(trial.folder, next(left, None), power).watch

    kills.to_the_end(trial, variant, lambda program: None, len(places), first)
