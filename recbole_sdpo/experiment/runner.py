"""Runs an experiment, each run in a process of its own; what is finished is not run again, and a failure stops no other."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.identity import sources
from recbole_sdpo.experiment.plan import Run
from recbole_sdpo.trainer.state import FOLDER


@dataclass
class Failure:
    """A run that ended without a result.

    Attributes:
        why: the last line that it wrote.
        log: the file with all of them.
    """

    run: Run
    why: str
    log: Path


class Runner:
    """Runs what has no result yet.

    Args:
        store: a folder that holds a folder for each run, named by its identity; experiments may share it.
        jobs: how many runs go on at once; they share the CPU's cores.
    """

    def __init__(self, store: Path, jobs: int = 1) -> None:
        self.store, self.jobs, self._sources = store, jobs, sources()

    def folder(self, run: Run) -> Path:
        """Where a run's files are."""
        return self.store / run.identity

    def done(self, run: Run) -> bool:
        """Has it a result?"""
        return (self.folder(run) / "result.json").is_file()

    def run_all(self, runs: list[Run]) -> list[Failure]:
        """Run them in order, each after the one it begins from; returns those that failed."""
        ordered = _with_starts(runs)
        todo = [run for run in ordered if not self.done(run)]
        self._say(f"{len(ordered)} runs, of which {len(ordered) - len(todo)} are done already; results are kept in {self.store}")
        self.store.mkdir(parents=True, exist_ok=True)
        begun: dict[str, Future] = {}
        took: dict[str, float] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            for number, run in enumerate(todo):
                # What it begins from is ahead of it in the queue, so that waiting for it ends.
                start = begun.get(run.start.identity) if run.start else None
                begun[run.identity] = pool.submit(self._in_turn, run, start, todo[number:], len(todo), took)
            try:
                found = [future.result() for future in begun.values()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [failure for failure in found if failure]

    def _in_turn(self, run: Run, start: Future | None, left: list[Run], total: int, took: dict[str, float]) -> Failure | None:
        if sources() != self._sources:
            raise UserError("recbole_sdpo's sources changed since the experiment began; begin it again: what is done is kept.")
        failed = start and start.result()
        if failed:
            return Failure(run, f"what it begins from failed: {failed.why}", failed.log)
        number = total - len(left) + 1
        self._say(f"run {number} of {total}: {run.name}, seed {run.seed} ({run.identity}){_time_left(left, took, self.jobs)}")
        began = time.time()
        failure = self._run(run)
        took[run.name] = time.time() - began
        if failure:
            self._say(f"{run.name}, seed {run.seed} failed: {failure.why} (see {failure.log})")
        return failure

    def _run(self, run: Run) -> Failure | None:
        with (self.store / f"{run.identity}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another experiment may be at the same run; then this one takes its result
            return None if self.done(run) else self._run_locked(run)

    def _run_locked(self, run: Run) -> Failure | None:
        folder, again = self.folder(run), []
        if (folder / FOLDER / "state.json").is_file():
            again = [f"--resume={folder}"]
        elif folder.exists():
            shutil.rmtree(folder)  # it died before there was a state to go on from
        file, log = (self.store / f"{run.identity}.{end}" for end in ("yaml", "log"))
        settings = run.settings | {"run_dir": str(folder), "checkpoint_dir": str(folder)}
        if run.start:
            settings["sft_checkpoint"] = str(self.folder(run.start) / "sft")
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [sys.executable, "-m", "recbole_sdpo", f"--model={run.model}", f"--dataset={run.dataset}", f"--config_files={file}"]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))} if self.jobs > 1 else {}
        with log.open("a", encoding="utf-8") as stream:
            began_at = stream.tell()
            code = subprocess.run([*command, *again], stdout=stream, stderr=subprocess.STDOUT, env=os.environ | threads).returncode
        if code or not self.done(run):
            written = log.read_bytes()[began_at:].decode("utf-8", errors="replace")
            lines = [line.strip() for line in written.splitlines() if line.strip()] or ["it wrote nothing"]
            killed = f"killed by signal {-code}, such as for want of memory, after: " if code < 0 else ""
            return Failure(run, killed + lines[-1], log)
        return None

    def _say(self, message: str) -> None:
        print(time.strftime("%H:%M:%S ") + message, flush=True)


def _with_starts(runs: list[Run]) -> list[Run]:
    """Each once, seed by seed, and in a seed first those that others begin from, which may have a row of their own."""
    rows = {run.identity: run for run in reversed(runs)}
    ordered: dict[str, Run] = {}
    for seed in dict.fromkeys(run.seed for run in runs):
        mine = [run for run in runs if run.seed == seed]
        for run in [*(run.start for run in mine if run.start), *mine]:
            ordered.setdefault(run.identity, rows.get(run.identity, run))
    return list(ordered.values())


def _time_left(left: list[Run], took: dict[str, float], jobs: int) -> str:
    """An estimate: a run takes what the last one of its name took, or else the mean of all."""
    if not took:
        return ""
    mean = sum(took.values()) / len(took)
    minutes = sum(took.get(run.name, mean) for run in left) / 60 / jobs
    return f", about {minutes // 60:.0f} h {minutes % 60:.0f} min left"
