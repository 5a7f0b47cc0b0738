"""A full disk, a read-only folder, a long name: one sentence; with room, the run goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults import kills, oracle
from tests.faults.judge import ended_well
from tests.faults.trial import Trial

LONG, SHORT = 80, 4

NOBODY = 65534


def attempt(trial: Trial) -> str:
    """One of these, at a random size or place."""
    sort = trial.draw.choice([full, full, full, read_only, too_long])
    return sort(trial)


def full(trial: Trial) -> str:
    """The disk under the run folder fills at some point; then there is room."""
    variant = trial.draw.choice([*kills.VARIANTS])
    left, _ = kills.alone(trial, variant)
    used = sum(
        file.stat().st_size
        for file in (trial.folder.parent / "shared" / f"alone-{variant}" / "run").rglob("*")
        if file.is_file()
    )
    size = trial.draw.randint(8, 16 + int(2.5 * used / 1024))
    trial.what = f"{variant}, on a disk of {size} KiB"
    disk = trial.folder / "disk"
    model, settings = kills.settings_of(trial, variant)
    other = {"cache_dir": "disk/cache"} if "cache_dir" in settings else {}
    with _small(disk, size) as (limit, grow):
        ending = trial.run(
            settings | other | {"run_dir": "disk/run", "checkpoint_dir": "disk"},
            model=model,
            first=limit,
        )
        well = ended_well(ending, ["disk"], codes=(1,))
        grow()
        kills.go_on(trial, variant, run_dir="disk/run")
        oracle.check_alike(disk / "run", left)
        oracle.check_cleared(disk / "run")
    return "result" if well else "sentence"


def read_only(trial: Trial) -> str:
    """A folder that the user may read and not write."""
    where = trial.draw.choice(["run_dir", "checkpoint_dir", "cache_dir", "the working directory"])
    variant = (
        "fixed negatives" if where == "cache_dir" else trial.draw.choice(["scratch", "BPR", "lora"])
    )
    trial.what = f"{variant}, {where} is read-only"
    model, settings = kills.settings_of(trial, variant)
    locked = trial.folder / "locked"
    locked.mkdir()
    settings |= {"run_dir": "open/run"} | ({where: "locked/x"} if "_" in where else {})
    (trial.folder / "open").mkdir()

    def first() -> None:
        """All is root's but what is locked, and root keeps to the modes as anybody else."""
        for path in [locked, *([trial.folder] if where == "the working directory" else [])]:
            os.chown(path, NOBODY, NOBODY)
            path.chmod(0o755)
        _keep_to_modes()

    if os.getuid():
        locked.chmod(0o555)
    ending = trial.run(settings, model=model, first=first if not os.getuid() else lambda: None)
    names = ["locked", where] if "_" in where else ["log", "saved", str(trial.folder)]
    return "result" if ended_well(ending, names) else "sentence"


def _keep_to_modes() -> None:
    """Give up, for good, the capabilities by which root reads and writes what is not its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, for this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: 32 bits of each, twice
    overriding = 1 << 1 | 1 << 2 | 1 << 3  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    wrong = libc.capget(header, sets)
    for place in range(3):
        sets[place] &= ~overriding
    if wrong or libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def too_long(trial: Trial) -> str:
    """A name, or a whole path, that no disk takes."""
    name = trial.draw.choice(["x" * 256, "é" * 130, "/".join(["x" * 200] * 25)])
    key = trial.draw.choice(
        [
            "run_dir",
            "checkpoint_dir",
            "cache_dir",
            "dataset",
            "resume",
            "sft_checkpoint",
            "backbone",
            "prompt_templates",
            "data_path",
        ]
    )
    trial.what = f"{key} of {len(name)} characters"
    _, settings = kills.settings_of(trial, "fixed negatives")
    if key == "checkpoint_dir":
        del settings["run_dir"]
    return (
        "result" if ended_well(trial.run(settings | {key: name}), [key, name[:40]]) else "sentence"
    )


@contextlib.contextmanager
def _small(disk: Path, size: int) -> Iterator[tuple]:
    """A disk of ``size`` KiB; gives what a program must call first, and what makes room.

    Where none can be mounted, no file may be longer than that.
    """
    disk.mkdir()

    def mount(options: str) -> bool:
        return not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True
        ).returncode

    if os.getuid() or not mount(f"size={size}k"):
        yield (
            lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (size * 1024, resource.RLIM_INFINITY)
            ),
            lambda: None,
        )
        return
    try:
        yield lambda: None, lambda: mount("remount,size=64m")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
