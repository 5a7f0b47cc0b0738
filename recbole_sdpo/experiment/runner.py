"""Runs an experiment, each run in a process of its own; what is finished is not run again, and a
failure stops no other."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from recbole_sdpo import compat
from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.plan import Run
from recbole_sdpo.experiment.worker import LIFELINE
from recbole_sdpo.files import check_seal, sealed, write_text
from recbole_sdpo.inputs import began_with
from recbole_sdpo.interrupt import add_note
from recbole_sdpo.output import say
from recbole_sdpo.result import RESULT_FILE, read_result
from recbole_sdpo.threads import cores
from recbole_sdpo.trainer.state import broken_part, holds_state

POLL, REMIND = 0.5, 60.0
"""Seconds between two tries for a lock, and between two lines that say what is waited for."""


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

    Each run is a process that holds the lock of its folder as long as it lives, and that ends with
    this one, whatever this one dies of. A result counts if it is whole, and if the run read what
    the experiment was planned with.

    Args:
        store: a folder that holds a folder for each run, named by its identity; experiments may
            share it.
        jobs: how many runs go on at once; they share the CPU's cores.
    """

    def __init__(self, store: Path, jobs: int = 1) -> None:
        self.store, self.jobs = store, jobs
        self._begun_from: set[str] = set()
        self._workers: set[subprocess.Popen] = set()
        self._starting, self._stopped = threading.Lock(), threading.Event()

    def folder(self, run: Run) -> Path:
        """Where a run's files are."""
        return self.store / run.identity

    def done(self, run: Run) -> bool:
        """Has it a result that counts?"""
        return self._fault(run) is None

    def _fault(self, run: Run) -> str | None:
        """Why its result does not count, if it does not."""
        folder = self.folder(run)
        try:
            read = read_result(folder).get("inputs", {})
            if run.identity in self._begun_from:
                check_seal(folder / "sft")
        except UserError as error:
            return str(error)
        if changed := run.inputs.changed(read, but_for=_of_start(run)):
            return (
                f"{changed} changed while the experiment ran, so that its result does not count; "
                "begin it again."
            )
        return self._fault_of_start(run, read)

    def _fault_of_state(self, run: Run, folder: Path) -> str | None:
        """Why the run in ``folder`` cannot go on from its state, if it cannot."""
        if broken := broken_part(folder):
            return f"{broken} is missing or damaged."
        try:
            read = began_with(folder)
            changed = run.inputs.changed_since(folder, but_for=_of_start(run))
        except UserError as error:
            return str(error)
        if changed:
            return f"it began with another {changed}."
        return self._fault_of_start(run, read)

    def _fault_of_start(self, run: Run, read: dict[str, str]) -> str | None:
        """It begins from the SFT that the others begin from. One that was lost and trained again
        may have other weights, as on a GPU."""
        there = sealed(self.folder(run.start) / "sft") if run.start else {}
        for name, digest in read.items():
            if there.get(name.removeprefix("sft_checkpoint/"), digest) != digest:
                return "the SFT that it began from was trained again, with other weights."
        return None

    def run_all(self, runs: list[Run]) -> list[Failure]:
        """Run them in order, each after the one it begins from; returns those that failed.

        Raises:
            UserError: the store cannot be written, or knows no locks.
        """
        check_writable(self.store)
        ordered = _with_starts(runs)
        todo = self._without_result(ordered)
        self._say(
            f"{len(ordered)} runs, of which {len(ordered) - len(todo)} are done already; results "
            f"are kept in {self.store}"
        )
        failures = self._run_each(todo)
        # An SFT that was lost may have got other weights than those that others began from.
        failed = {failure.run.identity for failure in failures}
        late = self._without_result([run for run in ordered if run.identity not in failed])
        return failures + self._run_each(late)

    def _run_each(self, todo: list[Run]) -> list[Failure]:
        begun: dict[str, Future] = {}
        took: dict[str, float] = {}
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for number, run in enumerate(todo):
                # What it begins from is ahead of it in the queue, so that waiting for it ends.
                start = begun.get(run.start.identity) if run.start else None
                begun[run.identity] = pool.submit(
                    self._in_turn, run, start, todo[number:], len(todo), took
                )
            ended = [future.result() for future in begun.values()]
        except KeyboardInterrupt as error:
            self._stop(pool)
            add_note(error, "the same command goes on from here: what is done is kept")
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [failure for failure in ended if failure]

    def _without_result(self, ordered: list[Run]) -> list[Run]:
        faults = {run.identity: self._fault(run) for run in ordered}
        self._begun_from = {
            run.start.identity for run in ordered if run.start and faults[run.identity]
        }
        faults |= {
            run.identity: self._fault(run) for run in ordered if run.identity in self._begun_from
        }
        for run in ordered:
            if faults[run.identity] and (self.folder(run) / RESULT_FILE).exists():
                self._say(f"{run.name}, seed {run.seed} is run again: {faults[run.identity]}")
        return [run for run in ordered if faults[run.identity]]

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        """End the runs, which save their state; asked again, kill them."""
        with self._starting:
            self._stopped.set()
            workers = list(self._workers)
        pool.shutdown(wait=False, cancel_futures=True)
        try:
            for worker in workers:
                worker.terminate()
            if workers:
                self._say(
                    f"stopping: runs that save their state and end: {len(workers)}; interrupt "
                    "again to kill them"
                )
            pool.shutdown()
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()

    def _in_turn(
        self, run: Run, start: Future | None, left: list[Run], total: int, took: dict[str, float]
    ) -> Failure | None:
        failed = start and start.result()
        if failed:
            return Failure(run, f"what it begins from failed: {failed.why}", failed.log)
        number = total - len(left) + 1
        self._say(
            f"run {number} of {total}: {run.name}, seed {run.seed} "
            f"({run.identity}){_time_left(left, took, self.jobs)}"
        )
        began = time.time()
        try:
            failure = self._run(run)
        except UserError as error:
            failure = Failure(run, str(error), self._log(run))
        except OSError as error:
            failure = Failure(
                run, f"{error.filename or self.store}: {error.strerror}", self._log(run)
            )
        took[run.name] = time.time() - began
        if failure:
            self._say(f"{run.name}, seed {run.seed} failed: {failure.why} (see {failure.log})")
        return failure

    def _run(self, run: Run) -> Failure | None:
        if changed := run.inputs.changed_now():
            return Failure(
                run,
                f"{changed} changed since the experiment began; begin it again: what is done is "
                "kept.",
                self._log(run),
            )
        with self._locked(run) as lock:
            return None if self.done(run) else self._run_locked(run, lock)

    @contextmanager
    def _locked(self, run: Run) -> Iterator[IO]:
        """The lock of a run's folder. Another experiment may be at the same run, of which this one
        takes the result then; or the run of one that was killed is still ending."""
        file = self.store / f"{run.identity}.lock"
        with file.open("w") as lock:
            said = -REMIND
            while not _lock(lock, file):
                if time.monotonic() - said >= REMIND:
                    self._say(
                        f"{run.name}, seed {run.seed}: waiting for the process that is at this "
                        f"run already, and holds {file}"
                    )
                    said = time.monotonic()
                if self._stopped.wait(POLL):
                    raise KeyboardInterrupt
            yield lock

    def _run_locked(self, run: Run, lock: IO) -> Failure | None:
        folder, again, log = self.folder(run), [], self._log(run)
        if holds_state(folder) and not (folder / RESULT_FILE).exists():
            if fault := self._fault_of_state(run, folder):
                self._say(f"{run.name}, seed {run.seed} begins anew: {fault}")
            else:
                again = [f"--resume={folder}"]
        if folder.exists() and not again:
            shutil.rmtree(folder)  # its result does not count, or there is no state to go on from
        file = self.store / f"{run.identity}.yaml"
        settings = run.settings | {"run_dir": str(folder), "checkpoint_dir": str(folder)}
        # No file can say so.
        trust = ["--trust_remote_code=True"] if settings.pop("trust_remote_code", False) else []
        if run.start:
            settings["sft_checkpoint"] = str(self.folder(run.start) / "sft")
        write_text(file, yaml.safe_dump(settings))
        command = [
            sys.executable,
            "-m",
            "recbole_sdpo",
            "run",
            f"--model={run.model}",
            f"--dataset={run.dataset}",
            f"--config_files={file}",
            *trust,
        ]
        with log.open("a", encoding="utf-8") as stream:
            began_at = stream.tell()
            code = self._work([*command, *again], stream, lock)
        fault = None if code else self._fault(run)
        if not code and not fault:
            return None
        written = log.read_bytes()[began_at:].decode("utf-8", errors="replace")
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        return Failure(
            run, fault or _why(code, lines[-1] if lines else "it wrote nothing", self.store), log
        )

    def _work(self, command: list[str], log: IO, lock: IO) -> int:
        """Run ``command`` in a process that holds ``lock`` and ends with this one; returns its exit
        code.

        It has a session of its own, so that Ctrl-C comes to it once, from here.
        """
        each = {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs))} if self.jobs > 1 else {}
        theirs, ours = os.pipe()
        try:
            with self._starting:
                if self._stopped.is_set():
                    raise KeyboardInterrupt
                worker = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=each | compat.environment() | {LIFELINE: str(theirs)},
                    pass_fds=(theirs, lock.fileno()),
                    start_new_session=True,
                )
                self._workers.add(worker)
            code = worker.wait()
            self._workers.discard(worker)
            return code
        finally:
            os.close(theirs)
            os.close(ours)

    def _log(self, run: Run) -> Path:
        return self.store / f"{run.identity}.log"

    def _say(self, message: str) -> None:
        say(time.strftime("%H:%M:%S ") + message)  # the runs go on, whoever reads


def _of_start(run: Run) -> str:
    """The kind of files that a plan does not know yet: what a run begins from is known by its
    identity."""
    return "sft_checkpoint" if run.start else ""


def check_writable(folder: Path) -> None:
    """Make ``folder``, and see that files can be written there.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} must be a folder that can be written: {error.strerror}; give another "
            "output, or call from another place."
        ) from error


def _lock(lock: IO, file: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file} must be on a file system with locks (flock), and this one says: "
            f"{error.strerror}."
        ) from error


def _why(code: int, last: str, store: Path) -> str:
    """Why a process ended without a result."""
    if shutil.disk_usage(store).free < 1 << 20:
        return f"the disk that holds {store} is full; the last line was: {last}"
    if code >= 0:
        return last
    memory = ", such as for want of memory" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{memory}, after: {last}"


def _with_starts(runs: list[Run]) -> list[Run]:
    """Each once, seed by seed, and in a seed first those that others begin from, which may have
    a row of their own."""
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
    seconds = sum(took.get(run.name, mean) for run in left) / jobs
    hours, minutes = divmod(round(seconds / 60), 60)
    return f", about {hours} h {minutes} min left"
