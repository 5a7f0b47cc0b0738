"""An experiment from its file to its report."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from recbole_sdpo.digests import package_versions
from recbole_sdpo.experiment.file import Experiment, refuse_overlap, written
from recbole_sdpo.experiment.plan import Run, alike, plan
from recbole_sdpo.experiment.runner import Failure, Runner, check_writable
from recbole_sdpo.experiment.tune import tune
from recbole_sdpo.output import say
from recbole_sdpo.report.comparison import FinishedRun, compare, kept_starts, unfair
from recbole_sdpo.report.experiment import write_report
from recbole_sdpo.report.table import comparison_markdown

STORE = Path("saved") / "runs"
"""Where runs are kept, by identity, for every experiment that has them."""


def run_experiment(
    file: Path,
    output: Path,
    overrides: dict[str, Any] | None = None,
    search: bool = False,
    jobs: int = 1,
    command: str = "",
) -> list[Failure]:
    """Run all of an experiment that has no result yet, and write its report into ``output``.

    Args:
        file: YAML, with the keys of :class:`Experiment`.
        overrides: settings over those of every run.
        search: try the settings under ``tune`` first.
        jobs: how many runs go on at once.
        command: for the report, how it was called.

    Returns:
        the runs that failed; the report is of the others.

    Raises:
        UserError: a setting of any run is wrong; nothing has run yet.
    """
    experiment, runner = Experiment.load(file, overrides), Runner(STORE, jobs)
    failures: list[Failure] = []
    text = written(file)  # as it is now, whatever becomes of it until all have run
    check_writable(output)
    runs = plan(experiment)  # which checks all settings before any run begins
    if search:
        for entry in experiment.runs:
            refuse_overlap(overrides or {}, entry.tune, f"run {entry.name!r} tunes it")
        experiment, failures = tune(experiment, runner, output)
        runs = plan(experiment)
    failures += runner.run_all(runs)
    finished = _finished(experiment, runner, runs)
    warnings = [f"{each.run.name}, seed {each.run.seed} failed: {each.why}" for each in failures]
    warnings += alike(runs)
    given = sorted({run.name for run in runs if run.settings.get("sft_checkpoint")})
    if given:
        warnings.append(
            f"minutes and cost of {', '.join(given)} are without the SFT that sft_checkpoint gives"
        )
    if finished:
        origin = _origin(text, command, finished)
        warnings = _report(experiment, finished, output, warnings, origin)
    for warning in warnings:
        say(f"warning: {warning}")
    return failures


def _finished(experiment: Experiment, runner: Runner, runs: list[Run]) -> list[FinishedRun]:
    """Those runs that have a result, and so has what they begin from, row by row, each of them seed
    by seed: where one failed, the others keep their places."""
    axes = {entry.name: entry.axis for entry in experiment.entries()}
    finished = []
    for run in runs:
        if runner.done(run) and (run.start is None or runner.done(run.start)):
            start = runner.folder(run.start) if run.start else None
            folder, axis = runner.folder(run), axes[run.name]
            finished.append(FinishedRun.read(folder, start, run.name, axis, run.seed))
    places = {name: place for place, name in enumerate(axes)}
    return sorted(finished, key=lambda run: places[run.name])


def _report(
    experiment: Experiment,
    finished: list[FinishedRun],
    output: Path,
    warnings: list[str],
    origin: str,
) -> list[str]:
    """Write and print the tables; returns all warnings."""
    modes = experiment.candidates
    warnings = unfair(finished, modes) + kept_starts(finished, modes) + warnings
    audited = any((experiment.settings | run.settings).get("audit") for run in experiment.runs)
    comparisons = [
        compare(
            finished,
            mode,
            experiment.metrics,
            experiment.baseline_names(),
            costs=experiment.cost,
            audited=audited,
        )
        for mode in modes
    ]
    # of the protocol of the first candidates, as what others published is
    comparisons[0].published = {
        entry.name: entry.published for entry in experiment.entries() if entry.published
    }
    warnings = write_report(
        output,
        experiment.title,
        comparisons,
        finished,
        warnings,
        origin,
        experiment.groups,
        experiment.pairs,
    )
    tables = [comparison_markdown(comparison) + "\n" for comparison in comparisons]
    say("\n".join(["", *tables, f"report: {output / 'report.html'}"]))
    return warnings


def _origin(text: str, command: str, finished: list[FinishedRun]) -> str:
    """How the results came about, in lines."""
    processor = _processor()
    machines = set()
    for run in finished:
        machine = run.result["machine"]
        machines.add(f"{machine['device']}, {machine['cpus']} CPU cores ({processor})")
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    hours = sum({run.result["run_dir"]: run.wall_s for run in finished}.values()) / 3600
    lines = [
        command,
        f"training: {hours:.1f} hours, shared SFT counted in each run",
        *sorted(machines),
        f"Python {platform.python_version()}, {versions}",
    ]
    return "\n".join([*lines, "", text])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
